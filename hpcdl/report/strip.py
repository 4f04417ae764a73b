"""The timeline as a strip a try: stretches and marks at their places, in per cent of the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpcdl.report import scale
from hpcdl.runs import words

MOST_TRIES = 60
"""Strips that a page draws; the table beside them has all."""
_APART = 0.4
"""Per cent of the width: marks of one kind that are nearer are drawn as one."""


def of_tries(tries: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the template draws; None for a run that was never submitted."""
    starts = [span["start"] for each in tries for span in each["spans"]]
    ends = [span["end"] for each in tries for span in each["spans"]]
    if not starts:
        return None
    begin, end = min(starts), max(ends)
    whole = max(words.between(begin, end), 1e-3)
    drawn = scale.along(0.0, whole, scale.SECONDS, most=5)

    def at(time: str) -> float:
        return round(min(100.0, max(0.0, 100 * words.between(begin, time) / whole)), 2)

    return {
        "begin": begin,
        "ticks": [
            {"at": round(100 * drawn.share(t), 2), "text": scale.written(t, scale.SECONDS)}
            for t in drawn.ticks
        ],
        "rows": [_row(each, at) for each in tries[-MOST_TRIES:]],
        "left_out": max(0, len(tries) - MOST_TRIES),
    }


def _row(each: Mapping[str, Any], at: Any) -> dict[str, Any]:
    order = {"queued": 0, "starting": 1, "running": 2, "lost": 3}
    spans = sorted(each["spans"], key=lambda span: order.get(span["kind"], 0))
    return {
        "label": f"try {each['number']}" if each["number"] else "in the queue",
        "spans": [
            {
                "kind": span["kind"],
                "at": at(span["start"]),
                "width": round(max(0.3, at(span["end"]) - at(span["start"])), 2),
                "text": f"{_SPANS[span['kind']]}: "
                + scale.time(max(0.0, words.between(span["start"], span["end"]))),
            }
            for span in spans
        ],
        "marks": _marks(each["marks"], at),
    }


_SPANS = {
    "queued": "in the queue",
    "starting": "starting",
    "running": "running",
    "lost": "to be done again",
}


def _marks(marks: Sequence[Mapping[str, Any]], at: Any) -> list[dict[str, Any]]:
    drawn: list[dict[str, Any]] = []
    last: dict[str, dict[str, Any]] = {}
    for mark in sorted(marks, key=lambda each: each["time"]):
        place, before = at(mark["time"]), last.get(mark["kind"])
        if (
            before is not None
            and place - before["at"] < _APART
            and mark["kind"] in ("checkpoint", "evaluation")
        ):
            before["text"] = f"{before['text'].partition(' … ')[0]} … {mark['text']}"
            continue
        last[mark["kind"]] = {"kind": mark["kind"], "at": place, "text": mark["text"]}
        drawn.append(last[mark["kind"]])
    return drawn
