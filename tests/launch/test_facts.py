"""docs/faults.md has a row for each habit of Slurm's that breaks launchers; what the rows name is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").partition("\n## The 25 facts\n")[2]
ROW = re.compile(r"^\| (\d+) \| .* \| (.*) \|$", re.MULTILINE)
NAMED = re.compile(r"`(tests/[\w/]+(?:\.py)?)(?:::(\w+))?`(?:, `::(\w+)`)?")


def test_every_fact_has_its_tests() -> None:
    rows = ROW.findall(TABLE.partition("\n## ")[0])
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    for number, cell in rows:
        found = NAMED.findall(cell)
        assert found, number
        for path, *names in found:
            text = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".py") else ""
            assert (ROOT / path).exists(), (number, path)
            for name in filter(None, names):
                assert f"\ndef {name}(" in text, (number, path, name)


def test_no_output_is_asked_for_that_changes_between_versions() -> None:
    """Fact 16: text with named fields, and only options that Slurm 20.11 has."""
    newer = re.compile(
        r"""["'](?:squeue|sacct|scontrol|sinfo|sbatch|srun)["'][^\]]*--(?:json|yaml|only-job-state|tres-bind)"""
    )
    asking = [
        path for path in (ROOT / "hpcdl").rglob("*.py") if newer.search(path.read_text(encoding="utf-8"))
    ]
    assert asking == []
    assert newer.search('["squeue", "-h", "--json"]'), "the search finds what it is for"
