"""What few bits cost and save: perplexity, size, memory and speed of SmolLM2-135M under each scheme.

    python benchmarks/quantization.py [--samples 32] [--steps 20] [--only int4] [--anew] [--write docs/quantization.md]

Every row is what its commands give: `hpcdl quantize` writes a folder, and `hpcdl eval` in a process of its own
reads it, so that peak memory is that of running the model and not of quantizing it. The last three rows are
models trained for a few steps: as they are, rounded afterwards, and trained through the rounding. Rows are kept in
--work and made once; the table of all that are there is written between the markers of --write.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _markers import put
from _results import leave

from hpcdl.worker.cache import cache_dir

BEGIN, END = "<!-- table: begin (benchmarks/quantization.py) -->", "<!-- table: end -->"
MODEL = "smollm2_135m"


@dataclass(frozen=True)
class Row:
    """A model to measure."""

    name: str
    quantize: tuple[str, ...] = ()
    """Overrides of `hpcdl quantize`; none: the model as it is."""
    train: tuple[str, ...] | None = None
    """Overrides of the training before it; None: none."""
    precision: str = "bf16"


def rows(calibration: int) -> list[Row]:
    """All rows, in the order of the table."""
    return [
        Row("none, fp32", precision="fp32"),
        Row("none, bf16"),
        Row("int8", ("quant=int8",)),
        Row("int8, head int8", ("quant=int8", "quant.head=int8")),
        Row("int8_dynamic", ("quant=int8_dynamic",)),
        Row("nf4", ("quant=nf4",)),
        Row("nf4, head int8", ("quant=nf4", "quant.head=int8")),
        Row("nf4, head nf4", ("quant=nf4", "quant.head=nf4")),
        Row("fp4", ("quant=fp4",)),
        Row("int4, to the nearest", ("quant=int4",)),
        Row(
            f"int4, calibrated on {calibration} sequences",
            ("quant=int4", f"quant.calibration_samples={calibration}"),
        ),
        Row("trained, bf16", train=()),
        Row("trained, then int4", ("quant=int4",), train=()),
        Row("trained through int4 (qat)", ("quant=int4",), train=("quant=int4", "quant.qat=true")),
    ]


class Bench:
    """Runs the commands; keeps models and results in a folder."""

    def __init__(self, work: Path, options: argparse.Namespace) -> None:
        self.work = work
        self.samples, self.steps, self.threads = options.samples, options.steps, options.threads
        work.mkdir(parents=True, exist_ok=True)

    def measure(self, row: Row) -> dict[str, Any]:
        """A row's figures, from the folder where it was measured before with as many samples and steps."""
        kept = self.work / f"{slug(row.name)}-{self.samples}{f'-{self.steps}' * (row.train is not None)}.json"
        if kept.exists():
            return dict(json.loads(kept.read_text()))
        started = time.perf_counter()
        model = MODEL if row.train is None else self.train(row.train)
        if row.quantize:
            folder = self.work / slug(row.name)
            said = [
                "quantize",
                model,
                *row.quantize,
                "data=pydoc",
                "data.seq_len=256",
                "--out",
                str(folder),
                "--force",
            ]
            self.hpcdl(*said, *self.common())
            model = str(folder)
        found = dict(self.hpcdl("eval", model, f"trainer.precision={row.precision}", *self.evaluation()))
        if row.quantize:
            shutil.rmtree(model)
        found |= {"name": row.name, "seconds": round(time.perf_counter() - started, 1)}
        kept.write_text(json.dumps(found, indent=1))
        return found

    def common(self) -> list[str]:
        return [f"trainer.threads_per_process={self.threads}"]

    def evaluation(self) -> list[str]:
        return ["data=pydoc", "data.seq_len=256", f"trainer.eval_samples={self.samples}", *self.common()]

    def train(self, more: tuple[str, ...]) -> str:
        """A model trained for a few steps; its folder."""
        name = "qat" if more else "plain"
        said = [
            f"model={MODEL}", "peft=none", *more, f"name={name}", f"trainer.max_steps={self.steps}",
            "trainer.global_batch_size=8", "trainer.micro_batch_size=4", "trainer.precision=bf16",
            "trainer.activation_checkpointing=full", "optim.lr=2e-5", "optim.warmup_steps=2",
            "task.sample_prompt=''", f"runs_dir={self.work / 'runs'}", "parsable=true", *self.evaluation(),
        ]  # fmt: skip
        out = run("launch", *said)
        folder = Path(out.strip().splitlines()[-1].split("\t")[2])
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # 1.6 GB that nobody asks for
        return str(json.loads((folder / "result.json").read_text())["model"])

    def hpcdl(self, *arguments: str) -> Any:
        return json.loads(run(*arguments, "--json"))


def run(*arguments: str) -> str:
    """A command's standard output; what it says beside it goes on to the terminal."""
    command = [sys.executable, "-m", "hpcdl", *arguments]
    print("$ hpcdl " + " ".join(arguments), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {' '.join(command)}\n{done.stdout[-2000:]}")
    return done.stdout


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


def table(found: list[dict[str, Any]], steps: int) -> str:
    """Markdown."""
    lines = [
        "| scheme | perplexity | MiB on disk | MiB of weights | peak MiB | tokens/s read | tokens/s written |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        name = one["name"].replace("trained", f"trained for {steps} steps")
        sizes = [f"{one[key] / 2**20:,.0f}" for key in ("disk_bytes", "weights_bytes", "peak_rss_bytes")]
        speeds = [f"{one[key]:,.0f}" for key in ("eval_tokens_per_s", "decode_tokens_per_s")]
        lines.append(f"| {name} | {one['eval_perplexity']:.3f} | {' | '.join(sizes + speeds)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--samples", type=int, default=32, help="held-out sequences of 256 tokens (32)")
    parser.add_argument(
        "--calibration", type=int, default=32, help="sequences that int4 is calibrated on (32)"
    )
    parser.add_argument(
        "--steps", type=int, default=20, help="training steps of the last three rows; 0: leave them out"
    )
    parser.add_argument("--threads", type=int, default=0, help="of each process; 0: all cores")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORD", help="rows whose name has this word"
    )
    parser.add_argument("--anew", action="store_true", help="measure again what was measured before")
    parser.add_argument("--work", type=Path, default=cache_dir() / "benchmarks" / "quantization")
    parser.add_argument(
        "--write", type=Path, metavar="FILE.md", help="put the table between this file's markers"
    )
    options = parser.parse_args()
    if options.anew:
        shutil.rmtree(options.work, ignore_errors=True)
    bench = Bench(options.work, options)
    wanted = [
        row
        for row in rows(options.calibration)
        if (options.steps or row.train is None)
        and (not options.only or any(word in row.name for word in options.only))
    ]
    found = [bench.measure(row) for row in wanted]
    made = table(found, options.steps)
    print(made)
    leave(found, [])
    if options.write:
        put(options.write, made, BEGIN, END)


if __name__ == "__main__":
    main()
