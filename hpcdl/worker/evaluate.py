"""Loss on held-out text, shared among the ranks."""

from __future__ import annotations

import math

import numpy as np
import torch

from hpcdl.distributed.engine import Batch, Engine
from hpcdl.distributed.losses import IGNORE
from hpcdl.spec import ExperimentSpec
from hpcdl.worker.control import gather
from hpcdl.worker.data.batches import Order, batch
from hpcdl.worker.data.prepare import Rows


def heldout_loss(spec: ExperimentSpec, engine: Engine, heldout: Rows, rank: int, ranks: int) -> float:
    """Mean over the target tokens of the first `eval_samples` held-out rows, in the seed's order.

    The rows are the same at every evaluation and on every number of ranks.

    Args:
        spec: the experiment.
        engine: the model; it is put back into training mode.
        heldout: held-out rows.
        rank: this rank among those that read different data.
        ranks: how many those are.
    """
    batches, targets = heldout_batches(spec, heldout, engine.device, rank, ranks)
    total = engine.evaluate(batches)
    sums = gather([total], engine.device)[:, 0].tolist()
    return math.fsum(sums) / targets


def heldout_batches(
    spec: ExperimentSpec, heldout: Rows, device: torch.device, rank: int = 0, ranks: int = 1
) -> tuple[list[Batch], int]:
    """This rank's batches of an evaluation, as many on every rank, and the target tokens of all ranks together.

    Args:
        spec: the experiment.
        heldout: held-out rows.
        device: where the batches go.
        rank: this rank among those that read different data.
        ranks: how many those are.
    """
    count = min(spec.trainer.eval_samples, len(heldout))
    rows = Order(len(heldout), spec.seed).rows(0, count)
    size = spec.trainer.micro_batch_size
    most = math.ceil(math.ceil(count / ranks) / size)
    # Sharded parameters are gathered by all ranks together, and pipelines want batches of one shape: each
    # rank gets as many whole batches as any other, filled up with rows that have no targets.
    mine = rows[rank::ranks]
    filled = np.concatenate([mine, np.repeat(rows[:1], most * size - len(mine))])
    batches = [batch(heldout, filled[at : at + size], device) for at in range(0, len(filled), size)]
    for number, made in enumerate(batches):
        made["labels"][max(0, len(mine) - number * size) :] = IGNORE
    return batches, int(heldout.counts[rows, 0].sum())
