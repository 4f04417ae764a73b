"""The process that sends: orders on standard input, an answer to each on standard output, JSON lines.

    {"do": "send", "run": DIR, "to": "wandb" | "tensorboard", "place": NAME, "folder": DIR | null, "limit_s": 300,
     "project": NAME | null, "entity": NAME | null}        whoever gives it holds the run's lock (record.held)
    {"do": "follow", …}     sends rows as they come, until the order {"do": "end"}

    {"done": "sent" | "same" | "there", "rows": 120, "url": "…"}
    {"fault": "words"}

It is a process of its own so that a server that hangs, or wandb itself, can be ended without ending who asked. It ends
with whoever holds its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcdl import secrets
from hpcdl.errors import UsageError
from hpcdl.monitor import records
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir, now
from hpcdl.runs.tail import Tail
from hpcdl.sync import record, sinks
from hpcdl.sync.record import Place, Sent
from hpcdl.sync.sinks import NotTakenError, Sink
from hpcdl.sync.story import Gatherer, Head, Row, prefix, read_head, read_summary, rows_of, tell

POLL_S = 1.0
"""How often a run that is followed is looked at."""

Order = dict[str, Any]


def main() -> None:
    """Carries out orders until there are none."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what wandb prints is for people, and stands on standard error
    orders = Orders()
    while (order := orders.next()) is not None:
        print(json.dumps(_carried_out(order, orders)), file=answers, flush=True)
        orders.busy = False
    answers.close()


class Orders:
    """Standard input, read all the while: its end must be seen while something is being sent."""

    def __init__(self) -> None:
        self._lines: queue.Queue[Order | None] = queue.Queue()
        self.busy = False
        """Whether a sending goes on that has no use once nobody waits for its answer."""
        self.abandoned = False
        """Whether whoever gave orders is gone."""
        threading.Thread(target=self._read, daemon=True).start()

    def next(self, wait_s: float | None = None) -> Order | None:
        """The next order; None at the end.

        Args:
            wait_s: None: until there is one.

        Raises:
            queue.Empty: none came meanwhile.
        """
        return self._lines.get(timeout=wait_s)

    def _read(self) -> None:
        for line in sys.stdin:
            self._lines.put(json.loads(line))
        self.abandoned = True
        self._lines.put(None)
        if self.busy:
            os._exit(1)


def _carried_out(order: Order, orders: Orders) -> dict[str, Any]:
    try:
        if order["do"] == "send":
            orders.busy = True
            return send(order)
        return follow(order, orders)
    except Exception as error:
        kind = "" if isinstance(error, NotTakenError | UsageError) else f"{type(error).__name__}: "
        return {"fault": secrets.hide(secrets.mask(f"{kind}{error}"))}


def send(order: Order) -> dict[str, Any]:
    """Sends all that is there of a run now, unless it is there already."""
    run = RunDir(Path(order["run"]))
    stamp, story = record.stamp(run), tell(run)
    goes_on = story.summary.get("state") in ACTIVE
    # A step that has no later one may get an evaluation yet, and what was sent of it can't be changed.
    rows = story.rows[:-1] if goes_on and order["to"] == "wandb" else story.rows
    known = record.read(run, order["place"])
    last = rows[-1].step if rows else -1
    sent = Sent(
        digest=story.digest,
        stamp=stamp,
        rows=len(rows),
        time=now(),
        last_step=last,
        prefix=prefix(rows, last),
    )
    head = _placed(story.head, order)
    if known.sent is not None and known.sent.digest == story.digest:
        sent = replace(known.sent, stamp=stamp)
        record.write(run, order["place"], replace(known, sent=sent))
        return {"done": "same", "rows": sent.rows, "url": sent.url}
    if order["to"] == "wandb" and not known.used:  # never sent, or sync.json was lost
        there = sinks.digest_on_server(sinks.path_of(head, head.run_id), order["limit_s"])
        if there == story.digest:
            record.write(run, order["place"], Place(sent=replace(sent, id=head.run_id), used=1))
            return {"done": "there", "rows": len(rows), "url": ""}
        if there is not None:  # something else of this id: by another run directory, or half of it
            known = Place(spoiled=(head.run_id,), used=1)
    with opened(order, run, head, known, rows, live=False) as (sink, begun):
        for row in rows:
            sink.add(row)
        failed = not goes_on and story.summary.get("state") != "COMPLETED"
        sink.finish(story.summary, story.digest, failed=failed)
        _done(order, run, sink, begun, sent)
        return {"done": "sent", "rows": len(rows), "url": sink.url}


def follow(order: Order, orders: Orders) -> dict[str, Any]:
    """Sends a run's rows as they come, those of earlier tries first."""
    run = RunDir(Path(order["run"]))
    head = _placed(read_head(run), order)
    with record.held(run, order["to"], lambda: not orders.abandoned):
        live = Live(run)
        rows = live.rows()
        known = record.read(run, order["place"])
        with opened(order, run, head, known, list(rows_of(run)), live=True) as (sink, begun):
            for row in rows:
                sink.add(row)
            over = False
            while not over:
                with contextlib.suppress(queue.Empty):
                    over = orders.next(POLL_S) is not None or orders.abandoned
                for row in live.rows(last=over):
                    sink.add(row)
                    rows.append(row)
                sink.flush()
            if orders.abandoned:  # a newer try may be sending already: say nothing more
                os._exit(1)
            last = rows[-1].step if rows else -1
            digest = prefix(rows, last)
            # How the run stands is for its agent to say, later: then there is something new for `hpcdl sync`.
            summary = {
                key: value for key, value in read_summary(run).items() if key not in ("state", "reason")
            }
            sink.finish(summary, digest, failed=False)
            sent = Sent(digest=digest, stamp={}, rows=len(rows), time=now(), last_step=last, prefix=digest)
            _done(order, run, sink, begun, sent)
    return {"done": "sent", "rows": len(rows), "url": sink.url}


class Live:
    """The rows of a run that goes on: each once, as soon as a later step is there."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._gatherer = Gatherer()
        self._metrics = Tail(run.metrics_file)
        self._systems: dict[str, Tail] = {}

    def rows(self, *, last: bool = False) -> list[Row]:
        """Those that are new.

        Args:
            last: the run is over: the row that has no later one too.
        """
        for node in records.nodes(self._run):
            tail = self._systems.setdefault(node, Tail(self._run.path / f"system-{node}.jsonl", glance=True))
            self._gatherer.samples(records.of_line(line, node) for line in tail.records())
        rows = [self._gatherer.line(line) for line in self._metrics.records()]
        rows.append(self._gatherer.end() if last else None)
        return [row for row in rows if row is not None]


@contextlib.contextmanager
def opened(
    order: Order, run: RunDir, head: Head, known: Place, rows: list[Row], *, live: bool
) -> Iterator[tuple[Sink, Place]]:
    """The place that rows go to, ready for those that it doesn't have.

    Args:
        order: says which.
        run: whose rows.
        head: what the run is.
        known: what is remembered of the place.
        rows: all that are there now.
        live: a try of the run sends them itself.

    Yields:
        The place; and what is remembered should the sending never end.
    """
    if order["to"] == "tensorboard":
        with contextlib.closing(sinks.Board(head, Path(order["folder"]))) as board:
            yield board, known
        return
    had, used = known.sent, known.used
    if had is not None and _can_be_added_to(order, head, had, rows):
        sink = sinks.Wandb(head, had.id, order["limit_s"], after=had.last_step)
    else:
        while True:
            name = f"{head.run_id}-{used}" if used else head.run_id
            used += 1
            try:
                sink = sinks.Wandb(head, name, order["limit_s"])
                break
            except Exception as error:
                if "previously created and deleted" not in str(error):
                    raise
    with contextlib.closing(sink):
        spoiled = {*known.spoiled, *([had.id] if had else []), sink.id}
        begun = Place(spoiled=tuple(sorted(spoiled)), used=used, live=live)
        record.write(run, order["place"], begun)
        yield sink, begun


def _can_be_added_to(order: Order, head: Head, had: Sent, rows: list[Row]) -> bool:
    """Whether the steps that are there are still ours, and nobody has deleted or changed the run there."""
    if prefix(rows, had.last_step) != had.prefix:
        return False
    return sinks.digest_on_server(sinks.path_of(head, had.id), order["limit_s"]) == had.digest


def _done(order: Order, run: RunDir, sink: Sink, begun: Place, sent: Sent) -> None:
    """Remembers that all is there, and deletes what is there in vain."""
    others = [name for name in begun.spoiled if name != sink.id]
    sent = replace(sent, id=sink.id, url=secrets.mask(sink.url))
    record.write(run, order["place"], Place(sent=sent, spoiled=tuple(others), used=begun.used))
    left = tuple(name for name in others if not sink.delete(name))
    if left != tuple(others):
        record.write(run, order["place"], Place(sent=sent, spoiled=left, used=begun.used))


def _placed(head: Head, order: Order) -> Head:
    return replace(
        head, project=order.get("project") or head.project, entity=order.get("entity") or head.entity
    )


if __name__ == "__main__":
    main()
