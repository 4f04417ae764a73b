"""The programs of training.py: what they train, how each is started, and the files that all begin from."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _peers import HERE, LIGHTNING, free_port
from _turns import Program, start

TORCH, AGAIN = "torch", "torch, again"
FRAMEWORKS = ("accelerate", "trainer", "lightning")
OURS, BARE = "hpcdl", "hpcdl, monitor=none"
NAMES = (TORCH, AGAIN, *FRAMEWORKS, OURS, BARE)
SHARED = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 272}


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A model and a batch: how long a step is."""

    name: str
    hidden_size: int
    layers: int
    seq_len: int
    rows: int
    """Of the global batch; in training.py's table of a rank."""
    turn: int
    """Steps of a turn."""
    rounds: int
    quick_rounds: int
    warm_up: int
    """Steps that don't count; hpcdl measures memory and communication within them, once a run."""

    @property
    def shape(self) -> dict[str, Any]:
        return {
            **SHARED, "hidden_size": self.hidden_size, "intermediate_size": self.hidden_size * 11 // 4,
            "num_hidden_layers": self.layers, "max_position_embeddings": 1024,
        }  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start_program(name: str, folder: Path, regime: Regime, ranks: int, steps: int) -> Program:
    """Starts a peer's ranks, or hpcdl's launcher, which starts its own."""
    log = folder / f"{name}.log"
    env = {**environment(), "BENCH_GATE": str(folder / "gate"), "BENCH_NAME": name}
    if name in (OURS, BARE):
        inside = str(HERE / "peers" / "inside")
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (inside, os.environ.get("PYTHONPATH"))))
        argv = hpcdl_command(name, folder, regime, ranks, steps)
        return Program(name, [start(argv, env, log)], log, ranks)
    python = LIGHTNING.bin / "python" if name == "lightning" else Path(sys.executable)
    argv = [str(python), str(HERE / "peers" / "loops.py"), name.partition(",")[0], str(folder)]
    if ranks == 1:
        return Program(name, [start(argv, env, log)], log, ranks)
    # as torchrun sets them
    env |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
    }
    env |= {"LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "bench"}
    each = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return Program(name, [start(argv, one, log) for one in each], log, ranks)


def hpcdl_command(name: str, folder: Path, regime: Regime, ranks: int, steps: int) -> list[str]:
    return [
        *(sys.executable, "-m", "hpcdl.launch", "+experiment=pretrain_tiny", "cluster=local"),
        *(f"name={'ours' if name == OURS else 'bare'}", f"monitor={'default' if name == OURS else 'none'}"),
        *(f"cluster.processes_per_node={ranks}", "cluster.max_restarts=0", f"runs_dir={folder}/runs"),
        *(f"model.path={folder}/model", f"data.seq_len={regime.seq_len}", "seed=0", "task.sample_prompt=''"),
        *(f"trainer.max_steps={steps}", f"trainer.global_batch_size={regime.rows}"),
        *(f"trainer.micro_batch_size={regime.rows // ranks}", "trainer.eval_samples=2"),
        *("trainer.log_every=1000000", "trainer.eval_every=0", "trainer.checkpoint_every=0"),
        *("trainer.binding=none", "trainer.threads_per_process=1"),
        *("optim.lr=1e-4", "optim.schedule=constant", "optim.warmup_steps=0", "optim.weight_decay=0"),
    ]


def make_inputs(folder: Path, setting: dict[str, Any]) -> None:
    """The weights, and the batches of all steps as hpcdl's config names them."""
    import numpy as np

    from hpcdl.launch import sweep
    from hpcdl.launch.compose import Composer
    from hpcdl.spec.model import ModelShape
    from hpcdl.worker.data.batches import Order, batch
    from hpcdl.worker.data.prepare import open_dataset
    from hpcdl.worker.model import from_shape
    from hpcdl.worker.tokenizer import ByteTokenizer

    overrides = ("+experiment=pretrain_tiny", f"data.seq_len={setting['seq_len']}", f"seed={setting['seed']}")
    spec = sweep.read(Composer(), overrides, multirun=False).points[0].spec
    from_shape(ModelShape(**setting["shape"]), "sdpa", 0).save_pretrained(folder / "model")
    part = open_dataset(spec, ByteTokenizer()).train
    import torch

    rows = Order(len(part), setting["seed"]).rows(0, setting["steps"] * setting["rows"])
    arrays = {name: tensor.numpy() for name, tensor in batch(part, rows, torch.device("cpu")).items()}
    np.savez(folder / "batches.npz", **arrays)
    targets = (arrays["labels"] != -100).reshape(setting["steps"], -1).sum(axis=1)
    (folder / "targets.json").write_text(json.dumps(targets.tolist()))
