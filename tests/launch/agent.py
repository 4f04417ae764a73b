"""The agent with the worker of the tests: `python agent.py RUNS_FILE [INDEX]`."""

import sys
from pathlib import Path

from hpcdl.launch import child, job

child.CLOSING_GRACE_S = 1.0

sys.exit(job.main(sys.argv[1:], worker=(str(Path(__file__).with_name("tiny_worker.py")),)))
