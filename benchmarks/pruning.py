"""What half of SmolLM2-135M's weights are worth: held-out perplexity by method and pattern.

    python benchmarks/pruning.py [--samples 32] [--methods …] [--patterns …] [--plot FILE] [--json FILE]

Prunes the linear layers of all blocks once, without training on, by each method: magnitude, Wanda, SparseGPT and
Optimal Brain Damage; half of the weights, anywhere in a matrix, 2 of 4 neighbours, 4 of 8. Calibration is on
training text, perplexity on held-out text (data=pydoc). Passes are in bf16, statistics and solvers in fp32. Exits
with 1 where Wanda or SparseGPT isn't clearly better than magnitude.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _results import leave
from torch import Tensor

from hpcdl.compress import prune, quant
from hpcdl.compress.prune import _language, _masks, obd
from hpcdl.launch import sweep
from hpcdl.launch.compose import Composer
from hpcdl.spec import ExperimentSpec
from hpcdl.worker import model, pruning
from hpcdl.worker.data.prepare import Dataset, open_dataset
from hpcdl.worker.metrics import resident_peak_bytes
from hpcdl.worker.network import Network
from hpcdl.worker.tools.eval import evaluate

METHODS = ("magnitude", "obd", "wanda", "sparsegpt")
PATTERNS = ("unstructured", "4:8", "2:4")
CLEARLY = 0.8
"""Perplexity over magnitude's, at most."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """A pruned model."""

    method: str
    pattern: str
    sparsity: float
    perplexity: float
    seconds: float
    """That pruning took."""


class Subject:
    """The model, whose weights come back between methods."""

    def __init__(self, spec: ExperimentSpec, samples: int) -> None:
        place = model.weights_place(spec.model)
        self.spec = spec
        self.data: Dataset = open_dataset(spec, model.tokenizer_for(spec.model, place))
        self.net = Network(model=model.load(spec, place).eval(), autocast=True, device=CPU)
        self.layers = _masks.linears(self.net.model)
        self.text = pruning.calibration(self.data.train, samples, spec.seed)
        self._dense = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        self._diagonal: dict[str, Tensor] | None = None

    def restore(self) -> None:
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.copy_(self._dense[name])

    def prune(self, method: str, pattern: str) -> None:
        """As `prune=METHOD prune.pattern=PATTERN` does; OBD's diagonal is of the dense model and estimated once."""
        keys: dict[str, Any] = {"calibration_samples": len(self.text)} if prune.get(method).CALIBRATED else {}
        config = prune.get(method).Config(name=method, pattern=pattern, **keys)
        with self.net.context():
            if method != "obd":
                prune.get(method).apply(config, self.net.model, self.text)
                return
            if self._diagonal is None:
                self._diagonal = _language.diagonal(
                    self.net.model, self.layers, self.text, config.hessian, config.probes
                )
        found = self._diagonal
        _masks.prune_by(
            config, self.layers, lambda name, layer: obd.saliency(layer.weight.detach(), found[name])
        )

    def perplexity(self) -> float:
        return math.exp(min(evaluate(self.spec, self.net, self.data.heldout)["loss"], 700.0))


def measure(subject: Subject, methods: list[str], patterns: list[str]) -> list[Row]:
    """The dense model first."""
    rows = [Row("dense", "", 0.0, subject.perplexity(), 0.0)]
    show(rows[-1])
    for method in methods:
        for pattern in patterns:
            subject.restore()
            started = time.perf_counter()
            subject.prune(method, pattern)
            took = time.perf_counter() - started
            rows.append(Row(method, pattern, _masks.sparsity(subject.layers), subject.perplexity(), took))
            show(rows[-1])
    return rows


def show(row: Row) -> None:
    print(
        f"{row.method:<10} {row.pattern:<13} {row.perplexity:10.2f} {row.seconds:7.1f} s",
        file=sys.stderr,
        flush=True,
    )


def table(rows: list[Row], patterns: list[str]) -> str:
    """Markdown."""
    lines = [
        "| method | "
        + " | ".join(f"50 %, {p}" if p == "unstructured" else p for p in patterns)
        + " | seconds to prune |",
        "|---|" + "---|" * (len(patterns) + 1),
        f"| dense | {rows[0].perplexity:.2f} |" + " |" * len(patterns),
    ]
    for method in dict.fromkeys(row.method for row in rows[1:]):
        mine = {row.pattern: row for row in rows if row.method == method}
        seconds = [mine[p].seconds for p in patterns]
        cells = [f"{mine[p].perplexity:.2f}" for p in patterns] + [f"{min(seconds):.0f}–{max(seconds):.0f}"]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], patterns: list[str], path: Path) -> None:
    """Bars of perplexity, a group a pattern."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(row.method for row in rows[1:]))
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for number, method in enumerate(methods):
        mine = {row.pattern: row.perplexity for row in rows if row.method == method}
        places = [k + (number - (len(methods) - 1) / 2) * 0.2 for k in range(len(patterns))]
        bars = axis.bar(places, [mine[p] for p in patterns], 0.19, label=method)
        axis.bar_label(
            bars,
            labels=[f"{value:,.0f}" if value >= 100 else f"{value:.1f}" for value in bars.datavalues],
            fontsize=8,
        )
    axis.axhline(rows[0].perplexity, color="k", linestyle="--", label=f"dense, {rows[0].perplexity:.2f}")
    axis.set_yscale("log")
    axis.set_xticks(
        range(len(patterns)), ["50 % unstructured" if p == "unstructured" else p for p in patterns]
    )
    axis.set_ylabel("held-out perplexity")
    axis.set_title("SmolLM2-135M, half of the blocks' weights taken out, not retrained")
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def worse(rows: list[Row]) -> list[str]:
    """Where a calibrated method isn't clearly better than magnitude."""
    by = {(row.method, row.pattern): row.perplexity for row in rows}
    return [
        f"{method}, {pattern}: {by[method, pattern]:.2f} against magnitude's {plain:.2f}"
        for (name, pattern), plain in by.items()
        if name == "magnitude"
        for method in ("wanda", "sparsegpt")
        if by.get((method, pattern), 0.0) > CLEARLY * plain
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of 256 tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--eval-samples", type=int, default=64, help="held-out sequences, at most")
    parser.add_argument(
        "--plot", type=Path, default=Path(__file__).parents[1] / "docs" / "plots" / "pruning.png"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", help="of the experiment: model=…, data=…, seed=1")
    args = parser.parse_args()
    base = (
        "model=smollm2_135m",
        "data=pydoc",
        "trainer.precision=bf16",
        f"trainer.eval_samples={args.eval_samples}",
    )
    spec = sweep.read(Composer(), (*base, *args.overrides), multirun=False).points[0].spec
    started = time.perf_counter()
    quant.hide_unused(())  # transformers would import them
    subject = Subject(spec, args.samples)
    print(
        f"{spec.model.name}: {len(subject.data.heldout)} held-out sequences of {spec.data.seq_len} tokens there"
    )
    rows = measure(subject, args.methods, args.patterns)
    print("\n" + table(rows, args.patterns))
    draw(rows, args.patterns, args.plot)
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(
        f"\n{args.samples} × {spec.data.seq_len} tokens of calibration, {torch.get_num_threads()} threads,"
        f" {resident_peak_bytes() / 2**30:.2f} GiB at the peak, {time.perf_counter() - started:.0f} s; {args.plot}"
    )
    for line in worse(rows):
        print(f"NOT CLEARLY BETTER: {line}")
    goal = f"Wanda and SparseGPT at most {CLEARLY} × magnitude's perplexity"
    leave([asdict(row) for row in rows], [(goal, not worse(rows))])
    return 1 if worse(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
