"""Rules of remote submission (hpcdl.launch.remote): what is handed to ssh is a host's name, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpcdl.errors import Fault
from hpcdl.spec import ClusterSpec

_HOST = re.compile(r"(?:[A-Za-z0-9_.][\w.+-]*@)?[A-Za-z0-9_][\w.-]*", re.ASCII)
"""What begins with a dash would be an option of ssh's; a port, a jump host or a key belong into ~/.ssh/config."""
ALLOWED = "user@host, host, or a name of ~/.ssh/config"


def login_host_is_a_host(cluster: ClusterSpec) -> Iterator[Fault]:
    """What ssh reads is a host's name: everything else about the way there stands in its own configuration."""
    host = cluster.login_host
    if host is None:
        return
    if not _HOST.fullmatch(host):
        yield Fault(
            key="cluster.login_host",
            value=host,
            problem="is no host's name",
            allowed=f"{ALLOWED}, which also holds ports, jump hosts and keys",
            fix="cluster.login_host=user@host",
        )
    if cluster.kind != "slurm":
        yield Fault(
            key="cluster.login_host",
            value=host,
            problem=f"cluster.kind is {cluster.kind}: only Slurm has a login node to submit from",
            allowed="cluster=slurm, or a profile of your site's",
            fix="cluster.login_host=null, or cluster=slurm",
        )


def login_words_are_words(cluster: ClusterSpec) -> Iterator[Fault]:
    """A folder and a program: each one line, and not empty."""
    for name in ("login_dir", "login_python"):
        value = getattr(cluster, name)
        if value is None:
            continue
        if not value.strip() or not value.isprintable():
            problem = "is empty" if not value.strip() else "holds characters that no path should"
            example = "/scratch/me/runs" if name == "login_dir" else "/shared/env/bin/python"
            yield Fault(
                key=f"cluster.{name}", value=value, problem=problem, allowed="a path on the login node",
                fix=f"cluster.{name}={example}",
            )  # fmt: skip
        elif value.startswith("-"):
            yield Fault(
                key=f"cluster.{name}", value=value, problem="would be taken for an option",
                allowed="a path on the login node", fix=f"cluster.{name}=./{value}",
            )  # fmt: skip


RULES = (login_host_is_a_host, login_words_are_words)
