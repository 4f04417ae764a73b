"""The `hpcdl` command as its users meet it: words, exit codes, and what it costs to start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdl import cli
from tests.runs.making import add_steps, make_run


@pytest.fixture
def runs_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("HPCDL_RUNS", str(folder))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return folder


def test_status_of_one_and_of_many(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(runs_dir, state="COMPLETED", kind="local", submission=None)
    add_steps(run, range(1, 4))
    assert cli.main(["status", "aaaa", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert cli.main(["status", "--json"]) == 0
    assert [one["run_id"] for one in json.loads(capsys.readouterr().out)] == ["aaaa11112222"]
    assert cli.main(["status"]) == 0
    assert "1 COMPLETED" in capsys.readouterr().out
    assert cli.main(["status", "latest"]) == 0
    assert str(run.path) in capsys.readouterr().out


def test_status_of_one_is_an_object_and_of_an_array_a_list(
    runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(2):
        make_run(runs_dir, f"{i:012}", state="COMPLETED", job_id=f"5_{i}")
    cli.main(["status", "5", "--json"])
    assert len(json.loads(capsys.readouterr().out)) == 2
    cli.main(["status", "5_1", "--json"])
    assert json.loads(capsys.readouterr().out)["job_id"] == "5_1"


def test_no_runs_yet(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status"]) == 0
    assert "no run yet" in capsys.readouterr().out
    assert cli.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_only_the_newest_are_shown(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(25):
        make_run(runs_dir, f"{i:012}", state="COMPLETED", created=f"2026-01-01T00:00:{i:02}.000+00:00")
    cli.main(["status"])
    out = capsys.readouterr().out
    assert f"{24:012}" in out and f"{4:012}" not in out
    assert "25 COMPLETED; 5 older" in out
    cli.main(["status", "-n", "3"])
    assert "22 older" in capsys.readouterr().out
    cli.main(["status", "--all"])
    assert f"{0:012}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stauts"], "no command is called stauts; nearest name: status"),
        (["status", "nope"], "no run is called nope"),
        (["status", "--jsn"], "unrecognized arguments: --jsn"),
        (["logs"], "the following arguments are required: RUN"),
        (["logs", "aaaa", "--rank", "x"], "'x' is no whole number"),
        (["result"], "no run yet"),
        (["compare"], "the following arguments are required: RUN"),
        (["compare", "nope"], "no run is called nope"),
        (
            ["compare", "latest", "--sort", "memry"],
            "--sort memry: there is no such choice; nearest name: memory",
        ),
        (["compare", "a", "--plot", "b"], "--plot b: a picture ends in .png, .svg, .pdf"),
    ],
)
def test_called_wrongly(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_status_goes_on_without_slurm(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(runs_dir, job_id="4_0", state="RUNNING")
    assert cli.main(["status", "4_0", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["state"] == "UNKNOWN"
    assert "squeue is not on this machine" in plain["reason"]


def test_cancel_without_slurm_is_code_3(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(runs_dir, job_id="4_0", state="RUNNING")
    assert cli.main(["cancel", "4_0"]) == 3
    assert "nothing was cancelled" in capsys.readouterr().err


def test_cancelling_many_asks_first(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(10):
        make_run(runs_dir, f"{i:012}", state="COMPLETED", job_id=f"5_{i}")
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115, PTH123
    assert cli.main(["cancel", "5"]) == 2
    assert "10 runs would be cancelled: say --yes" in capsys.readouterr().err
    assert cli.main(["cancel", "5", "--yes"]) == 0
    assert capsys.readouterr().out.count("is over already") == 10


def test_a_state_file_that_cannot_be_read_is_said(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(runs_dir, "bbbb", state="COMPLETED")
    make_run(runs_dir).state_file.write_text("{")
    assert cli.main(["status"]) == 0
    captured = capsys.readouterr()
    assert "bbbb" in captured.out
    assert "left out:" in captured.err
    assert cli.main(["status", "aaaa11112222"]) == 2


def test_follow_exits_as_the_run_did(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(runs_dir, "aaaa", state="FAILED", reason="bad")
    make_run(runs_dir, "bbbb", state="COMPLETED")
    assert cli.main(["follow", "aaaa"]) == 1
    assert cli.main(["follow", "bbbb"]) == 0
    assert cli.main(["follow", "aaaa", "bbbb"]) == 1


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert cli.main(["status"]) == 130


def hpcdl(*words: str, runs_dir: Path, **options: object) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HPCDL_RUNS": str(runs_dir)}
    command = [sys.executable, "-m", "hpcdl", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_help_and_version(runs_dir: Path) -> None:
    assert hpcdl("--version", runs_dir=runs_dir).stdout.startswith("hpcdl ")
    done = hpcdl("--help", runs_dir=runs_dir)
    assert done.returncode == 0
    for verb in ("launch", "status", "logs", "follow", "cancel", "result", "compare", "examples:"):
        assert verb in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert hpcdl(runs_dir=runs_dir).stdout == done.stdout


def test_compare(
    runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, speed in (("aaaa", 10.0), ("bbbb", 30.0)):
        run = make_run(runs_dir, name, state="COMPLETED", kind="local", submission=None)
        add_steps(run, range(1, 4), tokens_per_s=speed)
    assert cli.main(["compare", "aaaa", "bbbb", "--json"]) == 0
    assert [row["tokens_per_s"] for row in json.loads(capsys.readouterr().out)["runs"]] == [30.0, 10.0]
    make_run(runs_dir, "cccc").state_file.write_text("{")
    assert cli.main(["compare", "tiny", "cccc", "--sort", "run"]) == 0
    captured = capsys.readouterr()
    assert captured.out.index("aaaa") < captured.out.index("bbbb")
    assert "left out:" in captured.err
    pytest.importorskip("matplotlib")
    assert cli.main(["compare", "aaaa", "bbbb", "--plot"]) == 0
    assert (tmp_path / "compare.png").exists()
    assert "plot: compare.png" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="COMPLETED", kind="local", submission=None)
    line = "2026-01-01T00:00:00.000+00:00 [rank 0] " + "x" * 200 + "\n"
    (run.logs / "here-try0.0.log").write_text(line * 5000)
    command = f"{sys.executable} -m hpcdl logs aaaa --runs-dir {runs_dir} | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["status"], ["compare", "latest"]], ids=lambda words: str(words[0]))
def test_looking_imports_nothing_heavy(runs_dir: Path, words: list[str]) -> None:
    make_run(runs_dir, state="COMPLETED")
    code = f"import sys; from hpcdl.cli import main; main({words}); print(','.join(sys.modules), file=sys.stderr)"
    env = {**os.environ, "HPCDL_RUNS": str(runs_dir)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split(","))
    heavy = {"torch", "transformers", "numpy", "matplotlib", "hydra", "omegaconf", "pydantic", "submitit"}
    assert loaded.isdisjoint(heavy | ({"yaml"} if words == ["status"] else set()))
