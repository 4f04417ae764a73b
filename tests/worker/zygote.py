"""Starts workers by fork from a process that has torch, transformers and peft imported already.

Each child is a real worker: `hpcdl.worker.main.main` in a process of its own with torchrun's environment,
half a second after it is asked for instead of ten. Reads commands as JSON lines, answers with JSON lines:

    {"run": DIR, "ranks": 2, "env": {…}, "rank_env": {"1": {…}}, "log": FILE} → {"pids": […]}, {"codes": […]}

With "module" another module's `main` is run instead.

As torchrun does, it ends the other ranks when one has failed.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def measuring() -> Any:
    """Coverage of this worker, where pytest measures it: a part that pytest-cov combines at the end."""
    data_file = os.environ.get("TEST_COVERAGE_FILE")
    if not data_file:
        return None
    import coverage

    measured = coverage.Coverage(data_file=data_file, data_suffix=True, source=["hpcdl"], branch=True)
    measured.start()
    return measured


def child(command: dict[str, Any], rank: int, port: int) -> None:
    log = os.open(command["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(0)
    ranks = str(command["ranks"])
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": ranks,
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **command.get("env", {}),
        **command.get("rank_env", {}).get(str(rank), {}),
    }
    code = 1
    measured = measuring()
    try:
        from hpcdl.runs.store import RunDir

        main = importlib.import_module(command.get("module", "hpcdl.worker.main")).main
        main(RunDir(Path(command["run"])))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        if measured is not None:
            measured.stop()
            measured.save()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_all(pids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def answer(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    import peft  # noqa: F401
    import torch.distributed.checkpoint  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import hpcdl.worker.result  # noqa: F401

    answer({"ready": True})
    for line in sys.stdin:
        wanted = json.loads(line)
        port = free_port()
        children = []
        for rank in range(wanted["ranks"]):
            pid = os.fork()
            if pid == 0:
                child(wanted, rank, port)
            children.append(pid)
        answer({"pids": children})
        answer({"codes": wait_all(children)})
