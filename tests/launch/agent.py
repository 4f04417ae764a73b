"""The agent with the worker of the tests: `python agent.py RUNS_FILE [INDEX]`."""

import os
import sys
from pathlib import Path

from hpcdl.launch import child, job, memory

child.CLOSING_GRACE_S = 1.0
if "CGROUPS" in os.environ:  # a control group that the tests' worker counts its own death in
    CGROUPS = Path(os.environ["CGROUPS"])
    kills = memory.kills
    memory.kills = lambda: kills(CGROUPS / "cgroup", CGROUPS)

sys.exit(job.main(sys.argv[1:], worker=(str(Path(__file__).with_name("tiny_worker.py")),)))
