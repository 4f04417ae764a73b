"""Remote submission: `cluster.login_host=user@host` launches on a cluster from a machine that shares no disk with it.

What a config says is composed here, by Hydra. Everything that asks the cluster is done there, by the same code in the
same order as a launch on the login node: files are looked for, Slurm is asked what its nodes have, runs are found,
claimed and submitted. So nothing can differ from a launch there, a dry run prints the very text, and a second launch
finds the first one's runs. docs/remote.md is the user's side of it.

__init__.py    launch: the order of the steps here
connection.py  one multiplexed ssh connection; what its faults mean
envelope.py    words and scripts through two shells, unchanged
probe.py       what the login node has, asked in one go; its faults
probe_there.py the questions themselves: runs in any Python there
carry.py       this machine's hpcdl, copied there by rsync
verbs.py       status, logs, cancel, …: the same command, done there
hpcdl/there.py what is started on the login node
"""

from __future__ import annotations

from hpcdl.launch.remote.send import launch

__all__ = ["launch"]
