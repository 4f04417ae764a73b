"""Stands in for torchrun in the agent's tests: starts in 50 ms instead of seconds. test_torchrun_real.py holds the
real one against the same workers."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time

parser = argparse.ArgumentParser()
for name in ("nnodes", "nproc-per-node", "max-restarts"):
    parser.add_argument(f"--{name}", type=int, default=1)
for name in ("rdzv-backend", "rdzv-id", "rdzv-endpoint", "rdzv-conf", "local-addr", "tee", "log-dir"):
    parser.add_argument(f"--{name}")
parser.add_argument("--signals-to-handle", default="SIGTERM,SIGINT,SIGHUP,SIGQUIT")
parser.add_argument("script")
parser.add_argument("rest", nargs=argparse.REMAINDER)
args = parser.parse_args()

for name in args.signals_to_handle.split(","):
    signal.signal(getattr(signal, name), lambda n, _: sys.exit(128 + n))
node = int(os.environ.get("SLURM_NODEID") or os.environ.get("JOB_COMPLETION_INDEX") or 0)


def say(text):
    print(text, file=sys.stderr, flush=True)


def pump(process, rank):
    for line in process.stdout:
        prefix = os.environ["TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE"].replace("${rank}", str(rank))
        sys.stdout.buffer.write(prefix.encode() + line)
        sys.stdout.buffer.flush()


def start(restart):
    workers = {}
    for local in range(args.nproc_per_node):
        rank = node * args.nproc_per_node + local
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(args.nnodes * args.nproc_per_node),
            "TORCHELASTIC_RESTART_COUNT": str(restart),
        }
        workers[rank] = subprocess.Popen(
            [sys.executable, "-u", args.script, *args.rest],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    pumps = [threading.Thread(target=pump, args=(p, r), daemon=True) for r, p in workers.items()]
    for thread in pumps:
        thread.start()
    return workers, pumps


def wait(workers):
    """The first failure (rank, exit code), or None."""
    while any(p.poll() is None for p in workers.values()):
        for rank, process in workers.items():
            if process.poll():
                return rank, process.returncode
        time.sleep(0.02)
    return next(((r, p.returncode) for r, p in workers.items() if p.returncode), None)


for restart in range(args.max_restarts + 1):
    workers, pumps = start(restart)
    failure = wait(workers)
    if failure is None:
        break
    seen = time.strftime("%Y-%m-%d_%H:%M:%S")
    for process in workers.values():
        if process.poll() is None:
            say(f"W1122 api.py:1028] Sending process {process.pid} closing signal SIGTERM")
            os.killpg(process.pid, signal.SIGTERM)
    end = time.monotonic() + 30
    for process in workers.values():
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    for thread in pumps:
        thread.join(1)
    rank, code = failure
    where = f"local_rank: {rank % args.nproc_per_node} (pid: {workers[rank].pid})"
    say(f"E1122 api.py:1002] failed (exitcode: {code}) {where} of binary: x")
    if restart < args.max_restarts:
        continue
    say("=" * 60)
    say(f"{args.script} FAILED\n" + "-" * 60)
    say(f"Root Cause (first observed failure):\n[0]:\n  time      : {seen}\n  host      : here")
    say(f"  rank      : {rank} (local_rank: 0)\n  exitcode  : {code} (pid: {workers[rank].pid})")
    say("  error_file: <N/A>\n  traceback : To enable traceback see: https://pytorch.org\n" + "=" * 60)
    sys.exit(1)
for thread in pumps:
    thread.join(1)
