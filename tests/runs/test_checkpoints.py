"""hpcdl checkpoints: what is there, what it is kept as, whether it is whole; on a login node without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcdl.cli import main
from hpcdl.runs.files import write_json
from hpcdl.runs.store import RunDir
from hpcdl.spec.checkpoint import TRAINER, Damage, look, read, seal
from hpcdl.spec.plain import dump_yaml
from tests import checkpoints
from tests.runs.making import make_run

HELDOUT = {2: 1.5, 4: 2.5, 6: 2.25}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = make_run(tmp_path, state="RUNNING", kind="local")
    run.spec_file.write_text(dump_yaml({"trainer": {"keep_last": 2, "keep_best": 1}}))
    for step, loss in HELDOUT.items():
        checkpoints.make(run.checkpoints, step, heldout_loss=loss, saved="2026-01-31T12:00:00.000+00:00")
    return run


def asked(run: RunDir, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    code = main(["checkpoints", run.path.name, "--runs-dir", str(run.runs_dir), *options])
    return code, capsys.readouterr().out


def listed(run: RunDir, capsys: pytest.CaptureFixture[str], *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(asked(run, capsys, "--json", *options)[1])
    return found


def test_all_that_is_known_of_each(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(run, capsys)
    assert [each["step"] for each in found] == [2, 4, 6]
    assert [each["kept"] for each in found] == [["best"], ["last"], ["last"]]
    assert [each["heldout_loss"] for each in found] == [1.5, 2.5, 2.25]
    first = found[0]
    assert first["path"] == str(run.checkpoints / "step-00000002") and first["ranks"] == 2
    assert (first["state"], first["verified"], first["has_checksums"], first["damage"]) == (
        "whole", False, True, [],
    )  # fmt: skip
    assert first["bytes"] == sum(path.stat().st_size for path in Path(first["path"]).iterdir())
    assert first["saved"].startswith("2026-01-31") and first["age_s"] > 0
    assert all(each["verified"] for each in listed(run, capsys, "--verify"))


def test_the_list_in_words(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints.flip(run.checkpoints / "step-00000006" / "__1_0.distcp")
    code, text = asked(run, capsys, "--verify")
    assert code == 1
    lines = text.splitlines()
    assert lines[0].split() == ["step", "age", "size", "ranks", "held-out", "loss", "kept", "as", "state"]
    assert "1.5000" in lines[1] and "best" in lines[1] and lines[1].rstrip().endswith("whole, verified")
    assert "corrupt: __1_0.distcp has CRC-32" in lines[3] and "when it was written" in lines[3]
    assert "goes on from step 4" in lines[4]
    code, text = asked(run, capsys)
    assert code == 0 and "whole by its files' lengths" in text, "a changed byte is seen by --verify only"


def test_a_run_without_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, state="RUNNING", kind="local")
    run.spec_file.write_text(dump_yaml({"trainer": {"keep_last": 2}}))
    assert asked(run, capsys) == (0, "aaaa11112222 has no checkpoint\n")
    assert listed(run, capsys, "--verify") == []


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def sealed_anew(file: Path, **changes: Any) -> None:
    write_json(file, seal({**json.loads(file.read_text()), **changes}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "cut": (lambda p: cut(p / "__0_0.distcp"), "torn", "__0_0.distcp", "has 26 bytes, and 27 when"),
    "gone": (lambda p: (p / ".metadata").unlink(), "torn", ".metadata", "is missing"),
    "changed": (lambda p: checkpoints.flip(p / "__1_0.distcp"), "corrupt", "__1_0.distcp", "has CRC-32"),
    "no_record": (lambda p: (p / TRAINER).unlink(), "torn", TRAINER, "is missing"),
    "empty_record": (lambda p: (p / TRAINER).write_text(""), "corrupt", TRAINER, "is no JSON"),
    "half_a_record": (lambda p: cut(p / TRAINER), "whole", "", ""),  # a line's end: the same JSON
    "another_step": (
        lambda p: (p / TRAINER).write_text((p / TRAINER).read_text().replace('"step": 6', '"step": 8')),
        "corrupt", TRAINER, "has another checksum",
    ),
    "no_checkpoint": (lambda p: (p / TRAINER).write_text("[1]"), "corrupt", TRAINER, "is no checkpoint's"),
    "way_out": (
        lambda p: sealed_anew(p / TRAINER, files={"../../spec.yaml": 1}), "corrupt", TRAINER, "is no checkpoint's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damages_are_told_with_the_file(run: RunDir, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    do, state, file, problem = DAMAGES[damage]
    do(run.checkpoints / "step-00000006")
    last = listed(run, capsys, "--verify")[-1]
    assert last["state"] == state
    if state == "whole":
        return
    assert [(d["file"], problem in d["problem"]) for d in last["damage"]] == [(file, True)]
    assert last["kept"] == [] and not last["verified"]
    assert listed(run, capsys, "--verify")[1]["kept"] == ["last"]


def test_what_was_saved_without_checksums_is_read_on_trust(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run.checkpoints / "step-00000006"
    record = json.loads((path / TRAINER).read_text())
    old = {k: v for k, v in record.items() if k not in ("seal", "crc32", "saved", "heldout_loss")}
    (path / TRAINER).write_text(json.dumps(old))
    found = read(path)
    assert found is not None and found.step == 6 and not found.has_checksums and found.heldout_loss is None
    last = listed(run, capsys, "--verify")[-1]
    assert (last["state"], last["verified"], last["has_checksums"]) == ("whole", False, False)
    cut(path / "__0_0.distcp")
    assert isinstance(look(path), Damage)


def test_without_torch(run: RunDir) -> None:
    """On a login node that hasn't got it."""
    code = f"""
import sys
for name in ("torch", "numpy", "transformers"):
    sys.modules[name] = None
from hpcdl.cli import main
sys.exit(main(["checkpoints", {run.path.name!r}, "--verify", "--runs-dir", {str(run.runs_dir)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("whole, verified") == 3, done.stderr
