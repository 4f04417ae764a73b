"""Options of one tool only: where they may stand, what is refused, how they reach the tool."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from hpcdl.launch import tools


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would be started on the compute side."""
    seen: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tools.subprocess, "run", run)
    return seen


def test_options_and_overrides_stand_in_any_order(started: list[list[str]]) -> None:
    argv = [
        "llama_tiny",
        "--prompt",
        "x = 'é'",
        "trainer.precision=fp32",
        "--tokens",
        "3",
        "seed=1",
        "--chat",
    ]
    assert tools.main("generate", argv) == 0
    (command,) = started
    assert command[3] == "generate"
    assert json.loads(command[command.index("--options") + 1]) == {
        "prompt": "x = 'é'", "chat": True, "tokens": 3, "temperature": 0.0, "top_p": 1.0, "seed": 0,
    }  # fmt: skip


def test_other_tools_are_told_of_none(started: list[list[str]]) -> None:
    assert tools.main("eval", ["llama_tiny", "data=synthetic"]) == 0
    assert "--options" not in started[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --prompt"),
        (["--prompt", "x", "--tokens", "0"], "--tokens: 0 is out of range: at least 1"),
        (["--prompt", "x", "--tokens", "many"], "--tokens: 'many' is no int"),
        (["--prompt", "x", "--top-p", "1.5"], "--top-p: 1.5 is out of range: 0 to 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    argv: list[str], message: str, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tools.main("generate", ["llama_tiny", *argv])
    assert ended.value.code == 2 and message in capsys.readouterr().err and not started


def test_values_are_written_as_hydra_reads_them() -> None:
    assert [tools.literal(value) for value in (None, True, 3, 0.5, "it's", ["a", 1])] == [
        "null", "true", "3", "0.5", "'it\\'s'", "['a',1]",
    ]  # fmt: skip
