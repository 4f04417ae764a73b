"""Secrets and permissions while a job runs, and every word of a script quoted: with bash, on the fake Slurm."""

from __future__ import annotations

import os
import random
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdl import experiment
from hpcdl.launch import scratch
from hpcdl.launch.local import BACKEND as LOCAL
from hpcdl.launch.slurm import BACKEND as SLURM
from hpcdl.runs.store import RunDir
from tests.factory import tiny_plain
from tests.fake_slurm import FakeSlurm
from tests.launch.making import Agents, make_runs, request

SECRET = 'sesame "öffne" dich\\1'


def written(folder: Path) -> dict[Path, str]:
    """What stands in every file below a folder."""
    return {path: path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}


def modes(folder: Path) -> dict[str, str]:
    """Files and folders that others than their owner may read."""
    found = {path: stat.S_IMODE(path.lstat().st_mode) for path in (folder, *folder.rglob("*"))}
    return {str(path): oct(mode) for path, mode in found.items() if mode & 0o077 and not path.is_symlink()}


def test_a_worker_that_prints_its_environment(agents: Agents) -> None:
    """The log has everything but the secrets; the files are private, whatever the umask."""
    run = agents.make("print")
    for folder in (agents.runs_dir, run.path, run.path.parent, *(agents.runs_dir / ".submissions").iterdir()):
        folder.chmod(0o700)
    file = agents.runs_dir / "secrets.env"
    file.write_text("LAB_PASSWORD='from the file'\n")
    file.chmod(0o600)
    before = os.umask(0)
    try:
        code, said = agents.end(agents.start(HF_TOKEN=SECRET, HPCDL_SECRETS=str(file), HARMLESS="stays"))
    finally:
        os.umask(before)
    file.unlink()
    assert (code, run.read_state().state) == (3, "FAILED")
    log = agents.log()
    assert "HARMLESS=stays" in log and "HF_TOKEN=[hidden]" in log and "LAB_PASSWORD=[hidden]" in log
    assert "401 for [hidden]" in log
    everything = {**written(agents.runs_dir), Path("stderr"): said}
    assert not [path for path, text in everything.items() if "öffne" in text or "from the file" in text]
    left = modes(run.path)
    assert not {path for path in left if not path.endswith(("runs.txt", "spec.yaml", "state.json"))}, left


def test_a_file_of_secrets_that_others_can_read_ends_the_run(agents: Agents) -> None:
    run = agents.make("finish")
    file = agents.runs_dir / "secrets.env"
    file.write_text("HF_TOKEN=abcdefgh\n")
    file.chmod(0o644)
    code, _ = agents.end(agents.start(HPCDL_SECRETS=str(file)))
    assert code == 1 and "can be read by others than you" in run.read_state().reason


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("which", ["run", "submission"])
def test_another_users_run_is_refused_by_the_agent(which: str, agents: Agents) -> None:
    run = agents.make("finish")
    path = run.path if which == "run" else next((agents.runs_dir / ".submissions").iterdir())
    os.chown(path, 54321, -1)
    code, said = agents.end(agents.start())
    assert code == 2 and "hpcdl runs your own only" in said
    assert run.read_state().state == "PENDING" and not (run.path / "pid-0").exists()


def test_caches_of_code_are_where_nobody_else_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    own = tmp_path / f"hpcdl-{os.geteuid()}"
    assert scratch.caches({}) == {scratch.CACHE: str(own / "inductor")}
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o777)
    assert scratch.caches({}) == {scratch.CACHE: f"{tmp_path}/home/.cache/hpcdl/inductor"}
    own.rmdir()
    (tmp_path / "theirs").mkdir()
    own.symlink_to(tmp_path / "theirs")
    assert "home" in scratch.caches({})[scratch.CACHE]
    assert scratch.caches({scratch.CACHE: "/mine"}) == {}


# --- every word quoted -------------------------------------------------------------------------------------------

NASTY = (
    *(
        "two words",
        "it's",
        'say "x"',
        "$(touch MARK)",
        "`touch MARK`",
        "$HOME",
        "a;touch MARK",
        "a|b&c",
        "a>MARK",
    ),
    *(
        "한국어 실험",
        "-rf",
        "--wrap=touch MARK",
        "100%",
        "%A_%a",
        "a#b",
        "*",
        "[a-z]?",
        "~",
        "{a,b}",
        "!!",
        "a\\b",
    ),
    *(
        "tab\there",
        "trailing ",
        "\u2028line",
        "naïve\x85",
        "$'x'",
        "'\"'\"'",
        "\\",
        "(x)",
        "=x",
        "#SBATCH --wrap=x",
    ),
)
ALPHABET = " '\"$`\\;|&<>()[]{}*?!#~%^=,:@-_aZ9é한\t"


def words() -> list[str]:
    """Those, and some that a seeded die has thrown."""
    die = random.Random(7)
    return [*NASTY, *("x" + "".join(die.choices(ALPHABET, k=die.randint(1, 12))) for _ in range(20))]


def paths(folder: Path) -> list[Path]:
    """Folders whose paths hold several of these words each."""
    found = [word for word in words() if "/" not in word and len(word.encode()) < 200]
    return [folder.joinpath(*found[start : start + 12]) for start in range(0, len(found), 12)]


def python_in(folder: Path, text: str) -> Path:
    """A program called python, in a folder that is made for it."""
    folder.mkdir(parents=True)
    python = folder / "python"
    python.write_text(f"#!/bin/bash\n{text}\n")
    python.chmod(0o755)
    return python


def test_words_come_through_bash_as_they_are(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Run directories, Pythons and srun options that would do something if bash read them."""
    slurm.set(srun_exit=0)
    options = tuple(f"--comment={word}" for word in words())
    environment = {**os.environ, "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n1", "SLURM_ARRAY_TASK_ID": "0"}
    for folder in paths(tmp_path / "place"):
        python = python_in(folder, f'exec {shlex.quote(sys.executable)} "$@"')
        asked = request(runs_dir=folder, python=str(python), srun_args=options, time_min=5)
        make_runs(folder, asked.cluster, state="COMPLETED")
        script = tmp_path / "job.sh"
        script.write_text(SLURM.render(asked))
        (slurm.folder / "srun.jsonl").unlink(missing_ok=True)
        command = ["bash", script]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (folder, done.stderr)
        (call,) = slurm.calls("srun")
        at = call["argv"].index(options[0])
        assert tuple(call["argv"][at : at + len(options)]) == options
        assert call["argv"][-2:] == ["hpcdl.launch.job", str(asked.folder / "runs.txt")]
    assert not list(tmp_path.rglob("MARK*"))


def test_words_come_through_the_local_script(tmp_path: Path) -> None:
    argv = tmp_path / "argv"
    for folder in paths(tmp_path / "place"):
        python = python_in(folder, f'printf "%s\\0" "$0" "$@" > {shlex.quote(str(argv))}')
        asked = request(runs_dir=folder, python=str(python), kind="local")
        command = ["bash", "-c", LOCAL.render(asked)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, (folder, done.stderr)
        expected = [str(python), "-m", "hpcdl.launch.job", str(asked.folder / "runs.txt"), "0", ""]
        assert argv.read_text().split("\0") == expected
    assert not list(tmp_path.rglob("MARK*"))


def test_a_line_break_is_refused_wherever_a_line_is_made() -> None:
    for key in ("setup", "extra", "srun_args"):
        faults = experiment.check(tiny_plain(**{f"cluster__{key}": ["--x\ntouch MARK"]})).faults
        assert [fault.key for fault in faults] == [f"cluster.{key}.0"]
    for key, value in (
        ("env", {"A": "x\ny"}),
        ("python", "x\ny"),
        ("python", "--version"),
        ("account", "a\nb"),
    ):
        faults = experiment.check(tiny_plain(cluster__kind="slurm", **{f"cluster__{key}": value})).faults
        assert faults and faults[0].key.startswith(f"cluster.{key}")
    refused = {**tiny_plain(cluster__kind="slurm"), "runs_dir": "a\\b"}
    assert [fault.key for fault in experiment.check(refused).faults] == ["runs_dir"]
    for key, value in (("name", "a\nb"), ("runs_dir", "a\nb"), ("name", "$(x)"), ("name", "-rf")):
        assert [fault.key for fault in experiment.check({**tiny_plain(), key: value}).faults] == [key]


def test_a_path_of_runs_with_strange_line_ends(agents: Agents, tmp_path: Path) -> None:
    """Characters that Python's splitlines() takes for the end of a line."""
    agents.runs_dir = tmp_path / "a\u2028b\x85c\x1cd"
    run: RunDir = agents.make("finish")
    assert agents.end(agents.start())[0] == 0
    assert run.read_state().state == "COMPLETED"
