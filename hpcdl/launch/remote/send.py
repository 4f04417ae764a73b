"""`hpcdl launch … cluster.login_host=user@host`: composed here, done there.

A cut connection leaves open whether there was a submission. The same request is then sent again, and finds what the
first one has made: an experiment's digest names its run, and with `force=true`, which would make another one, a token
does, that is written down here before anything is sent and there before anything is made.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcdl import experiment
from hpcdl.errors import ConfigError, Fault, HpcdlError
from hpcdl.experiment.resolve import absolute
from hpcdl.launch import code
from hpcdl.launch.remote import carry, envelope, probe
from hpcdl.launch.remote.connection import Connection, HostError
from hpcdl.launch.remote.probe import Login
from hpcdl.launch.sweep import Drafts
from hpcdl.runs import away, terminal
from hpcdl.runs.away import Known, Place
from hpcdl.runs.files import write_json
from hpcdl.spec import ClusterSpec

RETRIES_S = (0.5, 3.0, 10.0)
"""Waits before the same request is sent again."""
KEYS = ("login_host", "login_dir", "login_python")


def launch(drafts: Drafts) -> int:
    """Launches on the login node that the config names; returns the exit code.

    Raises:
        ConfigError: the config is wrong, or the login node can't be reached or lacks something; nothing was submitted.
        HostError: the connection was cut and did not come back; what to do is said.
    """
    cluster = formed(drafts)
    place = Place(
        host=cluster.login_host or "", folder=cluster.login_dir, python=cluster.login_python or cluster.python
    )
    options = drafts.drafts[0].composed.plain
    here = Path(absolute(str(options["runs_dir"])))
    connection = Connection(place.host)
    try:
        login = probe.ask(connection, place, write=not options["dry_run"])
        folder, throwaway = _code(connection, login, dry=bool(options["dry_run"]))
    except HostError as error:
        raise ConfigError([error.fault]) from error
    request = _request(drafts, login, here)
    answer = _sent(connection, request, _script(login.place, folder, throwaway))
    told = _told(answer, options, login.place)
    if not options["dry_run"]:
        away.keep(here, login.place, [Known(**run) for run in answer["runs"]])
        _pending(here, request).unlink(missing_ok=True)
        if options["wait"] and told in (0, 1):
            return _wait(connection, login.place, answer, folder, told)
    return told


def formed(drafts: Drafts) -> ClusterSpec:
    """The cluster section, where everything that can be judged without the cluster is right.

    Raises:
        ConfigError: it is not; carries every fault.
    """
    labels = [draft.label for draft in drafts.drafts]
    found = [experiment.formed(draft.composed.plain) for draft in drafts.drafts]
    faults = [
        (*draft.composed.faults, *(fault for fault in faults if draft.composed.faults == ()))
        for draft, (_, faults) in zip(drafts.drafts, found, strict=True)
    ]
    if drafts.faults or any(faults):
        raise ConfigError((*drafts.faults, *experiment.merge_faults(zip(labels, faults, strict=True))))
    clusters: list[ClusterSpec] = [parts["cluster"] for parts, _ in found]
    for key in KEYS:
        values = list(dict.fromkeys(str(getattr(cluster, key)) for cluster in clusters))
        if len(values) > 1:
            problem = "can't differ between the points of a sweep: one launch goes to one place"
            fault = Fault(
                key=f"cluster.{key}", value=",".join(values), problem=problem, fix=f"a launch for each {key}"
            )
            raise ConfigError([fault])
    return clusters[0]


def _code(connection: Connection, login: Login, *, dry: bool) -> tuple[str, bool]:
    """Where the code lies there, and whether it is to be taken away afterwards: a dry run changes nothing."""
    if dry and carry.mine().digest not in login.codes:
        return carry.for_now(connection), True
    return carry.code(connection, login), False


def _request(drafts: Drafts, login: Login, here: Path) -> dict[str, Any]:
    """All that the login node is told."""
    as_there = {"login_host": None, "login_dir": ClusterSpec(kind="slurm").login_dir, "login_python": None}
    points: list[dict[str, Any]] = []
    for draft in drafts.drafts:
        plain = {**draft.composed.plain, "runs_dir": login.place.folder, "wait": False}
        plain["cluster"] = {**plain["cluster"], **as_there}
        points.append({"label": draft.label, "plain": plain, "typed": sorted(draft.typed)})
    request: dict[str, Any] = {"points": points, "snapshot": code.snapshot(), "ask": None}
    if points[0]["plain"]["force"] and not points[0]["plain"]["dry_run"]:
        request["ask"] = _token(here, points, login.place)
    return request


def _token(here: Path, points: Sequence[dict[str, Any]], place: Place) -> str:
    """Names this very request: the same as before, where that one's answer never came."""
    text = json.dumps([dataclasses.asdict(place), points], sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    file = here / away.FOLDER / f"asked-{digest}.json"
    try:
        token = str(json.loads(file.read_text(encoding="utf-8"))["ask"])
        print(
            "an earlier launch of the same had no answer: asking what became of it",
            file=sys.stderr,
            flush=True,
        )
    except (OSError, ValueError, KeyError):
        token = f"{digest}-{secrets.token_hex(6)}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.parent.chmod(0o700)
        write_json(file, {"ask": token})
    return token


def _pending(here: Path, request: dict[str, Any]) -> Path:
    return here / away.FOLDER / f"asked-{str(request['ask']).partition('-')[0]}.json"


def _sent(connection: Connection, request: dict[str, Any], script: str) -> dict[str, Any]:
    """Sends the request until it is answered.

    Raises:
        HostError: no answer after several tries.
        HpcdlError: hpcdl broke there; its words are on the screen.
    """
    # A literal surrogate (a diff in an odd encoding) is no UTF-8; JSON's own escapes are.
    data = base64.b64encode(gzip.compress(json.dumps(request).encode(), mtime=0)).decode() + "\n"
    cut: HostError | None = None
    for wait_s in (0.0, *RETRIES_S):
        if cut is not None:
            print(f"{cut.host}: {cut.problem}; asking again what became of it", file=sys.stderr, flush=True)
            time.sleep(wait_s)
        try:
            done = connection.capture(script, data=data)
        except HostError as error:
            cut = error
            continue
        except KeyboardInterrupt:
            print(f"\n{_unknown(connection.host)}", file=sys.stderr, flush=True)
            raise
        text, mark, answer = done.stdout.rpartition(envelope.ANSWER)
        print(terminal.line(done.stderr, to=sys.stderr), end="", file=sys.stderr, flush=True)
        if not mark:
            raise HpcdlError(
                f"{connection.host}: hpcdl ended there with exit code {done.code}, and no answer"
            )
        record: dict[str, Any] = json.loads(answer)
        return {**record, "text": text}
    assert cut is not None
    raise HostError(cut.host, f"{cut.problem}. {_unknown(cut.host)}", cut.fix)


def _unknown(host: str) -> str:
    return f"Whether {host} has submitted is not known: the same command again finds out, and submits nothing twice"


def _script(place: Place, folder: str, throwaway: bool) -> str:
    run = envelope.command(folder, "launch")
    clean = f"trap {envelope.words([f'rm -rf -- {envelope.words([folder])}'])} EXIT\n" if throwaway else ""
    return f"cd\n{envelope.python(place.python)}{clean}{'' if throwaway else 'exec '}{run}"


def _told(answer: dict[str, Any], options: dict[str, Any], place: Place) -> int:
    """Says what the login node says; returns its exit code."""
    if not options["parsable"] and not options["dry_run"] and answer["text"]:
        print(f"on         {place.host}  (its files are there; hpcdl here asks it)")
    print(answer["text"], end="", flush=True)
    return int(answer["code"])


def _wait(connection: Connection, place: Place, answer: dict[str, Any], folder: str, code_so_far: int) -> int:
    """Follows what was submitted, there."""
    from hpcdl.launch.remote import verbs

    runs = [str(run["run_id"]) for run in answer["runs"]]
    return max(code_so_far, verbs.follow(connection, place, runs, folder)) if runs else code_so_far
