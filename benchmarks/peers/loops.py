"""The same training in a plain torch loop, accelerate, transformers' Trainer and Lightning: peers of training.py.

    python loops.py {torch,accelerate,trainer,lightning} FOLDER

FOLDER has what training.py made: `model` (weights as transformers writes them), `batches.npz` and `setting.json`.
AdamW (fused), clipping at 1, a constant rate, no logging, evaluation or checkpoint. All else is each one's default.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from gate import Gate, Record, rank
from torch.utils.data import DataLoader, Dataset, Sampler

FOLDER = Path(sys.argv[2])
SETTING = json.loads((FOLDER / "setting.json").read_text())
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
BATCH: int = SETTING["rows"] // RANKS
"""Rows of a rank's step."""
ADAMW = {"lr": SETTING["lr"], "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0, "fused": True}


class Rows(Dataset[dict[str, torch.Tensor]]):
    """All rows in the order of steps; the labels are shifted already."""

    def __init__(self) -> None:
        with np.load(FOLDER / "batches.npz") as arrays:
            self._parts = {name: torch.from_numpy(array) for name, array in arrays.items()}

    def __len__(self) -> int:
        return len(self._parts["input_ids"])

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        found = {name: part[row] for name, part in self._parts.items()}
        return {**found, "shift_labels": found["labels"]}


class Gated(Sampler[list[int]]):
    """Row numbers of each step, in order, behind the gate.

    Args:
        rank: whose rows; None: every rank's, one after the other, for who shares them out himself.
    """

    batch_size = BATCH
    drop_last = True

    def __init__(self, rank: int | None) -> None:
        self._rank, self._gate = rank, Gate()

    def __len__(self) -> int:
        return int(SETTING["steps"]) * (RANKS if self._rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(SETTING["steps"]):
            self._gate.step()
            for one in range(RANKS) if self._rank is None else (self._rank,):
                first = step * SETTING["rows"] + one * BATCH
                yield list(range(first, first + BATCH))


def loader(rank: int | None) -> DataLoader[dict[str, torch.Tensor]]:
    return DataLoader(Rows(), batch_sampler=Gated(rank))


def model(record: Record) -> Any:
    """The model; what it takes and the loss that it gives are noted."""
    made = transformers.LlamaForCausalLM.from_pretrained(FOLDER / "model", dtype=torch.float32)
    made.config.use_cache = False

    def note(_: Any, __: Any, given: dict[str, Any], out: Any) -> None:
        loss, count = out.loss.detach(), given.get("num_items_in_batch")
        labels = given["shift_labels"]
        record.took(given["input_ids"])
        record.came(lambda: float(loss) * int((labels != -100).sum() if count is None else count))

    made.register_forward_hook(note, with_kwargs=True)
    return made.train()


def plain(record: Record) -> None:
    network = model(record)
    if RANKS > 1:
        torch.distributed.init_process_group("gloo")
        network = torch.nn.parallel.DistributedDataParallel(network)
    optimizer = torch.optim.AdamW(network.parameters(), **ADAMW)
    for batch in loader(rank()):
        loss = network(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def accelerate(record: Record) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network = model(record)
    optimizer = torch.optim.AdamW(network.parameters(), **ADAMW)
    network, optimizer, batches = accelerator.prepare(network, optimizer, loader(None))
    for batch in batches:
        loss = network(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def trainer(record: Record) -> None:
    class Ours(transformers.Trainer):
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(loader(None))

    arguments = transformers.TrainingArguments(
        output_dir=str(FOLDER / "trainer"), use_cpu=True, max_steps=SETTING["steps"], optim="adamw_torch_fused",
        per_device_train_batch_size=BATCH, learning_rate=SETTING["lr"], adam_beta2=0.95, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=1.0, logging_strategy="no", save_strategy="no",
        report_to="none", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Ours(model=model(record), args=arguments, train_dataset=Rows()).train()


def lightning(record: Record) -> None:
    import lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = model(record)

        def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.network(**batch).loss  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), **ADAMW)

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    runner = pl.Trainer(
        accelerator="cpu", devices=RANKS, strategy="ddp" if RANKS > 1 else "auto", max_steps=SETTING["steps"],
        gradient_clip_val=1.0, use_distributed_sampler=False, enable_model_summary=False, **quiet,
    )  # fmt: skip
    runner.fit(Module(), loader(rank()))


LOOPS = {"torch": plain, "accelerate": accelerate, "trainer": trainer, "lightning": lightning}


def main() -> None:
    torch.set_num_threads(1)
    record = Record()
    LOOPS[sys.argv[1]](record)
    record.leave()


if __name__ == "__main__":
    main()
