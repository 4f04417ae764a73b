"""The worker's entry: `python -m hpcdl.worker.main RUN_DIR`, started by torchrun once a process.

Only the standard library and hpcdl's light modules are imported before the signal handlers stand: what
takes seconds (torch, transformers, peft) comes after, and only what the experiment uses.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from hpcdl.worker import unable

try:
    from hpcdl.compress import quant
    from hpcdl.runs.spec import read_spec
    from hpcdl.runs.store import RunDir
    from hpcdl.worker import errors, heartbeat, process
    from hpcdl.worker.heartbeat import Progress
    from hpcdl.worker.process import Process
    from hpcdl.worker.signals import Stop
except BaseException as error:  # a package that is missing, or another version's: the same at each start
    unable.leave(error)


def main(run: RunDir) -> None:
    """Trains the run's experiment; leaves the process group only after everyone has come to the end."""
    who = process.from_environment()
    process.die_with_parent()
    process.one_output()
    progress = heartbeat.start(who)
    stop = Stop(run, watch_file=who.is_first)
    try:
        train(run, who, stop, progress)
        process.leave()
    except BaseException as error:
        try:
            # For each loader's worker that has died torch raises in this signal's handler, also amid the report.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            errors.report(run, who, progress.step, error)
        finally:
            os._exit(
                errors.exit_code(error)
            )  # at once: a tidy exit would wait for ranks that wait for this one


def train(run: RunDir, who: Process, stop: Stop, progress: Progress) -> None:
    """Joins the other ranks with the threads and cores that are this one's, then does the task's work."""
    spec = read_spec(run.spec_file)
    quant.hide_unused(quant.needs(spec))
    device = process.choose_device(spec, who)
    threads = process.set_threads(spec, who, device)
    process.join(who, device)
    print(f"{who.node}: rank {who.rank} of {who.world_size}, {device}, {threads.describe()}", flush=True)
    if threads.warning:
        print(f"{who.node}: rank {who.rank}: {threads.warning}", flush=True)
        if who.local_rank == 0:
            run.event("warning", message=f"{who.node}: {threads.warning}")

    from hpcdl.worker import preflight, tasks, training

    preflight.links(spec.preflight, run, who, device)
    work = tasks.own_work(spec) or training.train
    work(spec, run, who, device, stop, progress)


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1]).absolute()))
