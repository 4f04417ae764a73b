"""Four ranks on two nodes over real gloo, of which one fails and the others of it: who is named, and what is shown."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hpcdl.runs import logs
from tests.fake_slurm import FakeSlurm
from tests.launch.making import ANY_ADDRESS, Agents

pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.slow]
TERMINATED = "SIGABRT: terminate called after throwing an instance of 'std::runtime_error': boom"


@pytest.mark.parametrize(
    ("mode", "reason", "context"),
    [
        ("raise", "ValueError: the loss is nan (rank 2, node ", "step 3 of the rank that fails"),
        ("abort", TERMINATED, "what():  boom"),
        ("segv", "SIGSEGV: Fatal Python error: Segmentation fault", "string_at"),
        ("kill", "SIGKILL: killed; by the kernel if memory ran out (rank 2", "a line without an end"),
        (
            "import",
            "ExitCode: the worker ended with code 1: ModuleNotFoundError: No module named 'a_package_that_is_not_",
            "import a_package_that_is_not_there",
        ),
    ],
)
def test_the_rank_that_failed_first(
    agents: Agents, slurm: FakeSlurm, mode: str, reason: str, context: str
) -> None:
    root = Path(__file__).parents[2]
    agents.environment = {"PYTHONPATH": f"{root}:{ANY_ADDRESS}", "WORKER": "gloo_worker.py"}
    agents.cluster = {"kind": "slurm", "nodes": 2, "max_requeues": 0}
    run = agents.make(mode)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for process in [agents.node(number, 2, HPCDL_PORT=port) for number in (0, 1)]:
        agents.end(process, limit_s=150)
    assert run.read_state().reason.startswith(reason)
    shown: list[str] = []
    logs.show_error(run, shown.append, shown.append)
    text = "\n".join(shown)
    assert shown[0].startswith("first error  rank 2 on node n")
    assert context in text
    assert f"[rank 2] {'step 1 of the rank that fails' if mode != 'import' else 'Traceback'}" in agents.log()
    if mode != "import":  # there the others have not met yet
        assert "3 other ranks failed after it" in text
        assert "[rank 2] a line without an end" in agents.log()
