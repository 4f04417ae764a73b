"""Commands on runs of a cluster: the same command, done there; its output and its exit code are passed on.

Which runs are there is known from what was submitted from here (hpcdl.runs.away), or said with --host. A host that
doesn't answer is told as such: its runs are UNKNOWN, with what they were when it was last heard of.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpcdl.errors import ConfigError, UsageError
from hpcdl.launch.remote import carry, envelope, probe
from hpcdl.launch.remote.connection import Connection, Done, HostError
from hpcdl.runs import away, query, terminal
from hpcdl.runs.away import Place
from hpcdl.runs.judge import clock
from hpcdl.spec import ClusterSpec

LIVE = frozenset({"logs", "follow", "cancel", "resubmit", "top"})
"""Commands that go on for a while, or ask: they have the terminal. The others are heard to their end."""
FILES = {"compare": "plot", "report": "output"}
"""Options that name a file to be made: it is brought here."""
RETRIES_S = (1.0, 3.0, 10.0, 30.0, 60.0, 120.0)
"""Waits before a connection that was cut is made again, while runs are followed."""
SHOWN = 20
"""Runs of a host that doesn't answer."""
HERE = frozenset({"verb", "runs_key", "verb_name", "host", "runs_dir"})
"""What only this side is told."""
Local = Callable[[argparse.Namespace], int]


def run(options: argparse.Namespace, local: Local) -> int:
    """A command on runs, wherever they lie; returns the exit code.

    Args:
        options: of the command.
        local: does it with runs of this machine.

    Raises:
        HostError: the machine that they lie on can't be reached.
        UsageError: nothing has that name, or the words name runs of several machines.
    """
    folder = query.runs_dir(options.runs_dir)
    given = getattr(options, options.runs_key)
    words = [given] if isinstance(given, str) else list(given or [])
    places = away.places(folder)
    if options.host is not None:
        return Away(folder, _named(options.host, places)).do(options, words)
    if not words:
        return (
            _everything(options, local, folder, places) if options.verb_name == "status" else local(options)
        )
    sorted_out = _sorted_out(words, folder, places)
    if len(sorted_out) > 1 and options.verb_name != "status":
        where = "; ".join(
            f"{place.host if place else 'here'}: {' '.join(own)}" for place, own in sorted_out.items()
        )
        raise UsageError(f"these runs lie on different machines ({where})\nfix: a call for each")
    if list(sorted_out) == [None]:
        return local(options)
    if len(sorted_out) > 1 and options.json:
        return _joined(options, local, folder, sorted_out)
    code = 0
    for place, own in sorted_out.items():
        code = max(code, Away(folder, place).do(options, own) if place else local(_with(options, own)))
    return code


def _named(host: str, places: Sequence[Place]) -> Place:
    """The place that --host names: one that is known, or a new one, with HOST:FOLDER."""
    name, _, folder = host.partition(":")
    for place in places:
        if place.host == name and folder in ("", place.folder):
            return place
    from hpcdl.experiment.login import ALLOWED, RULES

    wanted = ClusterSpec(kind="slurm", login_host=name)
    if any(True for rule in RULES for _ in rule(wanted)):
        raise UsageError(
            f"--host {host}: is no host's name\nallowed: {ALLOWED}, with :FOLDER of the runs there"
        )
    return Place(host=name, folder=folder or wanted.login_dir)


def _sorted_out(words: Sequence[str], folder: Path, places: Sequence[Place]) -> dict[Place | None, list[str]]:
    """Which machine each word's runs lie on; None: this one. Words that change something (KEY=VALUE) go along."""
    found: dict[Place | None, list[str]] = {}
    changes = [word for word in words if "=" in word]
    for word in words:
        if word in changes:
            continue
        place, word_there = (
            _latest(folder, places) if word == "latest" else (_place_of(word, folder, places), word)
        )
        found.setdefault(place, []).append(word_there)
    for own in found.values():
        own += changes
    return found or {None: list(words)}


def _place_of(word: str, folder: Path, places: Sequence[Place]) -> Place | None:
    """The machine of a word's runs; where nobody knows the word, the only cluster there is may."""
    there = [place for place in places if any(away.fits(run, word) for run in away.known(folder, place))]
    with contextlib.suppress(UsageError):
        query.find(word, folder)
        if there:
            _remark(f"{word} is here; {there[0].host} has one, too: --host {there[0].host}")
        return None
    if len(there) > 1:
        hosts = ", ".join(f"{place.host}:{place.folder}" for place in there)
        raise UsageError(f"{word} is on several clusters: {hosts}\nfix: --host HOST:FOLDER")
    if there:
        return there[0]
    return places[0] if len(places) == 1 else None


def _latest(folder: Path, places: Sequence[Place]) -> tuple[Place | None, str]:
    """The run launched last, here or elsewhere."""
    times = [(run.submitted, place, run.run_id) for place in places for run in away.known(folder, place)[-1:]]
    newest = max(times, key=lambda one: one[0], default=None)
    try:
        (own,) = query.find("latest", folder)
    except UsageError:
        own = None
    if newest is None or (own is not None and own.read_state().created >= newest[0]):
        return None, "latest"
    return newest[1], newest[2]


def _with(options: argparse.Namespace, words: Sequence[str], **more: Any) -> argparse.Namespace:
    """The options with other words."""
    single = isinstance(getattr(options, options.runs_key), str)
    return argparse.Namespace(
        **{**vars(options), options.runs_key: words[0] if single else list(words), **more}
    )


def _everything(options: argparse.Namespace, local: Local, folder: Path, places: Sequence[Place]) -> int:
    """`hpcdl status` without words: this machine's runs, then each cluster's."""
    if options.json:
        return _joined(options, local, folder, {None: [], **{place: [] for place in places}})
    own = any(folder.glob("[!.]*/*/state.json"))
    if own:
        local(options)
    for number, place in enumerate(places):
        print(f"{chr(10) * (own or number > 0)}{terminal.line(f'{place.host}:{place.folder}')}", flush=True)
        Away(folder, place).do(options, [])
    return 0


def _joined(
    options: argparse.Namespace, local: Local, folder: Path, asked: dict[Place | None, list[str]]
) -> int:
    """One list for scripts; runs of a cluster say so by `host`."""
    rows: list[dict[str, Any]] = []
    for place, words in asked.items():
        if place is None:
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                local(_with(options, words))
            found = json.loads(text.getvalue())
            rows += found if isinstance(found, list) else [found]
        else:
            rows += Away(folder, place).rows(_with(options, words))
    print(json.dumps(rows, indent=1, ensure_ascii=False))
    return 0


def _remark(line: str) -> None:
    print(terminal.line(f"[{line}]", to=sys.stderr), file=sys.stderr, flush=True)


class Away:
    """Commands on runs of one place.

    Args:
        folder: of all runs here, where it is written down what was heard.
        place: where they lie.
    """

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self.place = folder, place
        self.connection = Connection(place.host)

    def do(self, options: argparse.Namespace, words: Sequence[str]) -> int:
        """Does it there; returns its exit code.

        Raises:
            HostError: the host can't be reached. Of a status it is told, with what was known before.
        """
        options = _with(options, words) if words or options.verb_name == "status" else options
        if options.verb_name == "status":
            return self._status(options)
        self.connection.open()
        if options.verb_name == "follow":
            code = self._code()
            return follow(self.connection, self.place, words, code)
        if options.verb_name in LIVE and not getattr(options, "once", False):
            code = self._code()  # which may find out where that place is
            return self.connection.stream(_script(self.place, code, self._asked(options)))
        return self._heard(options)

    def rows(self, options: argparse.Namespace) -> list[dict[str, Any]]:
        """How runs stand, for scripts."""
        try:
            done = self._capture(options, {})
            text, _, answer = done.stdout.rpartition(envelope.ANSWER)
            self._saw(answer)
            print(terminal.line(done.stderr, to=sys.stderr), end="", file=sys.stderr)
            found = json.loads(text) if done.code == 0 else []
        except HostError as error:
            found = self._unknown(options.runs, error)
        return [{**row, "host": self.place.host} for row in (found if isinstance(found, list) else [found])]

    def _status(self, options: argparse.Namespace) -> int:
        if options.json:
            rows = self.rows(options)
            single = len(options.runs) == 1 and len(rows) == 1
            print(json.dumps(rows[0] if single else rows, indent=1, ensure_ascii=False))
            return 0 if rows or not options.runs else 2
        try:
            return self._heard(options)
        except HostError as error:
            _print_unknown(self._unknown(options.runs, error), error)
            return 0

    def _unknown(self, words: Sequence[str], error: HostError) -> list[dict[str, Any]]:
        """What is known of runs whose host is away: what they were, and when that was."""
        seen, at = away.last_seen(self.folder, self.place)
        rows = {str(row.get("run_id")): row for row in seen}
        found = []
        for one in reversed(away.known(self.folder, self.place)):
            if words and not any(away.fits(one, word) for word in words):
                continue
            row = rows.get(
                one.run_id,
                {"run_id": one.run_id, "name": one.name, "job_id": one.job_id, "run_dir": one.run_dir},
            )
            said = (
                f"{row['state']} at {clock(at)}" if "state" in row else f"submitted at {clock(one.submitted)}"
            )
            reason = f"unknown since {clock(at or one.submitted)}: {error.problem}; {said}"
            found.append(
                {
                    **row,
                    "last_state": row.get("state"),
                    "last_seen": at or None,
                    "state": "UNKNOWN",
                    "reason": reason,
                }
            )
        return found

    def _heard(self, options: argparse.Namespace) -> int:
        """The command's whole output, as if it had been done here."""
        key = FILES.get(options.verb_name)
        wanted = getattr(options, key) if key else None
        wish = {}
        if key == "output" or wanted is not None:
            wish = {"file": key, "file_name": _name_of(wanted, options.verb_name)}
        done = self._capture(options, wish)
        text, _, answer = done.stdout.rpartition(envelope.ANSWER)
        record = self._saw(answer)
        stderr = done.stderr
        if record.get("made"):
            target = _target(wanted)
            text, stderr = (part.replace(f"{record['made']}/", f"{target}/") for part in (text, stderr))
            if done.code == 0:
                carry.transfer(
                    self.connection, ["-rts", f"{self.place.host}:{record['made']}/", f"{target}/"]
                )
            self.connection.capture(f"rm -rf -- {envelope.words([record['made']])}", limit_s=60)
        print(terminal.coloured(text), end="", flush=True)
        print(terminal.line(stderr, to=sys.stderr), end="", file=sys.stderr, flush=True)
        return done.code

    def _capture(self, options: argparse.Namespace, wish: dict[str, Any]) -> Done:
        self.connection.open()
        code = self._code()
        asked = {**self._asked(options), **wish, "answer": True, "terminal": _terminal()}
        done = self.connection.capture(_script(self.place, code, asked))
        if envelope.ANSWER not in done.stdout:
            raise HostError(
                self.place.host,
                f"hpcdl can't be run there (exit code {done.code}): {done.stderr.strip()[-300:]}",
                "",
            )
        return done

    def _asked(self, options: argparse.Namespace) -> dict[str, Any]:
        kept = {key: value for key, value in vars(options).items() if key not in HERE}
        return {"verb": options.verb_name, "options": kept, "folder": self.place.folder}

    def _saw(self, answer: str) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(answer)
        if record["rows"]:
            away.saw(self.folder, self.place, record["rows"])
        return record

    def _code(self) -> str:
        """The code that does it there: this machine's, carried if it isn't there yet."""
        target = f"{self.place.folder}/.code/{carry.mine().digest}"
        test = f"cd; [ -d {envelope.words([target])} ] || exit {envelope.NO_CODE}"
        if self.place.folder.startswith(os.sep) and self.connection.capture(test, limit_s=60).code == 0:
            return target
        try:
            login = probe.ask(self.connection, self.place, write=True)
        except ConfigError as error:
            raise UsageError(
                "\n".join(f"{self.place.host}: {fault.problem}\nfix: {fault.fix}" for fault in error.faults)
            ) from error
        self.place = login.place
        away.keep(self.folder, self.place, [])
        return carry.code(self.connection, login)


def _script(place: Place, code: str, asked: dict[str, Any]) -> str:
    return f"cd\n{envelope.python(place.python)}exec {envelope.command(code, 'verb', json.dumps(asked))}"


def follow(connection: Connection, place: Place, words: Sequence[str], code: str) -> int:
    """`hpcdl follow` there until the runs are over, over as many connections as it takes; its exit code.

    Raises:
        HostError: the connection was cut, and didn't come back for a while.
    """
    asked = {"verb": "follow", "options": {"runs": list(words)}, "folder": place.folder}
    waits = list(RETRIES_S)
    while True:
        begun = time.monotonic()
        try:
            return connection.stream(_script(place, code, asked))
        except HostError as error:
            if time.monotonic() - begun > waits[0] * 10:
                waits = list(RETRIES_S)
            if not waits:
                more = f"{error.problem}; the runs go on there. hpcdl follow {' '.join(words)} looks at them again"
                raise HostError(error.host, more, error.fix) from error
            wait_s = waits.pop(0)
            _remark(f"{place.host}: {error.problem}; the runs go on there; again in {wait_s:.0f} s")
            time.sleep(wait_s)


def _terminal() -> dict[str, str]:
    """What makes a command there print as it would here."""
    if not sys.stdout.isatty():
        return {}
    size = shutil.get_terminal_size()
    colours = (
        {} if os.environ.get("NO_COLOR") else {"FORCE_COLOR": "1", "TERM": os.environ.get("TERM", "dumb")}
    )
    return {"COLUMNS": str(size.columns), "LINES": str(size.lines), **colours}


def _name_of(wanted: str | None, verb: str) -> str:
    """The name of a file that is to be made there; empty for a folder."""
    if verb == "compare":
        return Path(wanted or "").name or "compare.png"
    if wanted is None or Path(wanted).is_dir() or wanted.endswith(os.sep):
        return ""
    return Path(wanted).name


def _target(wanted: str | None) -> Path:
    """The folder here that it is brought to."""
    if not wanted:
        return Path()
    path = Path(wanted).expanduser()
    return path if path.is_dir() else path.parent


def _print_unknown(rows: Sequence[dict[str, Any]], error: HostError) -> None:
    """A host that doesn't answer, and what its runs were when it last did."""
    fix = f"; {error.fix}" if error.fix else ""
    print(terminal.line(f"{error.host} doesn't answer: {error.problem}{fix}"))
    for row in rows[:SHOWN]:
        said = str(row["reason"]).rpartition("; ")[2]
        print(
            terminal.line(
                f"  {row['run_id']:<15} {row['name']}  UNKNOWN  ({said})  job {row.get('job_id') or '-'}"
            )
        )
    if len(rows) > SHOWN:
        print(f"  … and {len(rows) - SHOWN} more")
