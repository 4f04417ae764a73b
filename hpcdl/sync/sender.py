"""The process that sends: orders on standard input, an answer to each on standard output, JSON lines.

    {"do": "send", "run": DIR, "to": "wandb" | "tensorboard", "folder": DIR | null, "limit_s": 300,
     "known": DIGEST | null, "project": NAME | null, "entity": NAME | null}
    {"do": "follow", …}     sends rows as they come, until the order {"do": "end"}

    {"done": "sent" | "same" | "there", "rows": 120, "digest": "…", "url": "…"}
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpcdl import secrets
from hpcdl.errors import UsageError
from hpcdl.monitor import records
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir
from hpcdl.runs.tail import Tail
from hpcdl.sync import sinks
from hpcdl.sync.sinks import NotTakenError
from hpcdl.sync.story import Gatherer, Head, Row, read_head, read_summary, tell

POLL_S = 1.0
"""How often a run that is followed is looked at: its shared disk is asked for sizes only."""

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
    story = tell(run)
    head = _placed(story.head, order)
    said = {"digest": story.digest, "rows": len(story.rows)}
    if order["known"] == story.digest:
        return {"done": "same", **said}
    if order["to"] == "wandb":
        path = "/".join(part for part in (head.entity, head.project, head.run_id) if part)
        if sinks.digest_on_server(path, order["limit_s"]) == story.digest:
            return {"done": "there", **said}
    with _sink(order, head) as sink:
        for row in story.rows:
            sink.add(row)
        failed = story.summary.get("state") not in {"COMPLETED", *ACTIVE}
        sink.finish(story.summary, story.digest, failed=failed)
        return {"done": "sent", "url": sink.url, **said}


def follow(order: Order, orders: Orders) -> dict[str, Any]:
    """Sends a run's rows as they come, those of earlier tries first."""
    run = RunDir(Path(order["run"]))
    with _sink(order, _placed(read_head(run), order)) as sink:
        live, count = Live(run), 0
        over = False
        while not over:
            with contextlib.suppress(queue.Empty):
                over = orders.next(POLL_S) is not None or orders.abandoned
            for row in live.rows(last=over):
                sink.add(row)
                count += 1
            sink.flush()
        if orders.abandoned:  # a newer try may be sending already: say nothing more
            os._exit(1)
        # How the run stands is for its agent to say, later.
        known = {key: value for key, value in read_summary(run).items() if key not in ("state", "reason")}
        sink.finish(known, None, failed=False)
    return {"done": "sent", "rows": count}


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


def _placed(head: Head, order: Order) -> Head:
    return replace(
        head, project=order.get("project") or head.project, entity=order.get("entity") or head.entity
    )


def _sink(order: Order, head: Head) -> contextlib.AbstractContextManager[sinks.Sink]:
    folder = Path(order["folder"]) if order.get("folder") else None
    return sinks.opened(order["to"], head, limit_s=order["limit_s"], folder=folder)


if __name__ == "__main__":
    main()
