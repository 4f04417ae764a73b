"""Scripts of random command lines, read by the real sbatch: `--test-only` says what it would do with each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzzing import CLUSTERS, Fuzzed, command_lines
from tests.slurm.cluster import Cluster

SAMPLE = 12
MISREAD = re.compile(
    r"unrecognized option|invalid option|unknown option|invalid directive|ambiguous|DOS line", re.IGNORECASE
)
"""sbatch says so of a script that isn't written as it reads them; a request that can't be met it refuses otherwise."""
ON = "cluster=slurm_docker"
OWN = re.compile(r"(?m)^#SBATCH --(comment|output)=.*|HPCDL_RUNS_FILE=.*")
TAKEN = re.compile(r"Job \d+ to start at")


def test_sbatch_reads_every_script(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = drawn(tmp_path, monkeypatch)
    assert len(scripts) >= SAMPLE, len(scripts)
    each = (
        'for text; do printf %s "$text" > drawn.sh; echo "== script"; sbatch --test-only drawn.sh 2>&1; done'
    )
    answers = cluster.run("bash", "-c", each, "bash", *scripts[:SAMPLE], check=False).stdout.split(
        "== script\n"
    )[1:]
    assert len(answers) == SAMPLE and all(answers), answers
    for script, answer in zip(scripts, answers, strict=False):
        assert not MISREAD.search(answer), f"{answer}\n{script[:2000]}"
    taken = [answer for answer in answers if TAKEN.search(answer)]
    assert len(taken) >= SAMPLE // 2, f"too few were taken to mean much:\n{''.join(answers)}"


def drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Different scripts of a few dozen command lines, the same ones each time."""
    monkeypatch.chdir(folder)
    launch, found = Fuzzed(monkeypatch), dict[str, str]()

    @settings(
        max_examples=250,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(command_lines(wild=False, below="cluster."))
    def draw(argv: list[str]) -> None:
        answer = launch([ON if word in CLUSTERS else word for word in argv])
        # Two that ask for the same are one: the comment and the output file hold the run's own token.
        found.update((OWN.sub("", script), script) for script in answer.scripts)

    draw()
    return list(found.values())
