"""How ranks call one another: torch's RPC over TensorPipe."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from torch.distributed import rpc

from hpcdl.errors import LostPeerError


def name(rank: int) -> str:
    """A rank's name in RPC."""
    return f"worker{rank}"


def join(rank: int, world_size: int, timeout_s: float) -> None:
    """Joins all ranks for RPC; they meet where the process group did.

    Raises:
        LostPeerError: they don't.
    """
    # Gloo's interface is right for RPC too: the launcher sets it where a machine's own name is of no use.
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if interface:
        os.environ.setdefault("TP_SOCKET_IFNAME", interface)
    with tempfile.TemporaryDirectory(prefix="hpcdl-rpc-") as folder:
        alone = f"file://{Path(folder) / 'store'}"  # without torchrun the world is this process
        options = rpc.TensorPipeRpcBackendOptions(
            rpc_timeout=timeout_s, init_method="env://" if "MASTER_ADDR" in os.environ else alone
        )
        try:
            rpc.init_rpc(name(rank), rank=rank, world_size=world_size, rpc_backend_options=options)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise LostPeerError(
                f"rank {rank} can't join the others for RPC: {str(error).strip().splitlines()[0]}"
            ) from error
