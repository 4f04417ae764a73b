"""A worker without torch: what a rank does is named in the environment variable MODE."""

import ctypes
import datetime
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

got = []
for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, _: got.append(signal.Signals(n).name.removeprefix("SIG")))
parent = os.getppid()
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != parent:
    sys.exit(1)

run = Path(sys.argv[1])
rank = int(os.environ["RANK"])
attempt = os.environ["HPCDL_TRY"]
restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
mode = os.environ["MODE"]


def event(kind, **details):
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": now, "event": kind, **details}) + "\n")


def outcome(status, reason=""):
    if rank == 0:
        record = {"try": attempt, "status": status, "reason": reason, "step": 7, "time": ""}
        (run / "outcome.json").write_text(json.dumps(record))
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 7, "loss": 1.0}\n')


def wait_for_the_word():
    while True:
        if got:
            return f"signal {got[0]}"
        if (run / "STOP").exists():
            return (run / "STOP").read_text().strip()
        time.sleep(0.02)


def further():
    """Dies a step later each time; the fourth process finishes."""
    file = run / f"lives-{rank}"
    lives = int(file.read_text()) if file.exists() else 0
    file.write_text(str(lives + 1))
    time.sleep(0.5)  # as a real one, which imports torch first
    if rank == 0:
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"step": lives, "loss": 1.0}) + "\n")
    if lives == 3:
        outcome("finished")
        return
    time.sleep(0.3 if rank else 60)
    os.kill(os.getpid(), signal.SIGKILL)


def steps():
    """Five steps with their signs of life; then rank 1 sticks, or dies."""
    from types import SimpleNamespace

    from hpcdl.worker import heartbeat

    progress = heartbeat.start(SimpleNamespace(rank=rank, restart=int(restart)))
    for step in range(1, 6):
        time.sleep(0.25)
        progress.reach(step)
    if mode == "same_step" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1:
        stick()
    waiting = "import time\nwhile True: time.sleep(0.02)"
    exec(compile(waiting, "/x/site-packages/torch/distributed/distributed_c10d.py", "exec"))


def load():
    """Steps with their signs of life, and two processes that load data for them, until somebody has seen enough."""
    from types import SimpleNamespace

    from hpcdl.worker import heartbeat

    progress = heartbeat.start(SimpleNamespace(rank=rank, restart=int(restart)))
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    loaders = [subprocess.Popen(sleep) for _ in range(2)]
    step = 0
    while not (run / "enough").exists():
        time.sleep(0.05)
        step += 1
        progress.reach(step)
    for loader in loaders:
        loader.kill()
        loader.wait()
    outcome("finished")


def stick():
    time.sleep(600)


def full_disk():
    """What a real worker leaves whose last checkpoint finds no room, once the log finds none either."""
    from hpcdl.errors import UnsavedError
    from hpcdl.runs.store import RunDir
    from hpcdl.worker import errors, process

    print(*(f"line {number} " + "x" * 80 for number in range(200)), sep="\n", flush=True)
    errors.report(
        RunDir(run), process.from_environment(), 7, UnsavedError("the checkpoint of step 7 can't be written")
    )
    os._exit(errors.NEVER_RESTART)


def main():
    print("hello", rank, flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    (run / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 0 and restart != "0":
        event("restarted", restart=int(restart))
    if mode == "finish":
        outcome("finished")
    elif mode == "deaf":  # a worker whose handlers are not there yet
        while not (run / "STOP").exists():
            time.sleep(0.02)
        outcome("stopped", (run / "STOP").read_text().strip())
    elif mode == "wait":
        outcome("stopped", wait_for_the_word())
    elif mode == "save":  # a checkpoint that takes its time
        word = wait_for_the_word()
        time.sleep(float(os.environ["SAVE_S"]))
        outcome("stopped", word)
    elif mode == "print":
        print(*(f"{name}={value}" for name, value in os.environ.items()), sep="\n", flush=True)
        print(f"401 for {os.environ['HF_TOKEN']}", file=sys.stderr, flush=True)
        os._exit(3)
    elif mode == "fail" and rank == 1:
        raise ValueError("the loss is nan\nsecond line")
    elif mode == "starve" and rank == 1:
        bytearray(1 << 60)  # a MemoryError: no machine has that much
    elif mode == "oom_kill" and rank == 1:
        Path(os.environ["CGROUPS"], "memory.events").write_text("oom 1\noom_kill 1\n")
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "die" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "exit3" and rank == 1:
        sys.exit(3)
    elif mode == "twice" and rank == 1:
        raise ConnectionError(f"restart {restart}")
    elif mode == "once" and restart == "0" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "again" and attempt.count(".") > 1:
        outcome("finished")
    elif mode == "further":
        further()
    elif mode == "once" and restart != "0":
        outcome("finished")
    elif mode == "leak":
        # A helper in a session of its own that outlives everybody: a data loader that was not closed.
        helper = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True
        )
        (run / f"pid-helper-{rank}").write_text(str(helper.pid))
        outcome("finished")
    elif mode == "load":
        load()
    elif mode in ("stall", "same_step"):
        steps()
    elif mode == "full" and rank == 1:
        while not (run / "filler").exists() or (run / "filler").stat().st_size == 0:
            time.sleep(0.02)
        full_disk()
    elif mode == "silent":
        pass
    else:
        while mode in (
            "full",
            "fail",
            "starve",
            "oom_kill",
            "die",
            "exit3",
            "once",
            "twice",
            "hang",
            "again",
        ):
            time.sleep(0.02)


try:
    main()
except Exception as error:
    record = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "node": os.uname().nodename,
        "rank": rank,
        "step": 7,
        "type": type(error).__name__,
        "message": str(error),
        "traceback": traceback.format_exc(),
    }
    file = run / "errors" / f"try{attempt}-restart{restart}-rank{rank}.json"
    file.with_suffix(".tmp").write_text(json.dumps(record))
    file.with_suffix(".tmp").rename(file)
    raise
