"""Commands on a model (hpcdl.worker.tools) for tests: by fork from the zygote, so that torch is there at once."""

from __future__ import annotations

import json
import sys
from typing import Any

from hpcdl.runs.store import RunDir
from tests.worker.conftest import Finished, Workers


def tool(workers: Workers, verb: str, *flags: str, **dotted: Any) -> dict[str, Any]:
    """What a tool found about the tiny experiment's model, changed by dotted keys."""
    log = called(workers, verb, *flags, **dotted).log
    return dict(json.loads(log[log.index("{\n") :]))


def called(workers: Workers, verb: str, *flags: str, ok: bool = True, **dotted: Any) -> Finished:
    """The same, with its exit code and all that it said."""
    run = workers.make(**dotted)
    (run.path / "arguments.json").write_text(json.dumps([verb, str(run.spec_file), "--json", *flags]))
    return workers.go(run, ok=ok, module="tests.worker.tools")


def main(run: RunDir) -> None:
    """In the forked process: the tool, as its command would run it."""
    from hpcdl.worker.tools.__main__ import main as command

    sys.argv = ["hpcdl", *json.loads((run.path / "arguments.json").read_text())]
    assert command() == 0
