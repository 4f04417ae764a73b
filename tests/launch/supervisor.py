"""The steps of a job whose agents have the worker of the tests: `python supervisor.py RUNS_FILE -- srun OPTION…`."""

import sys
from pathlib import Path

from hpcdl.launch import steps

steps._AGENT = (str(Path(__file__).with_name("agent.py")),)
sys.exit(steps.main(sys.argv[1:]))
