"""The real agent with the worker that leaks: `python leaky_agent.py RUNS_FILE`."""

import sys
from pathlib import Path

from hpcdl.launch import job

sys.exit(job.main(sys.argv[1:], worker=(str(Path(__file__).with_name("leaky_worker.py")),)))
