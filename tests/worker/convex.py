"""A convex problem under an engine: logistic regression, driven step by step as the loop does.

`convex.json` in the run directory says which engine and how; rank 0 writes `convex-result.json`.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hpcdl.distributed.engine import Batch, Engine
from hpcdl.distributed.hogwild import HogwildEngine
from hpcdl.distributed.local import DilocoEngine, LocalEngine
from hpcdl.distributed.losses import IGNORE
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parallelize import Job
from hpcdl.distributed.server import ServerEngine
from hpcdl.runs.store import RunDir
from hpcdl.spec.parallel import ParallelDims
from hpcdl.worker import process
from hpcdl.worker.control import Gathering

ENGINES: dict[str, Any] = {
    "local_sgd": LocalEngine, "diloco": DilocoEngine, "param_server": ServerEngine, "hogwild": HogwildEngine,
}  # fmt: skip
SAMPLES, FEATURES, CLASSES, BATCH = 512, 12, 3, 24


class Logistic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, CLASSES)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, inputs: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.linear(inputs)
        return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum").reshape(1)


def data() -> tuple[Tensor, Tensor]:
    """Three classes that overlap, so that the best loss is well above 0; every sixth label is left out."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=draw)
    centres = torch.randn(CLASSES, FEATURES, generator=draw) * 0.5
    inputs = centres[labels] + torch.randn(SAMPLES, FEATURES, generator=draw)
    return inputs, labels.masked_fill(torch.rand(SAMPLES, generator=draw) < 1 / 6, IGNORE)


def batch(inputs: Tensor, labels: Tensor, rows: Tensor) -> Batch:
    return {"input_ids": inputs[rows], "position_ids": rows, "labels": labels[rows]}


class Counted:
    """Counts what is given to all_reduce."""

    def __init__(self) -> None:
        self.bytes = 0
        self._real = dist.all_reduce
        dist.all_reduce = self

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes += tensor.nbytes
        return self._real(tensor, *args, **kwargs)


def make(how: dict[str, Any], grid: Grid) -> Engine:
    def make_optimizer(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        if how["optimizer"] == "adamw":
            return torch.optim.AdamW(parameters, lr=0.0, fused=True)
        return torch.optim.SGD(parameters, lr=0.0, momentum=how.get("momentum", 0.0), fused=True)

    job = Job(
        make_optimizer=make_optimizer, autocast=False, checkpointing="none", offload="none", compile=False,
        micro_batches=1, micro_batch_size=BATCH, seq_len=1, seed=0, max_steps=how["steps"],
    )  # fmt: skip
    if how["engine"] == "one":
        return Engine([Logistic()], grid, make_optimizer, autocast=False)
    engine: Engine = ENGINES[how["engine"]](Logistic(), grid, job, **how["settings"])
    return engine


def main(run: RunDir) -> None:
    how = json.loads((run.path / "convex.json").read_text())
    torch.set_num_threads(1)
    who = process.from_environment()
    process.join(who, torch.device("cpu"))
    ranks = who.world_size
    grid = Grid(ParallelDims(pp=1, dp_replicate=ranks, dp_shard=1, cp=1, tp=1), torch.device("cpu"))
    engine = make(how, grid)
    counted = Counted()
    inputs, labels = data()
    order = torch.Generator().manual_seed(1)
    losses: list[float] = []
    norms: list[float] = []
    under: deque[tuple[int, Gathering]] = deque()
    for step in range(how["steps"]):
        rows = torch.randint(SAMPLES, (BATCH,), generator=order)
        targets = int((labels[rows] != IGNORE).sum())
        total = engine.accumulate([batch(inputs, labels, rows.chunk(ranks)[who.rank])], targets)
        if who.rank == how.get("slow", -1):
            time.sleep(how["slow_s"])
        norm = engine.step(how["rate"] * (1 - step / how["steps"]), how.get("max_norm"))
        under.append((targets, Gathering([total, norm], engine.device)))
        while under and (len(under) > engine.lag or step + 1 == how["steps"]):
            of, numbers = under.popleft()
            everyone = numbers.wait()
            losses.append(float(everyone[:, 0].sum()) / of)
            norms.append(engine.norm_of(everyone[:, 1]))
    sent = counted.bytes
    everything = batch(inputs, labels, torch.arange(SAMPLES))
    final = float(engine.evaluate([everything])) / int((labels != IGNORE).sum())
    dist.barrier()
    report = engine.report()
    engine.close()
    if who.is_first:
        weights = [p.detach().flatten().tolist() for p in engine.trainable.values()]
        found = {
            "losses": losses, "norms": norms, "final": final, "bytes": sent, "report": report,
            "weights": [x for part in weights for x in part],
        }  # fmt: skip
        (run.path / "convex-result.json").write_text(json.dumps(found))
    process.leave()
