"""What a job runs is the code as it was when it was submitted."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hpcdl
from hpcdl import experiment
from hpcdl.errors import UsageError
from hpcdl.launch import __main__ as launch
from hpcdl.launch import frozen
from hpcdl.launch.local import BACKEND as LOCAL
from hpcdl.launch.slurm import BACKEND as SLURM
from hpcdl.runs import query
from hpcdl.runs.spec import read_spec
from tests.factory import tiny_spec
from tests.fake_slurm import FakeSlurm
from tests.launch.making import make_runs, request
from tests.launch.test_code import git

PACKAGE = Path(hpcdl.__file__).parent


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A small package in a checkout of its own."""
    folder = tmp_path / "checkout" / "hpcdl"
    (folder / "sub").mkdir(parents=True)
    (folder / "__init__.py").write_text("x = 1\n")
    (folder / "sub" / "more.py").write_text("y = 2\n")
    git(folder.parent, "init", "-q", "-b", "main")
    git(folder.parent, "add", ".")
    git(folder.parent, "commit", "-qm", "first")
    return folder


def test_the_digest_is_of_what_runs(package: Path) -> None:
    before = frozen.read(package)
    assert list(before.files) == ["hpcdl/__init__.py", "hpcdl/sub/more.py"] and len(before.commit) == 40
    assert not before.changed and before.identity.endswith(f"commit {before.commit[:12]}")
    (package / "__pycache__").mkdir()
    (package / "__pycache__" / "x.cpython-311.pyc").write_bytes(b"compiled")
    (package.parent / "notes.txt").write_text("not in the package")
    assert frozen.read(package).digest == before.digest
    (package / ".env").write_text("TOKEN=1")
    (package / "weights.bin").write_bytes(bytes(frozen.LARGEST_FILE + 1))
    (package / "new.py").write_text("z = 3\n")  # nobody has told git of it
    after = frozen.read(package)
    assert after.digest != before.digest and "hpcdl/new.py" in after.files
    assert after.left_out == ("hpcdl/.env", "hpcdl/weights.bin") and after.identity.endswith(" and changes")
    (package / "new.py").unlink()
    assert frozen.read(package).digest == before.digest
    (package / "sub" / "more.py").rename(package / "more.py")
    assert frozen.read(package).digest != before.digest


def test_a_copy_is_whole_and_made_once(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = frozen.read(package)
    monkeypatch.setattr(frozen, "here", lambda: found)
    folder = frozen.folder_in(tmp_path / "runs")
    assert folder == tmp_path / "runs" / ".code" / found.digest
    (package / "sub" / "more.py").write_text("edited after it was read\n")
    frozen.write(folder)
    assert frozen.read(folder / "hpcdl").digest == found.digest
    assert json.loads((folder / "about.json").read_text())["identity"] == found.identity
    (folder / "about.json").write_text("it is not made anew")
    frozen.write(folder)
    assert (folder / "about.json").read_text() == "it is not made anew"
    assert [path.name for path in folder.parent.iterdir()] == [found.digest], "nothing half-made is left"
    folder.chmod(0o777)
    with pytest.raises(UsageError, match="everybody may write in it"):
        frozen.write(folder)


def test_a_full_disk_leaves_no_half_copy(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = frozen.read(package)
    monkeypatch.setattr(frozen, "here", lambda: found)
    monkeypatch.setattr(
        os, "utime", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        frozen.write(tmp_path / ".code" / found.digest)
    assert list((tmp_path / ".code").iterdir()) == []


def test_the_spec_says_which_code_and_the_run_id_does_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path / "slurm")
    slurm.set()
    for key, value in slurm.environment.items():
        monkeypatch.setenv(key, value)
    runs_dir = tmp_path / "runs"
    assert launch.main(["+experiment=pretrain_tiny", "cluster=slurm", f"runs_dir={runs_dir}"]) == 0
    (run,) = query.find("pretrain_tiny", runs_dir)
    spec = read_spec(run.spec_file)
    assert spec.code == frozen.identity()
    assert experiment.digest(spec) == experiment.digest(dataclasses.replace(spec, code=None)) == run.path.name
    (copy,) = (runs_dir / ".code").iterdir()
    assert (copy / "hpcdl" / "worker" / "main.py").read_bytes() == (
        PACKAGE / "worker" / "main.py"
    ).read_bytes()
    (call,) = slurm.calls("sbatch")
    assert f"HPCDL_CODE={copy}\n" in call["script"]
    assert (copy / "conf" / "config.yaml").is_file() and (copy / "slurm" / "torchrun.sbatch").is_file()
    assert experiment.digest(tiny_spec(code="x")) == experiment.digest(tiny_spec())


@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_a_job_runs_the_code_of_its_submission(backend: str, tmp_path: Path, slurm: FakeSlurm) -> None:
    """The checkout changes while the job waits, and the job is started in it; then the copy is lost."""
    checkout = tmp_path / "check out"
    shutil.copytree(PACKAGE, checkout / "hpcdl", ignore=shutil.ignore_patterns("__pycache__"))
    runs_dir = tmp_path / "my runs"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    make = f"from hpcdl.launch import frozen; from pathlib import Path; f = frozen.folder_in(Path({str(runs_dir)!r}))"
    done = _python(f"{make}; frozen.write(f); print(f)", environment)
    copy = Path(done.stdout.strip())
    asked = request(runs_dir=runs_dir, python=sys.executable, kind=backend, code=copy)
    make_runs(runs_dir, asked.cluster, state="COMPLETED")
    script = tmp_path / "job.sh"
    script.write_text((SLURM if backend == "slurm" else LOCAL).render(asked))
    (checkout / "hpcdl" / "launch" / "job.py").write_text("raise SystemExit('this is newer code')\n")

    def job() -> subprocess.CompletedProcess[str]:
        more = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n1", "SLURM_ARRAY_TASK_ID": "0"}
        more = more if backend == "slurm" else {}
        command: list[Any] = ["bash", script]
        return subprocess.run(
            command, env={**environment, **more}, cwd=checkout, capture_output=True, text=True, timeout=60
        )

    done = job()
    assert (done.returncode, done.stderr) == (0, "")
    shutil.rmtree(copy)
    assert "this is newer code" in job().stderr
    shutil.copy(PACKAGE / "launch" / "job.py", checkout / "hpcdl" / "launch" / "job.py")
    done = job()
    assert done.returncode == 2 and f"submitted with the code in {copy}, which is gone" in done.stderr


def _python(line: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", line]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=True)


def test_other_code_than_the_submissions_is_refused(tmp_path: Path) -> None:
    frozen.require({})
    frozen.require({"HPCDL_CODE": str(PACKAGE.parent)})
    with pytest.raises(UsageError, match=r"which is not found first; it runs .*\nfix: launch again"):
        frozen.require({"HPCDL_CODE": str(tmp_path)})
