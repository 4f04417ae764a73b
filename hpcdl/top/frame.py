"""One frame as plain text: `hpcdl top --once`, and where there is no terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.text import Text

from hpcdl.runs import status, words
from hpcdl.runs.state import ACTIVE
from hpcdl.top.rows import layout, ordered, plain
from hpcdl.top.watch import Picture, Wanted, Watch


def once(watch: Watch) -> Picture:
    """All runs read, and Slurm asked: however many there are, that is one look."""
    picture = watch.refresh()
    while picture.unread:
        picture = watch.refresh()
    return watch.refresh() if watch.ask() else picture


def lines(picture: Picture, wanted: Wanted, width: int) -> Iterator[str]:
    """The frame's lines.

    Args:
        picture: what is known.
        wanted: which runs were asked for.
        width: characters.
    """
    rows = ordered(picture.rows, "state")
    if rows:
        fitting = layout(width)
        yield fitting.heading.plain.rstrip()
        yield from (fitting.line(row).plain.rstrip() for row in rows)
        for row in rows:
            for warning in row.warnings:
                yield plain(f"! {row.state.run_id} {warning.word}: {warning.text}").plain
        yield status.summary([row.view for row in rows])
    else:
        yield nothing(picture, wanted)
    if picture.slurm.away:
        yield plain(f"Slurm does not answer: {picture.slurm.away}").plain


def nothing(picture: Picture, wanted: Wanted) -> str:
    """What is said where there is no run to show."""
    if picture.unread:
        return f"reading {picture.unread:,} runs …"
    if picture.hidden:
        ended = f"{picture.hidden:,} run{'s' if picture.hidden > 1 else ''} ended over an hour ago"
        return f"no active run in {wanted.folder}; {ended} (hpcdl top --all shows them)"
    return f"no run yet in {wanted.folder}: hpcdl launch starts one; --runs-dir or $HPCDL_RUNS names another folder"


def heading(picture: Picture, wanted: Wanted, sort: str, pattern: str, shown: int) -> Text:
    """The screen's first line.

    Args:
        picture: what is known.
        wanted: which runs were asked for.
        sort: what the table is sorted by.
        pattern: what it is filtered by; empty: not.
        shown: rows that fit the pattern.
    """
    text = Text(counts(picture), end="")
    if picture.unread:
        text.append(f"  reading {picture.unread:,} more …", style="yellow")
    if pattern:
        text.append_text(plain(f"  /{pattern} ({shown})", "yellow"))
    if sort != "state":
        text.append(f"  by {sort}", style="dim")
    if picture.faults:
        text.append(f"  {len(picture.faults)} unreadable", style="red")
    if picture.hidden and not wanted.everything:
        text.append(f"  {picture.hidden:,} older", style="dim")
    return text


def counts(picture: Picture) -> str:
    """How many runs are how: `3 running · 1 pending · 2 failed · 1 done`."""
    words_of = {"COMPLETED": "done", **{word: word.lower() for word in (*ACTIVE, "CANCELLED")}}
    found = Counter(words_of.get(row.state.state, "failed") for row in picture.rows)
    order = ("running", "pending", "unknown", "failed", "cancelled", "done")
    return " · ".join(f"{found[word]} {word}" for word in order if found[word]) or "no run"


def slurm_words(picture: Picture) -> Text:
    """When Slurm was asked last, and whether it answers."""
    news = picture.slurm
    if not news.needed:
        return Text("")
    if news.asked_ago_s is None:
        return Text("  Slurm is being asked", style="dim")
    if news.away:
        return plain(f"  Slurm does not answer; again in {words.age(news.next_in_s)}", "bold red")
    return Text(f"  Slurm asked {words.age(news.asked_ago_s)} ago", style="dim")
