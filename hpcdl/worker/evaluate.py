"""Loss on held-out text, shared among the ranks."""

from __future__ import annotations

import math

import torch

from hpcdl.spec import ExperimentSpec
from hpcdl.worker.control import gather
from hpcdl.worker.data.batches import Order, batch
from hpcdl.worker.data.prepare import Rows
from hpcdl.worker.network import Network


def heldout_loss(spec: ExperimentSpec, net: Network, heldout: Rows, rank: int, ranks: int) -> float:
    """Mean over the target tokens of the first `eval_samples` held-out rows, in the seed's order.

    The rows are the same at every evaluation and on every number of ranks. DDP's wrapper is left out: one
    rank may have a row more than another, and there is nothing to synchronise.

    Args:
        spec: the experiment.
        net: the network; it is put back into training mode.
        heldout: held-out rows.
        rank: this rank among those that hold different data.
        ranks: how many those are.
    """
    count = min(spec.trainer.eval_samples, len(heldout))
    rows = Order(len(heldout), spec.seed).rows(0, count)
    mine = rows[rank::ranks]
    total = torch.zeros((), dtype=torch.float64, device=net.device)
    size = spec.trainer.micro_batch_size
    module = getattr(net.wrapped, "module", net.wrapped)
    module.eval()
    with torch.no_grad(), net.context():
        for at in range(0, len(mine), size):
            total += module(**batch(heldout, mine[at : at + size], net.device))
    module.train()
    sums = gather([total], net.device)[:, 0].tolist()
    # Ranks that share a sample (tensor, pipeline, context parallel) each count it.
    copies = len(sums) // ranks
    return math.fsum(sums) / copies / int(heldout.counts[rows, 0].sum())
