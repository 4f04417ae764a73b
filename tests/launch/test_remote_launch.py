"""Remote submission over a real sshd on the loopback address, to a fake Slurm."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdl import cli
from hpcdl.launch.remote import send
from tests.launch.loopback import WHY_NOT, Loopback

TINY = ("+experiment=pretrain_tiny", "name=away")
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    if WHY_NOT:
        assert os.environ.get("HPCDL_REQUIRE_CLUSTER") != "1", WHY_NOT
        pytest.skip(WHY_NOT)
    made = Loopback(tmp_path_factory.mktemp("re mote"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def laptop(node: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in node.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HPCDL_TEST_SECRET", "it stays here")
    monkeypatch.chdir(tmp_path)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.02)


def said(capfd: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What a command prints on standard output."""
    assert cli.main(words) == code, capfd.readouterr()
    return capfd.readouterr().out


def test_a_sweep_from_laptop_to_queue(node: Loopback, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("launch", "-m", *TINY, *node.words(), "seed=1,2")
    text = said(capfd, *words, "dry_run=true")
    assert not list(node.home.glob("[!.]*")), "a dry run has changed something"
    out = said(capfd, *words)
    (sbatch,) = [call for call in node.slurm.calls("sbatch") if "--test-only" not in call["argv"]]
    # The text of the dry run, less its last words for people, is what Slurm was given.
    assert text.startswith(sbatch["script"]) and sbatch["script"].startswith("#!/bin/bash\n#SBATCH")
    assert f"on         {node.name}" in out and "2 runs: 2 submitted" in out
    assert "it stays here" not in json.dumps(node.slurm.calls("sbatch"))

    again = said(capfd, *words, "parsable=true")
    rows = [line.split("\t") for line in again.splitlines()]
    assert [len(row) for row in rows] == [3, 3] and len(node.slurm.jobs()) == 1
    run_id, job_id, run_dir = rows[0]
    spec = (Path(run_dir) / "spec.yaml").read_text()
    assert Path(run_dir).parent == node.runs / "away" and "login_host: null" in spec and "sha256" in spec

    status = json.loads(said(capfd, "status", run_id, "--json"))
    assert (status["state"], status["job_id"], status["host"]) == ("PENDING", job_id, node.name)
    assert cli.main(["logs", run_id]) == 0
    assert "no log yet: PENDING" in capfd.readouterr().err
    assert cli.main(["checkpoints", "nobody's", "--host", node.name]) == 2
    assert "no run is called nobody's: looked in" in capfd.readouterr().err
    assert "CANCELLED" in said(capfd, "cancel", run_id, "--now")
    assert node.logins == 1, node.log()


def test_a_connection_that_is_cut_while_it_submits_doubles_nothing(
    node: Loopback, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(send, "RETRIES_S", (0.1, 0.1))
    before = len(node.slurm.jobs())
    bin_there, begun, go = (node.folder / name for name in ("held", "begun", "go"))
    bin_there.mkdir()
    (bin_there / "sbatch").write_text(
        f'#!/bin/bash\n[[ $1 == --test-only ]] || {{ : >"{begun}"; until [[ -e "{go}" ]]; do sleep 0.02; done; }}\n'
        f'PATH="${{PATH#*:}}" exec sbatch "$@"\n'
    )
    (bin_there / "sbatch").chmod(0o755)
    node.profile(f'export PATH="{bin_there}:$PATH"\n')

    def cut() -> None:
        wait_for(begun)
        ssh = [node.folder / "laptop" / "ssh", "-o", f"ControlPath={node.socket}"]
        subprocess.run([*ssh, "-O", "exit", node.name], check=True, capture_output=True)
        go.touch()

    cutter = threading.Thread(target=cut)
    cutter.start()
    code = cli.main(["launch", *TINY, *node.words(), "force=true", "parsable=true"])
    cutter.join()
    out, err = capfd.readouterr()
    assert code == 0 and "asking again what became of it" in err, err
    (row,) = [line.split("\t") for line in out.splitlines()]
    assert len(node.slurm.jobs()) == before + 1 and row[1] == f"{node.slurm.jobs()[-1]}_0"
    assert not list((node.folder / "runs here" / ".remote").glob("asked-*"))


def test_a_node_that_is_away_is_told_and_nothing_is_submitted(
    node: Loopback, capfd: pytest.CaptureFixture[str]
) -> None:
    node.stop()
    try:
        assert cli.main(["launch", *TINY, *node.words()]) == 2
        err = capfd.readouterr().err
        assert (
            "nothing was submitted" in err
            and "1. cluster.login_host = login-" in err
            and "nothing listens" in err
        )
        assert "UNKNOWN" in said(capfd, "status")
    finally:
        node.serve()
