"""What a failing rank leaves behind, so that `hpcdl status` can tell the root cause: the earliest file."""

from __future__ import annotations

import json
import sys
import traceback

from hpcdl import secrets
from hpcdl.errors import HpcdlError, NotFitError
from hpcdl.runs.files import write_json
from hpcdl.runs.kinds import CAUSE, NEVER_RESTART, of_exception
from hpcdl.runs.store import RunDir, now
from hpcdl.worker.metrics import resident_peak_bytes
from hpcdl.worker.process import Process


def _peak_memory_bytes() -> int:
    """The most that this rank has held: how far it came, where memory ran out."""
    torch = sys.modules.get("torch")  # a rank can fail before it has torch
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resident_peak_bytes()


def exit_code(error: BaseException) -> int:
    """The rank's exit code: NEVER_RESTART where another try would only fail in the same way."""
    return NEVER_RESTART if of_exception(error) == "fault" else 1


def report(run: RunDir, who: Process, step: int, error: BaseException) -> None:
    """Writes `errors/try<t>-restart<n>-rank<r>.json` and prints the traceback.

    A user's fault (HpcdlError) has none: its message says it all.
    """
    told = isinstance(error, HpcdlError)
    text = "" if told else secrets.hide("".join(traceback.format_exception(error)))
    message = secrets.hide(str(error))
    # Another rank's death shows here as a broken connection: the time decides who was first.
    record = {
        "time": now(),
        "node": error.node if isinstance(error, NotFitError) else who.node,
        "rank": who.rank,
        "step": step,
        "type": type(error).__name__,
        "kind": of_exception(error),
        "message": message,
        "traceback": text,
        "peak_memory_bytes": _peak_memory_bytes(),
    }
    print(f"error: {message}" if told else text, file=sys.stderr, flush=True)
    try:
        run.errors.mkdir(exist_ok=True)
        write_json(run.errors / f"try{who.attempt}-restart{who.restart}-rank{who.rank}.json", record)
    except OSError:  # the disk may be what is wrong: this node's agent reads what its workers print
        print(f"{CAUSE}{json.dumps({**record, 'traceback': ''})}", file=sys.stderr, flush=True)
