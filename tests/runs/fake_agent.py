"""A stand-in for the agent and its workers: `python fake_agent.py RUN_DIR STEPS STEP_S`.

Owns state.json as the agent does, writes metrics and events; SIGINT or a STOP file makes it save and stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hpcdl.runs.files import append_line
from hpcdl.runs.processes import create_time
from hpcdl.runs.store import RunDir, now


def main() -> None:
    run, steps, step_s = RunDir(Path(sys.argv[1])), int(sys.argv[2]), float(sys.argv[3])
    stops: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: stops.append(number))
    run.event("started", **{"try": "0.0"}, nodes=1, node_list=["here"], job_id=None)
    run.update(
        state="RUNNING",
        started=now(),
        host=os.uname().nodename,
        agent_pid=os.getpid(),
        agent_started=create_time(os.getpid()),
    )
    append_line(run.metrics_file, {"step": 0, "eval_loss": 3.25, "eval_perplexity": 25.79})
    step = 0
    for step in range(1, steps + 1):
        if stops or run.stop_file.exists():
            break
        time.sleep(step_s)
        record = {"step": step, "loss": 4.0 - step / steps, "tokens_per_s": 1234.5, "step_s": step_s}
        append_line(run.metrics_file, {**record, "peak_memory_bytes": 1.1e9})
        if step % 10 == 0:
            run.event("checkpoint", step=step)
    else:
        append_line(run.metrics_file, {"step": step, "eval_loss": 3.0, "eval_perplexity": 20.1})
        run.event("finished", step=step)
        run.update(state="COMPLETED", exit_code=0, ended=now())
        return
    reason = f"cancel; checkpoint saved at step {step}"
    run.event("cancelled", by="cancel", step=step)
    run.update(state="CANCELLED", reason=reason, exit_code=130, ended=now())


if __name__ == "__main__":
    main()
