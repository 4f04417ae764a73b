"""Kinds of failure: what is worth another try, and what would only fail again.

Read from a few words (an exception's class, its bases and message, a signal), since that is all that crosses from
a rank to the agents: workers and agents judge by the same table.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Collection
from typing import Literal

from hpcdl.errors import HpcdlError, LostPeerError, NotFitError, UnsavedError
from hpcdl.runs.failure import is_out_of_memory

NEVER_RESTART = 78
"""Exit code of workers, agents and jobs whose failure would be the same again (sysexits.h: EX_CONFIG). An agent
that finds it in state.json doesn't start, whoever has put the job back into the queue."""

CAUSE = "hpcdl: cause: "
"""What a rank prints before its cause as JSON, where the run directory doesn't take it."""

Kind = Literal[
    "fault",
    "memory",
    "hang",
    "killed",
    "network",
    "device",
    "disk",
    "node",
    "preempted",
    "timeout",
    "unknown",
]
"""What a try ended by.

    fault       the config's or the code's: the same again at each try
    memory      host, control group or GPU: too little at this size
    hang        no step for far too long
    killed      by a signal, or it crashed
    network     a connection between ranks was lost, or not made
    device      a GPU's own fault (ECC, Xid)
    disk        an I/O error of the shared disk, or no space on it
    node        a node was lost, or is not fit (preflight)
    preempted   asked to make room; everything was saved
    timeout     the time limit; everything was saved
    unknown     it ended and nobody said why
"""

WORDS: dict[str, str] = {
    "fault": "a fault of the config or the code",
    "memory": "out of memory",
    "hang": "a hang",
    "killed": "a worker's death",
    "network": "a lost connection",
    "device": "a GPU's fault",
    "disk": "an error of the disk",
    "node": "a node's failure",
    "preempted": "preempted",
    "timeout": "the time limit",
    "unknown": "an end without a word",
}
"""Each kind in a sentence."""

HANG = "Hang"
PREFLIGHT = "NotFitError"
NODE_LOST = "NodeLost"
"""Types of causes that agents find themselves."""

_BY_TYPE: dict[str, Kind] = {
    HANG: "hang",
    PREFLIGHT: "node",
    NODE_LOST: "node",
    "BrokenProcessPool": "killed",
    "DistNetworkError": "network",
    "DistStoreError": "network",
    "ConnectionError": "network",
    "TimeoutError": "network",
    "gaierror": "network",
    "RendezvousConnectionError": "network",
    "RendezvousTimeoutError": "network",
    "RendezvousClosedError": "network",
    "RendezvousStateError": "network",
    "SignalException": "killed",
}
"""By an exception's class or one of its bases."""
_DISK = (errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ENOSPC, errno.EDQUOT, errno.ENOLINK)
_BY_WORDS: tuple[tuple[Kind, str], ...] = (
    # A collective called wrongly is a code's fault, though it comes from the same library.
    ("fault", r"ncclInvalid(Usage|Argument)|device-side assert|op\.preamble\.length"),
    (
        "device",
        r"ECC error|\bXid\b|fallen off the bus|GPU is lost|cudaErrorECC|NVLink.*(error|failure)"
        r"|CUDA error: (uncorrectable|hardware|unknown error)",
    ),
    (
        "killed",
        r"DataLoader worker .*(exited unexpectedly|killed by signal)|CUDA error: .*(launch failure|illegal)",
    ),
    (
        "disk",
        r"Stale file handle|Input/output error|No space left on device|Disk quota exceeded|Remote I/O error"
        r"|\(os error (5|28|116|121|122)\)|PytorchStreamWriter failed writing",
    ),
    (
        "network",
        r"[Cc]onnection (closed|reset|refused|aborted|was closed)|[Bb]roken pipe|No route to host|connectFullMesh"
        r"|Network is unreachable|Timed out waiting|Socket [Tt]imeout|Wait timeout|gloo/transport"
        r"|ncclRemoteError|ncclSystemError|NCCL (error|communicator|timeout)|Watchdog caught collective"
        r"|heartbeat|Rendezvous\w*Error|[Ff]ailed to recv|recvValue failed|client socket",
    ),
)
_ERROR_NAME = re.compile(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception|Interrupt)): ")


def kind_of(
    type_name: str,
    message: str,
    *,
    bases: Collection[str] = (),
    number: int | None = None,
    by_signal: bool = False,
    by_kernel: bool = False,
    code: int | None = None,
) -> Kind:
    """What a failure is.

    Args:
        type_name: the exception's class, or what an agent calls the cause (`ExitCode`, `torchrun`, `SIGKILL`).
        message: its message.
        bases: names of the class's bases.
        number: errno of an OSError.
        by_signal: whether a signal ended the rank.
        by_kernel: whether the kernel did, for want of memory.
        code: the rank's exit code, where it ended by itself and said nothing.
    """
    if by_kernel or is_out_of_memory(type_name, message):
        return "memory"
    if by_signal:
        return "killed"
    if code == NEVER_RESTART:
        return "fault"
    names = (type_name, *bases)
    if "LostPeerError" in names:
        return "network"
    if "HpcdlError" in names:
        return "fault"
    if number in _DISK:
        return "disk"
    for name in names:
        if name in _BY_TYPE:
            return _BY_TYPE[name]
    told = of_words(message)
    if told is not None:
        return told
    if type_name in ("ExitCode", "torchrun"):
        # torchrun's own last words may be an exception's: torch isn't installed there, say.
        said = _ERROR_NAME.match(message)
        return (
            "unknown"
            if said is None or type_name == "ExitCode"
            else kind_of(said.group(1), message[said.end() :])
        )
    return "network" if type_name == "DistBackendError" else "fault"


def of_exception(error: BaseException) -> Kind:
    """What an exception in this process is.

    Of an HpcdlError it is what it was raised from that tells: «the checkpoint can't be written» is the disk's.
    """
    if isinstance(error, NotFitError):
        return "disk" if error.shared else "node"
    if isinstance(error, UnsavedError):
        return "disk"
    if isinstance(error, LostPeerError):
        return "network"
    if isinstance(error, HpcdlError):
        return "fault" if error.__cause__ is None else of_words(str(error)) or of_exception(error.__cause__)
    return kind_of(
        type(error).__name__,
        str(error),
        bases=[cls.__name__ for cls in type(error).__mro__[1:]],
        number=error.errno if isinstance(error, OSError) else None,
    )


def of_words(message: str) -> Kind | None:
    """What an error's message says it is; None where it says nothing of the kind."""
    return next((kind for kind, pattern in _BY_WORDS if re.search(pattern, message)), None)
