"""A pod of the tests: `python pod.py`. All pods are this machine's processes, and meet on the loopback."""

import os
import sys
from pathlib import Path

from hpcdl.launch import child, network
from hpcdl.launch.kube import home, meeting, pod

home.Facts.head = property(lambda self: "127.0.0.1")
network.local_address = lambda head, port: head
child.CLOSING_GRACE_S = 1.0
meeting.BEAT_S, meeting.TELL_AFTER_S = 0.05, 0.3
worker = Path(__file__).parents[1] / "launch" / "tiny_worker.py"
here = Path(os.environ["POD_DIR"])

sys.exit(pod.main(worker=(str(worker),), spec_dir=here / "spec", last_words=here / "termination-log"))
