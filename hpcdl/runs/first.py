"""The first error of the first failing rank: what the others' errors come from, with what stood around it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from hpcdl.runs import failure, words
from hpcdl.runs.failure import Failure
from hpcdl.runs.kinds import WORDS
from hpcdl.runs.store import RunDir

BEFORE = 12
"""Lines of the rank that are shown from before its error."""
SHOWN_RANKS = 8
LONGEST = 200
"""Characters of another rank's message."""
_VARIES = re.compile(r"\[[\d.:a-f]+\](:\d+)?|0x[0-9a-f]+|\b\d+(\.\d+)*\b")
"""Addresses, ports and numbers, in which the same message differs from rank to rank."""
_PLACE = re.compile(r"^\[(enforce fail at )?/?[\w./-]+:\d+\] ")
"""Where in the C++ sources of torch or gloo a message comes from."""
_LATE_S = 1.0
"""A line gets its time when its agent reads it: torchrun passes it on a little later than it was printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class First:
    """Why a try failed, or why its ranks were restarted in place."""

    failure: Failure
    before: tuple[str, ...]
    """The last lines of the rank before its error, with their times."""
    others: tuple[tuple[str, tuple[int, ...]], ...]
    """What the other ranks said, and which ones; the most frequent first."""
    log: Path | None
    """The node's log of that try."""
    stacks: tuple[Path, ...] = ()
    """Where every rank was, after a hang."""


def of_run(run: RunDir) -> First | None:
    """The first error of the newest failure; None where nobody has left one."""
    newest = _newest(failure.failures(run))
    verdict = next((one for one in newest if one.is_verdict), None)
    said = [one for one in newest if not one.is_verdict]
    found = verdict or failure.earliest(said)
    if found is None:
        return None
    log = run.logs / f"{found.node}-try{found.attempt}.log"
    others: dict[str, tuple[str, set[int]]] = {}
    spoken = {one.rank for one in said if not one.by_torchrun}
    for one in said:
        if one.rank not in (None, found.rank) and not (one.by_torchrun and one.rank in spoken):
            text = _short(one)
            others.setdefault(_VARIES.sub("#", text), (text, set()))[1].add(one.rank)
    ordered = sorted(others.values(), key=lambda item: (-len(item[1]), min(item[1])))
    return First(
        failure=found,
        before=tuple(_before(log, found)),
        others=tuple((text, tuple(sorted(ranks))) for text, ranks in ordered),
        log=log if log.exists() else None,
        stacks=tuple(sorted(run.errors.glob(f"try{found.attempt}-restart{found.restart or 0}-*-stacks.txt")))
        if found.kind == "hang"
        else (),
    )


def _newest(found: Sequence[Failure]) -> list[Failure]:
    """Those of the last try, and in it after its last restart in place."""
    if not found:
        return []
    attempt = max((one.attempt for one in found), key=_numbers)
    of_try = [one for one in found if one.attempt == attempt]
    restarts = [one.restart for one in of_try if one.restart is not None]
    last = max(restarts, default=0)
    ended = [one for one in of_try if one.restart is None]
    since = max((one.time for one in of_try if one.restart is not None and one.restart < last), default="")
    return [one for one in of_try if one.restart == last] + [one for one in ended if one.time >= since]


def _numbers(attempt: str) -> tuple[int, ...]:
    return tuple(int(part) for part in attempt.split(".") if part.isdigit())


def _short(one: Failure) -> str:
    lines = one.message.strip().splitlines()
    text = f"{one.type}: {_PLACE.sub('', lines[0])}" if lines else one.type
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _before(log: Path, found: Failure) -> Iterator[str]:
    """The rank's lines until its error: its traceback begins where `Traceback` stands."""
    if found.rank is None or not log.exists():
        return
    mark = f" [rank {found.rank}] "
    until = failure.later(found.time, _LATE_S)
    kept: list[str] = []
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            stamp, here, text = line.rstrip("\n").partition(mark)
            if not here or " " in stamp:
                continue
            if stamp > until:
                break
            text, trace, _ = text.partition("Traceback (most recent call last)")
            if trace and stamp >= failure.later(found.time, -_LATE_S):
                kept += [f"{stamp} {text}"] if text.strip() else []
                break
            text += trace
            kept = [*kept[1 - BEFORE :], f"{stamp} {text}"] if text.strip() else kept
    yield from kept


def in_words(first: First, run_id: str) -> Iterator[str]:
    """Lines for whoever asks `hpcdl logs RUN --error`."""
    found = first.failure
    who = "no rank" if found.rank is None else f"rank {found.rank}"
    again = f", restart {found.restart}" if found.restart else ""
    yield f"first error  {who} on node {found.node}, try {found.attempt}{again}, {_clock(found.time)}"
    if found.kind != "unknown":
        yield f"what it is   {WORDS.get(found.kind, found.kind)}"
    message = found.message.strip().splitlines() or [""]
    yield f"{found.type}: {message[0]}" if message[0] else found.type
    yield from message[1:]
    trace = found.traceback.rstrip().splitlines()
    if first.before and first.before[-1].partition(" ")[2] not in trace:
        yield ""
        yield "before it this rank printed"
        yield from (
            f"  {_clock(stamp)} {text}" for stamp, _, text in (s.partition(" ") for s in first.before)
        )
    if trace and [line.strip() for line in trace] != [line.strip() for line in message]:
        yield ""
        yield "traceback" if any(line.startswith("Traceback") for line in trace) else "its last lines"
        yield from (f"  {line}" for line in trace)
    if first.others:
        yield ""
        count = sum(len(ranks) for _, ranks in first.others)
        yield f"{count} other rank{'s' * (count != 1)} failed after it"
        yield from (f"  {in_short(ranks)}: {text}" for text, ranks in first.others[:SHOWN_RANKS])
        if len(first.others) > SHOWN_RANKS:
            yield f"  … and {len(first.others) - SHOWN_RANKS} other messages"
    if first.stacks:
        yield ""
        yield f"the stacks of {len(first.stacks)} ranks  {first.stacks[0].parent}/{_pattern(first.stacks)}"
    if first.log is not None and found.rank is not None:
        yield ""
        yield f"hpcdl logs {run_id} --rank {found.rank} --try {found.attempt}  # all that this rank printed"


def _pattern(stacks: Sequence[Path]) -> str:
    return re.sub(r"-rank\d+-", "-rank*-", stacks[0].name)


def in_short(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1, 4-63`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    said = [f"{a}" if a == b else f"{a}-{b}" if b - a > 1 else f"{a}, {b}" for a, b in spans]
    more = ", …" if len(said) > SHOWN_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(said[:SHOWN_RANKS])}{more}"


def _clock(time: str) -> str:
    try:
        return f"{datetime.fromisoformat(time).astimezone():%H:%M:%S}"
    except ValueError:
        return words.local(time)
