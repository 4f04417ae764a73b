from __future__ import annotations

from hpcdl.launch import torchrun
from hpcdl.launch.torchrun import Rendezvous
from hpcdl.spec import ClusterSpec


def test_one_node_meets_on_a_free_loopback_port() -> None:
    cluster = ClusterSpec(kind="local", processes_per_node=2)
    argv = torchrun.command(cluster, "/py", torchrun.alone("12.0-1"), "/tmp/logs", ("-m", "w", "/run"))
    assert argv == [
        "/py",
        "-m",
        "torch.distributed.run",
        "--nnodes=1",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-id=12.0-1",
        "--rdzv-endpoint=127.0.0.1:0",
        "--rdzv-conf=is_host=1,join_timeout=600,read_timeout=600",
        "--local-addr=127.0.0.1",
        "--max-restarts=3",
        "--signals-to-handle=SIGQUIT",
        "--tee=3",
        "--log-dir=/tmp/logs",
        "-m",
        "w",
        "/run",
    ]


def test_several_nodes_are_told_who_is_the_head() -> None:
    cluster = ClusterSpec(kind="slurm", nodes=2, processes_per_node=4, max_restarts=3)
    meeting = Rendezvous(id="12", host="10.0.0.1", port=20123, is_head=False, local_address="10.0.0.2")
    argv = torchrun.command(cluster, "/py", meeting, "/tmp/logs", ("w.py",))
    assert "--nnodes=2" in argv
    assert "--rdzv-endpoint=10.0.0.1:20123" in argv
    assert "--rdzv-conf=is_host=0,join_timeout=600,read_timeout=600" in argv
    assert "--local-addr=10.0.0.2" in argv
    assert "--max-restarts=3" in argv


def test_an_ipv6_head_is_put_in_brackets() -> None:
    meeting = Rendezvous(id="1", host="fd00::1", port=20123, is_head=True, local_address="fd00::1")
    argv = torchrun.command(ClusterSpec(kind="slurm", nodes=2), "/py", meeting, "/t", ("w.py",))
    assert "--rdzv-endpoint=[fd00::1]:20123" in argv


def test_torchrun_handles_none_of_the_signals_that_workers_act_on() -> None:
    argv = torchrun.command(ClusterSpec(kind="local"), "/py", torchrun.alone("1"), "/t", ("w.py",))
    handled = next(a for a in argv if a.startswith("--signals-to-handle=")).partition("=")[2].split(",")
    assert not {"SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"} & set(handled)


def test_environment_of_the_workers() -> None:
    cluster = ClusterSpec(kind="slurm", nodes=2, cpus_per_process=3, env={"NCCL_DEBUG": "INFO"})
    environment = torchrun.environment(cluster, "0.2", {"PATH": "/bin", "HPCDL_RUNS": "/runs"})
    assert environment == {
        "PATH": "/bin",
        "HPCDL_RUNS": "/runs",
        "HPCDL_TRY": "0.2",
        "OMP_NUM_THREADS": "3",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "PYTHONUNBUFFERED": "1",
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "\x1e[rank ${rank}] ",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "NCCL_DEBUG": "INFO",
    }


def test_one_node_shares_torchruns_store() -> None:
    environment = torchrun.environment(ClusterSpec(kind="local"), "0.0", {})
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in environment


def test_the_users_own_variables_go_before_ours() -> None:
    cluster = ClusterSpec(kind="local", cpus_per_process=3, env={"OMP_NUM_THREADS": "7"})
    assert torchrun.environment(cluster, "0.0", {})["OMP_NUM_THREADS"] == "7"


def test_what_another_torchrun_left_is_dropped() -> None:
    left = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "c1",
        "MASTER_PORT": "1",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "HPCDL_TRY": "4.4",
        "HOME": "/h",
    }
    environment = torchrun.environment(ClusterSpec(kind="local"), "0.0", left)
    assert environment["HPCDL_TRY"] == "0.0"
    assert environment["HOME"] == "/h"
    assert not (left.keys() - {"HPCDL_TRY", "HOME"}) & environment.keys()


def test_preview_of_one_node_and_of_several() -> None:
    one = torchrun.preview(ClusterSpec(kind="local", processes_per_node=2), "/py")
    assert one.startswith("/py -m torch.distributed.run --nnodes=1 --nproc-per-node=2 ")
    assert one.endswith(" -m hpcdl.worker.main RUN_DIR")
    two = torchrun.preview(ClusterSpec(kind="slurm", nodes=2), "/py")
    assert "--rdzv-endpoint=HEAD:PORT " in two
    assert "is_host=FIRST_NODE," in two
