"""The body of every job, run with bash on the fake Slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch.slurm import BACKEND
from tests.fake_slurm import FakeSlurm
from tests.launch.making import make_runs, request


def rendered(runs_dir: Path, **fields: Any) -> str:
    """A script whose run is there."""
    made = request(runs_dir=runs_dir, python=sys.executable, **fields)
    if not made.folder.exists():
        make_runs(runs_dir, made.cluster, state="COMPLETED")  # what srun would have done
    return BACKEND.render(made)


def start(
    tmp_path: Path,
    slurm: FakeSlurm,
    hosts: dict[str, str] | None = None,
    lines: dict[str, tuple[str, ...]] | None = None,
    **more: str,
) -> Any:
    """Runs a rendered script as the batch step of job 41 on nodes n1, n2; `hosts` is what getent knows."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    cases = "".join(f"{name}) echo '{address} STREAM {name}';;\n" for name, address in (hosts or {}).items())
    (tools / "getent").write_text(f'#!/bin/bash\ncase "$2" in\n{cases}*) exit 2;;\nesac\n')
    (tools / "getent").chmod(0o755)
    nodes = more.get("SLURM_JOB_NODELIST", "n1,n2")
    script = tmp_path / "job.sh"
    script.write_text(rendered(tmp_path / "my runs", nodes=nodes.count(",") + 1, **(lines or {})))
    slurm.set(srun_exit=int(more.pop("SRUN_EXIT", "0")))
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_CPUS_PER_TASK": "4",
        "SLURM_ARRAY_TASK_ID": "0",
        **more,
    }
    return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)


def srun(slurm: FakeSlurm) -> dict[str, Any]:
    (call,) = slurm.calls("srun")
    return call


def test_two_nodes(tmp_path: Path, slurm: FakeSlurm) -> None:
    done = start(tmp_path, slurm, {"n1": "10.1.0.1"})
    assert (done.returncode, done.stderr) == (0, "")
    call = srun(slurm)
    assert call["argv"] == [
        "--export=ALL",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=4",
        "--kill-on-bad-exit=1",
        "--wait=0",
        sys.executable,
        "-m",
        "hpcdl.launch.job",
        f"{tmp_path}/my runs/.submissions/20260131-120000-ab12/runs.txt",
    ]
    assert call["environment"]["HPCDL_HEAD"] == "10.1.0.1"
    assert call["environment"]["HPCDL_NODES"] == "n1 n2"
    assert 20000 <= int(call["environment"]["HPCDL_PORT"]) < 32000


def test_one_node_looks_nothing_up(tmp_path: Path, slurm: FakeSlurm) -> None:
    assert start(tmp_path, slurm, {}, SLURM_JOB_NODELIST="n1").returncode == 0
    environment = srun(slurm)["environment"]
    assert environment["HPCDL_NODES"] == "n1"
    assert "HPCDL_HEAD" not in environment


def test_the_jobs_code_is_sruns(tmp_path: Path, slurm: FakeSlurm) -> None:
    assert start(tmp_path, slurm, {"n1": "10.1.0.1"}, SRUN_EXIT="17").returncode == 17


@pytest.mark.parametrize("own", ["127.0.1.1", "::1", "fe80::1"])
def test_loopback_is_refused_and_slurms_own_address_taken(tmp_path: Path, slurm: FakeSlurm, own: str) -> None:
    slurm.set(addresses={"n1": "node-1.cluster"})
    done = start(tmp_path, slurm, {"n1": own, "node-1.cluster": "10.1.0.9"})
    assert done.returncode == 0
    assert srun(slurm)["environment"]["HPCDL_HEAD"] == "10.1.0.9"


def test_a_head_without_address_ends_the_job(tmp_path: Path, slurm: FakeSlurm) -> None:
    done = start(tmp_path, slurm, {})
    assert done.returncode == 1
    assert "no address of the head node n1 that other nodes could reach (getent ahosts n1)" in done.stderr
    assert slurm.calls("srun") == []


def test_ports_differ_from_job_to_job_and_try_to_try(tmp_path: Path, slurm: FakeSlurm) -> None:
    hosts = {"n1": "10.1.0.1"}
    for more in ({}, {"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "42"}):
        start(tmp_path, slurm, hosts, **more)
    assert len({call["environment"]["HPCDL_PORT"] for call in slurm.calls("srun")}) == 3


def test_a_taken_port_is_passed_over(tmp_path: Path, slurm: FakeSlurm) -> None:
    hosts = {"n1": "10.1.0.1"}
    start(tmp_path, slurm, hosts)
    port = int(srun(slurm)["environment"]["HPCDL_PORT"])
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        start(tmp_path, slurm, hosts)
    assert int(slurm.calls("srun")[-1]["environment"]["HPCDL_PORT"]) == port + 1


def test_a_node_list_without_scontrol(tmp_path: Path, slurm: FakeSlurm) -> None:
    # bash, srun and what the script needs, but no scontrol: as in some containers.
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "grep", "awk", "sed", "uname"):
        found = next(d for d in ("/usr/bin", "/bin") if Path(d, name).exists())
        (bare / name).symlink_to(Path(found, name))
    (bare / "srun").write_text('#!/bin/bash\necho "$HPCDL_NODES"\n')
    (bare / "srun").chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(rendered(tmp_path / "runs", nodes=2))
    environment = {"PATH": str(bare), "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "c[1-2]"}
    (bare / "getent").write_text("#!/bin/bash\necho '10.1.0.1 STREAM'\n")
    (bare / "getent").chmod(0o755)
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "c1 c2")


def test_a_launch_from_inside_a_local_run_does_not_stay_local(tmp_path: Path, slurm: FakeSlurm) -> None:
    start(tmp_path, slurm, {"n1": "10.1.0.1"}, HPCDL_LOCAL="1", HPCDL_TRY="3.3")
    assert not {"HPCDL_LOCAL", "HPCDL_TRY"} & srun(slurm)["environment"].keys()


def run_lines(tmp_path: Path, slurm: FakeSlurm, srun: int = 0, **lines: tuple[str, ...]) -> Any:
    """One node, with setup and teardown lines."""
    return start(tmp_path, slurm, {}, SLURM_JOB_NODELIST="n1", SRUN_EXIT=str(srun), lines=lines)


@pytest.mark.parametrize("code", [0, 7, 137])
def test_teardown_comes_after_srun_and_changes_no_code(tmp_path: Path, slurm: FakeSlurm, code: int) -> None:
    lines = {
        "setup": ("module() { echo loaded $1; }", "module 'a b'", "declare PLACE=/tmp"),
        "teardown": ("echo took down $PLACE; false", "exit 0"),
    }
    done = run_lines(tmp_path, slurm, code, **lines)
    assert (done.returncode, done.stdout.splitlines()) == (code, ["loaded a b", "took down /tmp"])
    assert "cluster.teardown failed with code 1 at: false" in done.stderr


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("ls /no/such/place 2>/dev/null", 2, "failed with code 2 at: ls /no/such/place 2> /dev/null;"),
        ("exit 3", 3, "failed with code 3; nothing was trained"),
        ("exit 0", 1, "failed with code 1; nothing was trained"),
        ("if then (", 2, "failed with code 2"),
        ("no_such_command", 127, "failed with code 127 at: no_such_command;"),
    ],
)
def test_a_failing_setup_line_is_the_last_word(
    tmp_path: Path, slurm: FakeSlurm, line: str, code: int, said: str
) -> None:
    done = run_lines(tmp_path, slurm, setup=("echo first", line, "echo never"), teardown=("echo down",))
    assert (done.returncode, done.stdout.splitlines()) == (code, ["first", "down"])
    assert said in done.stderr.splitlines()[-1], done.stderr
    assert slurm.calls("srun") == []


def test_variables_that_are_not_set_break_no_setup_line(tmp_path: Path, slurm: FakeSlurm) -> None:
    done = run_lines(tmp_path, slurm, setup=('[ -z "$NOT_SET_ANYWHERE" ]', "false || true", "trap - EXIT"))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_to_the_script_reaches_srun_and_its_code_stands(tmp_path: Path, slurm: FakeSlurm) -> None:
    # Stands in for srun: says which signals it gets, ends a while after the second with a code of its own.
    tools = tmp_path / "own"
    tools.mkdir()
    (tools / "srun").write_text(
        "#!/bin/bash\ntrap 'echo USR2' USR2; trap 'echo USR1; sleep 0.3; exit 9' USR1; echo ready\n"
        "while :; do sleep 0.05; done\n"
    )
    (tools / "srun").chmod(0o755)
    script = tmp_path / "job.sh"
    script.write_text(rendered(tmp_path / "runs", teardown=("echo down",)))
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n1",
    }  # fmt: skip
    with subprocess.Popen(["bash", script], env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR2)
        assert process.stdout.readline() == "USR2\n"
        process.send_signal(signal.SIGTERM)  # upon which srun itself would end the step
        assert process.stdout.readline() == "USR1\n"
        process.send_signal(signal.SIGUSR2)  # while srun is on its way out
        assert process.stdout.readlines()[-1] == "down\n"
    assert process.returncode == 9
