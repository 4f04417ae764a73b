"""The agent with the worker of the tests: `python agent.py RUNS_FILE [INDEX]`."""

import os
import sys
from pathlib import Path

from hpcdl.launch import child, hang, job, memory, preflight, survivor

child.CLOSING_GRACE_S = 1.0
if "CGROUPS" in os.environ:  # a control group that the tests' worker counts its own death in
    CGROUPS = Path(os.environ["CGROUPS"])
    kills = memory.kills
    memory.kills = lambda: kills(CGROUPS / "cgroup", CGROUPS)
survivor.TURN_S = 0.5
hang.LOOK_EVERY_S, hang.TORCHRUN_LIMIT_S = 0.1, 1.0
if os.environ.get("SLURMD_NODENAME", "") == os.environ.get("UNFIT"):
    preflight.available_bytes = lambda: 0

sys.exit(
    job.main(
        sys.argv[1:], worker=(str(Path(__file__).with_name(os.environ.get("WORKER", "tiny_worker.py"))),)
    )
)
