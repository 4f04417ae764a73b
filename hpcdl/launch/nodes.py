"""Nodes that are no good: whether they answer, and keeping a job off them."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from hpcdl.launch import control
from hpcdl.runs.hosts import expand_hosts

_SLURMD_PORT = 6818
_ANSWER_S = 3.0
_AT_A_TIME = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Exclusion:
    """What came of keeping a job off some nodes."""

    excluded: tuple[str, ...] = ()
    """Nodes that the job won't be started on any more."""
    refused: str = ""
    """Why others are not excluded; empty where all are."""


def silent(names: Sequence[str]) -> dict[str, str]:
    """Which of these nodes don't answer, each with the reason in words.

    Asked is slurmd's own port: Slurm itself takes SlurmdTimeout (300 s by default) to call a node down, and srun
    starts nothing on a node whose slurmd doesn't answer, whatever else still runs there.
    """
    if not names:
        return {}
    port = _slurmd_port()
    with ThreadPoolExecutor(min(_AT_A_TIME, len(names))) as pool:
        found = pool.map(lambda name: _why_silent(name, port), names)
    return {name: why for name, why in zip(names, found, strict=True) if why}


def exclude(job_id: str, names: Iterable[str], needed: int) -> Exclusion:
    """Keeps a pending job off nodes, beside those that it is kept off already (ExcNodeList).

    Not where the job would then wait for ever: the partition has too few nodes without them, or the user has
    asked for one of them by name. A node that is down isn't chosen anyway.

    Args:
        job_id: `123_4` for an array's task. It must be pending: Slurm takes no such change of a running job.
        names: the nodes.
        needed: nodes that the job needs.
    """
    done = control.run(["scontrol", "show", "job", "-o", job_id])
    if done.returncode != 0:
        return Exclusion(refused=control.said(done))
    fields = dict(re.findall(r"(?:^| )(\w+)=(\S*)", done.stdout))
    asked_for = set(_hosts(fields.get("ReqNodeList", "")))
    before = set(_hosts(fields.get("ExcNodeList", "")))
    wanted = sorted(set(names) - asked_for)
    named = sorted(set(names) & asked_for)
    if not wanted:
        return Exclusion(refused=f"{', '.join(named)}: the job asks for it by name")
    there = set(_partition_nodes(fields.get("Partition", "")))
    left = len(there - before - set(wanted))
    if there and left < needed:
        return Exclusion(
            refused=f"the partition has {left} other nodes, and the job needs {needed}: it is off "
            f"{', '.join(wanted)} for as long as Slurm calls it down"
        )
    everything = ",".join(sorted(before | set(wanted)))
    done = control.run(["scontrol", "update", f"jobid={job_id}", f"ExcNodeList={everything}"])
    if done.returncode != 0:
        return Exclusion(refused=control.said(done))
    return Exclusion(
        excluded=tuple(wanted), refused=f"{', '.join(named)}: the job asks for it by name" if named else ""
    )


def start_without_waiting(job_id: str) -> str:
    """Takes a pending job's dependency away; returns Slurm's words if it refuses.

    A successor waits for the end of the job before it, and a job that has lost a node ends only once Slurm calls
    the node down (SlurmdTimeout). What may still run there is fenced off (hpcdl.runs.fence).

    Args:
        job_id: `123_4` for an array's task.
    """
    done = control.run(["scontrol", "update", f"jobid={job_id}", "Dependency="])
    return "" if done.returncode == 0 else control.said(done)


def down(names: Iterable[str]) -> dict[str, str]:
    """Which of these nodes Slurm itself calls down or out of reach, each with its state in Slurm's words."""
    found = {}
    for name in names:
        done = control.run(["scontrol", "show", "node", "-o", name])
        state = re.search(r" State=(\S+)", done.stdout)
        if done.returncode == 0 and state and re.search(r"DOWN|\*|FAIL|NOT_RESPONDING|DRAIN", state.group(1)):
            reason = re.search(r" Reason=(.*?)(?: \[|$)", done.stdout)
            found[name] = state.group(1) + (f" ({reason.group(1)})" if reason else "")
    return found


def _why_silent(name: str, port: int) -> str:
    address = name
    done = control.run(["scontrol", "show", "node", "-o", name])
    if done.returncode == 0:
        fields = dict(re.findall(r"(?:^| )(\w+)=(\S*)", done.stdout))
        address, port = fields.get("NodeAddr", name), int(fields.get("Port", port))
    try:
        socket.create_connection((address, port), timeout=_ANSWER_S).close()
    except socket.gaierror:
        return f"its name {address} has no address any more"
    except TimeoutError:
        return f"no answer within {_ANSWER_S:g} s"
    except OSError as error:
        return f"its slurmd does not answer ({error.strerror or error})"
    return ""


def _slurmd_port() -> int:
    done = control.run(["scontrol", "show", "config"])
    found = re.search(r"^SlurmdPort\s*= (\d+)", done.stdout, re.M)
    return int(found.group(1)) if found else _SLURMD_PORT


def _partition_nodes(partition: str) -> list[str]:
    """Its nodes, whatever they do now; none where Slurm doesn't say."""
    done = control.run(["sinfo", "-h", "-a", "-N", "-p", partition, "-o", "%N"])
    return done.stdout.split() if done.returncode == 0 and partition else []


def _hosts(text: str) -> tuple[str, ...]:
    return () if text in ("", "(null)") else expand_hosts(text)
