#!/usr/bin/env python3
"""How long a dry run of the launcher takes, beside torchx, submitit, Hydra's submitit launcher, NeMo-Run and sbatch.

    python benchmarks/launch.py --setup     installs the peers once, each in its own environment
    python benchmarks/launch.py             measures

Every command runs once a round, whole process, from start to end; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from _peers import CHECKOUT, HERE, HPCDL, PEERS, Environment, prepare
from _results import Goal, tell
from _timing import Contender, Sample, interleave, machine, mark, markdown, paired_ratio, warm_up

GOAL = 1.5
"""hpcdl may take this many times what torchx takes."""
FORBIDDEN = ("torch", "transformers", "peft", "wandb", "datasets", "numpy", "matplotlib")
"""What the login node never imports."""
OVERRIDES = ("+experiment=lora_llama", "cluster=slurm")
DRY_RUN = ("-m", "hpcdl.launch", *OVERRIDES, "dry_run=true")
WHEEL = "hpcdl (wheel, no torch)"
EDITABLE = "hpcdl (this Python)"


def main() -> int:
    args = arguments()
    missing = prepare(setup=args.setup)
    with tempfile.TemporaryDirectory(prefix="hpcdl-bench-") as scratch:
        contenders = [c for c in all_contenders(Path(scratch)) if c[0] not in missing]
        working, broken = warm_up([contender for _, contender in contenders])
        samples = interleave(working, args.rounds)
        imports = import_check(Path(scratch))
    report = {
        "machine": machine(),
        "rounds": args.rounds,
        "imports": imports,
        "contenders": [row(contender, samples) for contender in working],
        "not_measured": missing | broken,
    }
    return tell(report, as_text(report), goals(report), as_json=args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--setup", action="store_true", help="install what is missing into ~/.cache/hpcdl-bench"
    )
    parser.add_argument("--rounds", type=int, default=15, help="runs of each command (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args()


def all_contenders(scratch: Path) -> list[tuple[str, Contender]]:
    """What is compared, with the name of the environment that it needs; a dry run where the peer has one."""
    (scratch / "main.py").write_text("print('never run')\n")
    home = {"HPCDL_RUNS": str(scratch / "runs"), "NEMORUN_HOME": str(scratch / "nemo"), "HOME": str(scratch)}
    torchx, submitit, hydra, nemo = PEERS

    def script(environment: Environment, name: str, *argv: str) -> tuple[str, ...]:
        return str(environment.bin / "python"), str(HERE / "peers" / name), *argv

    def contender(environment: str, name: str, note: str, *argv: str) -> tuple[str, Contender]:
        return environment, Contender(name=name, argv=argv, cwd=scratch, env=home, note=note)

    torchx_run = ("run", "--dryrun", "-s", "slurm", "dist.ddp", "-j", "2x2", "--script", "main.py")
    compose = ("--config-dir", str(CHECKOUT / "conf"), "--cfg", "all", "hydra/launcher=submitit_slurm")
    return [
        contender(HPCDL.name, WHEEL, "composes, validates, renders", str(HPCDL.bin / "python"), *DRY_RUN),
        contender(
            "",
            EDITABLE,
            f"the same; torch is {'' if has_torch() else 'not '}installed",
            sys.executable,
            *DRY_RUN,
        ),
        contender(torchx.name, "torchx", "its own dry run", str(torchx.bin / "torchx"), *torchx_run),
        contender(
            submitit.name,
            "submitit",
            "makes its executor and the sbatch text; composes no config",
            *script(submitit, "submitit_dry.py", str(scratch / "submitit")),
        ),
        contender(
            hydra.name,
            "hydra-submitit-launcher",
            "composes the same configs and prints them; it has no dry run, so it renders no script",
            *script(hydra, "hydra_app.py", *compose, *OVERRIDES),
        ),
        contender(
            nemo.name,
            "nemo-run",
            "its own dry run",
            *script(nemo, "nemo_dry.py", str(scratch / "nemo-jobs")),
        ),
        contender("", "sbatch", *by_hand(scratch)),
    ]


def by_hand(scratch: Path) -> tuple[str, ...]:
    """A hand-written script, handed in: what it covers, then the command."""
    job = str(HERE / "hand_written" / "job.sbatch")
    if shutil.which("sbatch"):
        return (
            "a hand-written script with --test-only: the controller looks at it",
            "sbatch",
            "--test-only",
            job,
        )
    fake = scratch / "sbatch"
    fake.write_text("#!/bin/sh\ncat >/dev/null\necho Submitted batch job 1\n")
    fake.chmod(0o755)
    return (
        "a hand-written script for an sbatch that only answers: nothing is composed or checked",
        str(fake),
        job,
    )


def has_torch() -> bool:
    """Whether this Python could import torch: only then does it mean something that the launcher doesn't."""
    from importlib.util import find_spec

    return find_spec("torch") is not None


def row(contender: Contender, samples: dict[str, list[Sample]]) -> dict[str, Any]:
    """One contender's medians, and hpcdl's ratio to it, round by round."""
    theirs, ours = samples[contender.name], samples.get(WHEEL) or samples.get(EDITABLE, [])
    line: dict[str, Any] = {
        "name": contender.name,
        "wall_s": median(sample.wall_s for sample in theirs),
        "cpu_s": median(sample.cpu_s for sample in theirs),
        "n": len(theirs),
        "note": contender.note,
    }
    if ours:
        line["ratio_wall"] = asdict(paired_ratio([s.wall_s for s in ours], [s.wall_s for s in theirs]))
        line["ratio_cpu"] = asdict(paired_ratio([s.cpu_s for s in ours], [s.cpu_s for s in theirs]))
    return line


def import_check(scratch: Path) -> dict[str, Any]:
    """What a dry run imports: the forbidden among it, and where the import time goes."""
    env = {**os.environ, "HPCDL_RUNS": str(scratch / "runs")}
    command = [sys.executable, "-X", "importtime", *DRY_RUN]
    done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True)
    if done.returncode:
        return {"fault": f"exit code {done.returncode}: {last_words(done.stderr)}"}
    lines = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", done.stderr, flags=re.MULTILINE)
    packages: Counter[str] = Counter()
    for self_us, module in lines:
        packages[module.partition(".")[0]] += int(self_us)
    return {
        "modules": len(lines),
        "torch_installed": has_torch(),
        "forbidden": sorted(set(packages) & set(FORBIDDEN)),
        "slowest_ms": {name: round(us / 1000, 1) for name, us in packages.most_common(8)},
    }


def last_words(stderr: str) -> str:
    """The end of stderr without the import times."""
    return "\n".join(line for line in stderr.splitlines() if not line.startswith("import time:"))[-500:]


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    head = ["command", "wall s", "CPU s", "hpcdl ÷ it, wall", "hpcdl ÷ it, CPU", "n", ""]
    rows = [
        [
            line["name"],
            f"{line['wall_s']:.3f}",
            f"{line['cpu_s']:.3f}",
            *map(spread, ratios(line)),
            str(line["n"]),
            compared(line),
        ]
        for line in report["contenders"]
    ]
    parts = [
        f"{report['machine']}; {report['rounds']} interleaved rounds; medians, ratios with their quartiles",
        markdown(head, rows),
        "\n".join(f"- {line['name']}: {line['note']}" for line in report["contenders"]),
        import_text(report["imports"]),
    ]
    parts += [f"NOT MEASURED: {name}: {reason}" for name, reason in report["not_measured"].items()]
    parts += [f"goal: {words}: {'met' if met else 'MISSED'}" for words, met in goals(report)]
    return "\n\n".join(parts)


def compared(line: dict[str, Any]) -> str:
    ratio = line.get("ratio_wall")
    return "" if ratio is None or line["name"].startswith("hpcdl") else mark(ratio["low"], ratio["high"])


def ratios(line: dict[str, Any]) -> Sequence[dict[str, Any] | None]:
    return line.get("ratio_wall"), line.get("ratio_cpu")


def spread(ratio: dict[str, Any] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else "-"


def import_text(imports: dict[str, Any]) -> str:
    if "fault" in imports:
        return f"imports: the dry run failed: {imports['fault']}"
    forbidden = ", ".join(imports["forbidden"]) or "none"
    torch = "installed" if imports["torch_installed"] else "NOT installed, so this proves little"
    slowest = ", ".join(f"{name} {ms}" for name, ms in imports["slowest_ms"].items())
    return (
        f"imports: {imports['modules']} modules (torch is {torch} in this Python); forbidden: {forbidden}\n"
        f"  own import time in ms: {slowest}"
    )


def ratio_to_torchx(report: dict[str, Any]) -> dict[str, Any] | None:
    found = [line.get("ratio_wall") for line in report["contenders"] if line["name"].startswith("torchx")]
    return found[0] if found else None


def goals(report: dict[str, Any]) -> list[Goal]:
    """Beside torchx, and what is imported."""
    ratio, imports = ratio_to_torchx(report), report["imports"]
    quick = f"a dry run takes at most {GOAL} × torchx"
    clean = f"a dry run imports none of {', '.join(FORBIDDEN)}"
    return [
        (f"{quick}; not measured", None)
        if ratio is None
        else (f"{quick}; {spread(ratio)}", ratio["median"] <= GOAL),
        (clean, not imports.get("fault") and not imports["forbidden"]),
    ]


if __name__ == "__main__":
    sys.exit(main())
