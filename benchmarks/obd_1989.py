"""Optimal Brain Damage's experiment in spirit: error against parameters deleted, on handwritten digits.

    python benchmarks/obd_1989.py [--seeds 3] [--plots docs/plots] [--json FILE]

Le Cun, Denker & Solla (NIPS 1989) took weights out of a convolutional network that reads handwritten ZIP-code
digits. Here two small networks of the same make (Le Cun's sigmoids, squared error) learn scikit-learn's digits:
1,797 real ones of 8×8 pixels (Alpaydin & Kaynak, UCI). Weights go in the order of their saliency ½·h_kk·w_k²,
with h_kk from the paper's own backward recursion, or in the order of their size; once without retraining (the
paper's figure 1), and once with a few epochs of it after each deletion (figure 2).

- `mlp`: 64-40-10. With one hidden layer the recursion is the exact diagonal.
- `conv`: two layers with shared weights, two without. The recursion is the paper's approximation.

Exits with 1 where OBD with retraining doesn't read more digits than magnitude, over deletions from 50 % on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _results import leave
from torch import Tensor, nn

from hpcdl.compress.prune import obd

FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
EPOCHS, MORE_EPOCHS, BATCH = 80, 8, 64
TRAINED = 1200
"""Digits to learn from; the other 597 are the test."""


class Sigmoid(nn.Module):
    """Le Cun's: 1.7159·tanh(⅔·a), ±1 at ±1."""

    elementwise = True

    def forward(self, a: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(a * (2 / 3))


@dataclass(frozen=True)
class Data:
    """Digits and what they are: inputs `(digits, 1, 8, 8)`, targets ±1 `(digits, 10)`."""

    x: Tensor
    target: Tensor


@dataclass(frozen=True)
class Point:
    """A network after a deletion."""

    network: str
    seed: int
    order: str
    retrained: bool
    deleted: int
    parameters: int
    predicted: float
    """Rise of the training error that the saliencies add up to since the first deletion; without retraining."""
    train_mse: float
    test_mse: float
    test_error: float
    """Share of the test digits that are read wrongly."""


def digits(seed: int) -> tuple[Data, Data]:
    """Training and test digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(seed))
    x = (torch.tensor(found.images, dtype=torch.float32)[order] / 16)[:, None]  # ink is 1, paper 0
    target = nn.functional.one_hot(torch.tensor(found.target)[order].long(), 10).float() * 2 - 1
    return Data(x[:TRAINED], target[:TRAINED]), Data(x[TRAINED:], target[TRAINED:])


def network(kind: str, seed: int) -> nn.Sequential:
    """`mlp` of 3,010 parameters or `conv` of 3,658."""
    torch.manual_seed(seed)
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 40), Sigmoid(), nn.Linear(40, 10), Sigmoid())
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), Sigmoid(), nn.AvgPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), Sigmoid(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), Sigmoid(), nn.Linear(32, 10), Sigmoid(),
    )  # fmt: skip


def train(model: nn.Module, data: Data, epochs: int, rate: float) -> None:
    """Adam on small batches, its rate falling to 0."""
    steps = epochs * -(-len(data.x) // BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(data.x[rows]), data.target[rows]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def errors(model: nn.Module, data: Data) -> tuple[float, float]:
    """Mean squared error, and the share of digits that are read wrongly."""
    out = model(data.x)
    wrong = out.argmax(1) != data.target.argmax(1)
    return float(nn.functional.mse_loss(out, data.target)), float(wrong.float().mean())


def orders(data: Data) -> dict[str, Callable[[nn.Module], Mapping[str, Tensor]]]:
    """What weights are put in order by."""
    batches = [(data.x, data.target)]
    return {
        "obd": lambda model: obd.saliencies(model, nn.MSELoss(), batches, "recursion"),
        "magnitude": lambda model: {name: p.detach().abs() for name, p in model.named_parameters()},
    }


def points(kind: str, seed: int) -> Iterator[Point]:
    """One network, pruned by each order with and without retraining."""
    learned, test = digits(seed)
    trained = network(kind, seed)
    train(trained, learned, EPOCHS, 5e-3)
    for order, saliency_of in orders(learned).items():
        for retrained in (False, True):
            model = network(kind, seed)
            model.load_state_dict(trained.state_dict())
            torch.manual_seed(seed)
            # Without retraining the paper deletes in one order; with it, saliencies are taken anew.
            first = saliency_of(model)
            rounds = obd.prune_and_retrain(
                model,
                saliency_of if retrained else lambda _, first=first: first,  # type: ignore[misc]
                (lambda m: train(m, learned, MORE_EPOCHS, 2e-3)) if retrained else None,
                FRACTIONS,
            )
            predicted = 0.0
            for done in rounds:
                predicted += done.predicted
                (train_mse, _), (test_mse, test_error) = errors(model, learned), errors(model, test)
                yield Point(
                    kind, seed, order, retrained, done.deleted, done.parameters,
                    predicted if order == "obd" and not retrained else float("nan"),
                    train_mse, test_mse, test_error,
                )  # fmt: skip


def fidelity(kind: str, samples: int = 50) -> float:
    """Correlation of the recursion's saliencies with those of the exact Hessian diagonal, of a trained network."""
    learned, _ = digits(0)
    model = network(kind, 0)
    train(model, learned, EPOCHS, 5e-3)
    batches = [(learned.x[:samples], learned.target[:samples])]
    both = [
        torch.cat([s.flatten() for s in obd.saliencies(model, nn.MSELoss(), batches, method).values()])
        for method in ("recursion", "exact")
    ]
    return float(torch.corrcoef(torch.stack(both))[0, 1])


def work(task: tuple[str, str, int]) -> Any:
    """One piece, in a process of its own."""
    torch.set_num_threads(1)
    what, kind, seed = task
    return list(points(kind, seed)) if what == "points" else fidelity(kind)


def averaged(found: list[Point], order: str, retrained: bool, what: str) -> list[float]:
    """Mean over seeds at each fraction."""
    chosen = [p for p in found if p.order == order and p.retrained is retrained]
    deleted = sorted({p.deleted for p in chosen})
    return [mean(getattr(p, what) for p in chosen if p.deleted == d) for d in deleted]


def table(found: list[Point]) -> str:
    """Markdown: a line a fraction."""
    columns = [(retrained, order) for retrained in (False, True) for order in ("obd", "magnitude")]
    lines = [
        "| deleted | not retrained: test MSE, OBD | by size | wrong, OBD | by size"
        " | retrained: test MSE, OBD | by size | wrong, OBD | by size |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for k, fraction in enumerate(FRACTIONS):
        cells = []
        for retrained in (False, True):
            here = [order for flag, order in columns if flag is retrained]
            cells += [f"{averaged(found, order, retrained, 'test_mse')[k]:.3f}" for order in here]
            cells += [f"{averaged(found, order, retrained, 'test_error')[k]:.1%}" for order in here]
        lines.append(f"| {fraction:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(found: list[Point], path: Path, kind: str) -> None:
    """The paper's figures: log of the squared error, and digits read wrongly, against parameters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    total = found[0].parameters
    left = [total - int(total * f + 1e-9) for f in FRACTIONS]
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True)
    for column, retrained in enumerate((False, True)):
        for order, colour, label in (("obd", "C0", "OBD: ½·h·w²"), ("magnitude", "C3", "magnitude: |w|")):
            for row, what in enumerate(("test_mse", "test_error")):
                axes[row][column].plot(
                    left, averaged(found, order, retrained, what), "o-", color=colour, label=label
                )
            if not retrained:
                train_mse = averaged(found, order, retrained, "train_mse")
                axes[0][0].plot(
                    left, train_mse, "--", color=colour, alpha=0.5, label=f"{order}, training set"
                )
        axes[0][column].set_yscale("log")
        axes[0][column].set_title("with retraining" if retrained else "without retraining")
        axes[1][column].set_xlabel(f"parameters left, of {total:,}")
        axes[1][column].set_ylim(0, 0.9 if not retrained else None)
    predicted = [
        averaged(found, "obd", False, "train_mse")[0] + p for p in averaged(found, "obd", False, "predicted")
    ]
    axes[0][0].plot(left, predicted, ":", color="k", label="OBD's prediction")
    axes[0][0].set_ylabel("mean squared error, test")
    axes[1][0].set_ylabel("digits read wrongly, test")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"Optimal Brain Damage (1989) on 8×8 handwritten digits, {kind}")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def better(found: list[Point]) -> bool:
    """Whether OBD with retraining reads more of the test digits, over deletions from 50 % on."""
    most = slice(FRACTIONS.index(0.5), None)
    mine, theirs = (mean(averaged(found, order, True, "test_error")[most]) for order in ("obd", "magnitude"))
    return mine < theirs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=("mlp", "conv"), default=["mlp", "conv"])
    parser.add_argument("--plots", type=Path, default=Path(__file__).parents[1] / "docs" / "plots")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    started = time.perf_counter()
    tasks = [(what, kind, seed) for kind in args.networks for what in ("points", "fidelity")
             for seed in range(args.seeds if what == "points" else 1)]  # fmt: skip
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn")) as pool:
        done = dict(zip(tasks, pool.map(work, tasks), strict=True))
    good, record, goals = True, [], []
    for kind in args.networks:
        found = [p for seed in range(args.seeds) for p in done["points", kind, seed]]
        record += [asdict(p) for p in found]
        total, plot = found[0].parameters, args.plots / f"obd_1989_{kind}.png"
        print(
            f"\n{kind}: {total:,} parameters, {args.seeds} networks, {TRAINED} digits to learn from, 597 to test\n"
        )
        print(table(found))
        correlation = done["fidelity", kind, 0]
        print(f"\nsaliencies by the recursion and by the exact diagonal: correlation {correlation:.4f}")
        draw(found, plot, kind)
        wins = better(found)
        good = good and wins
        goals.append((f"{kind}, with retraining, 50 % deleted and more: OBD reads more digits", wins))
        print(
            f"with retraining, 50 % deleted and more: OBD reads {'more' if wins else 'NO MORE'} digits; {plot}"
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1))
    print(f"{time.perf_counter() - started:.0f} s")
    leave(record, goals)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
