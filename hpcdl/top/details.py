"""All about one run as lines: what it is, its nodes, its ranks, its logs, its events."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.text import Text

from hpcdl.monitor import stragglers
from hpcdl.monitor.records import GpuSample, NodeSample, ProcessSample
from hpcdl.runs import failure, logs, status, terminal, words
from hpcdl.runs.reconcile import View
from hpcdl.runs.state import ACTIVE
from hpcdl.runs.store import RunDir
from hpcdl.runs.tail import Tail
from hpcdl.top.reading import Node, Row
from hpcdl.top.rows import FULL, bar, done, fit, percent, plain, size, start_words, why
from hpcdl.top.warnings import Warning

MOST_LINES = 5000
"""Of logs, and of events, that are kept."""
MOST_CHARACTERS = 4000
"""Of one line."""
LOG_WINDOW = 1 << 20
"""Bytes of all logs' ends together that the first look reads."""
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT[\d:.]+\S*) (\[[^\]]{1,40}\])")
_BAD = re.compile(r"\b(error|exception|traceback|killed|fatal)\b", re.IGNORECASE)


def about(row: Row, width: int) -> list[Text]:
    """Three lines: what the run is, where it is, how far it is or why it waits."""
    state = row.state
    title = Text.assemble(plain(state.name, "bold"), "  ", plain(state.run_id, "dim"), "  ")
    title.append(state.state, style=words.STYLES[state.state])
    if state.state == "RUNNING" and state.started:
        title.append(f" for {words.duration(words.since(state.started))}")
    elif state.ended and state.started:
        title.append(f" after {words.duration(words.between(state.started, state.ended))}")
        title.append(f", {words.age(words.since(state.ended))} ago")
    else:
        title.append(f", launched {words.age(words.since(state.created))} ago")
    return [title, _where(row), _how(row, width)]


def _where(row: Row) -> Text:
    state = row.state
    kind = f"job {state.job_id}" if state.job_id and state.kind != "local" else state.kind
    count = f"{state.nodes} node{'s' if state.nodes != 1 else ''}"
    if state.node_list:
        shown = ", ".join(state.node_list[:4]) + (", …" if len(state.node_list) > 4 else "")
        count += f" ({shown})"
    parts = [kind, f"{count}, {state.world_size} process{'es' if state.world_size != 1 else ''}"]
    if state.attempt or state.restarts or state.requeues:
        parts.append(f"launch {state.attempt + 1}, {state.restarts} restarts, {state.requeues} requeues")
    if row.view.unchecked and state.state != "UNKNOWN":
        parts.append(row.view.unchecked)
    return plain(" · ".join(parts), "dim")


def _how(row: Row, width: int) -> Text:
    state = row.state
    if state.state == "PENDING" and not row.step:
        return plain("  ".join(part for part in (start_words(row), why(row)) if part) or "waits", "yellow")
    parts = [f"step {row.step}/{state.max_steps}"]
    if row.loss is not None:
        parts.append(f"loss {row.loss:.4f}")
    if row.tokens_per_s:
        parts.append(f"{words.short(row.tokens_per_s)} tokens/s")
    if row.step_s is not None:
        parts.append(f"{row.step_s:.3g} s a step")
    if row.left_s is not None:
        parts.append(f"{words.duration(row.left_s)} left")
    if row.last_line and state.state in ACTIVE:
        parts.append(f"logged {words.age(words.since(row.last_line))} ago")
    text = Text.assemble((f"{bar(done(row), 10 if width < 100 else 30)} ", "cyan"), "  ".join(parts))
    if reason := why(row):
        text.append_text(plain(f"  {reason}", "red" if state.state not in ACTIVE else "yellow"))
    return text


def pane(row: Row, width: int, height: int) -> list[Text]:
    """What stands under the table about the run that is chosen.

    Args:
        row: the run.
        width: characters.
        height: lines; of nodes and warnings as many as fit.
    """
    lines = about(row, width)
    room = max(0, height - len(lines))
    warned = [warning_line(each) for each in row.warnings[-max(1, room - 1) :]] if room else []
    room -= len(warned)
    shown = row.live if len(row.live) <= room else row.live[: max(0, room - 1)]
    lines += [node_line(node) for node in shown]
    if len(shown) < len(row.live) and room > 0:
        more = f"… and {len(row.live) - len(shown)} more nodes" if shown else f"{len(row.live)} nodes"
        lines.append(plain(f"{more}: Enter shows them", "dim"))
    return lines + warned


def warning_line(warning: Warning) -> Text:
    """A warning."""
    time = words.local(warning.time)[11:]
    return Text.assemble((f"! {warning.word} ", "bold red"), plain(warning.text), (f"  {time}", "dim"))


def node_line(node: Node) -> Text:
    """A node on one line."""
    sample = node.sample
    parts = [f"{percent(sample.cpu_percent) or '-'} cpu"]
    if sample.node_cpu_percent is not None:
        parts[0] += f" (node {percent(sample.node_cpu_percent)})"
    text = Text.assemble(plain(sample.node, "bold"), "  ", "  ".join(parts))
    text.append("  mem ")
    text.append_text(_memory(node))
    if sample.gpus:
        text.append("  gpu ")
        shown = sample.gpus[:8]
        text.append(" ".join(percent(gpu.percent) or "?" for gpu in shown))
        used = [gpu.memory_used_bytes for gpu in sample.gpus if gpu.memory_used_bytes is not None]
        text.append(f" ({size(max(used))} each at most)" if used else "")
    return text


def _memory(node: Node) -> Text:
    limit, share = node.sample.memory_limit_bytes, node.share
    text = size(node.used_bytes) or "-"
    if limit:
        text += f" of {size(limit)}"
    if share is not None:
        text += f" ({percent(100 * share)} full)"
    return Text(text, style="bold red" if share is not None and share >= FULL else "", end="")


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()) -> list[Text]:
    """Rows under a heading, each column as wide as it needs; columns without any value are left out.

    Args:
        heading: the columns' names.
        rows: their cells.
        left: columns that are not numbers.
    """
    kept = [i for i in range(len(heading)) if any(row[i] for row in rows)]
    widths = {i: max(cell_len(heading[i]), *(cell_len(plain(row[i]).plain) for row in rows)) for i in kept}

    def line(cells: Sequence[str], style: str = "") -> Text:
        made = [fit(plain(cells[i] or "-", style), widths[i], right=heading[i] not in left) for i in kept]
        return Text("  ", end="").join(made)

    return [line(heading, "bold"), *(line(row) for row in rows)] if rows else []


def node_lines(row: Row) -> list[Text]:
    """A table of the run's nodes, and one of their GPUs."""
    heading = ("node", "cpu", "of node", "mem", "of", "full", "net in", "out", "rdma in", "out ", "seen")
    cells = [_node_cells(node) for node in row.nodes]
    lines = table(heading, cells, left=("node",))
    gpus = [(node.sample, gpu) for node in row.nodes for gpu in node.sample.gpus]
    columns = ("node", "gpu", "busy", "mem", "of", "power", "temp", "trouble", "name")
    return lines + table(columns, [_gpu_cells(*each) for each in gpus], left=("node", "trouble", "name"))


def _node_cells(node: Node) -> tuple[str, ...]:
    sample = node.sample
    rates = ("net_received_bytes", "net_sent_bytes", "rdma_received_bytes", "rdma_sent_bytes")
    flows = [f"{size(rate)}/s" if (rate := node.rate(name)) is not None else "" for name in rates]
    return (
        sample.node,
        percent(sample.cpu_percent),
        percent(sample.node_cpu_percent),
        size(node.used_bytes),
        size(sample.memory_limit_bytes),
        percent(100 * node.share) if node.share is not None else "",
        *flows,
        f"{words.age(words.since(sample.time))} ago" if sample.time else "",
    )


def _gpu_cells(sample: NodeSample, gpu: GpuSample) -> tuple[str, ...]:
    trouble = [f"throttled: {', '.join(gpu.throttled)}"] if gpu.throttled else []
    trouble += [f"Xid {gpu.xid}"] if gpu.xid is not None else []
    trouble += [f"{gpu.ecc_uncorrected} ECC errors"] if gpu.ecc_uncorrected else []
    return (
        sample.node,
        str(gpu.index) if gpu.mig is None else f"{gpu.index}:{gpu.mig}",
        percent(gpu.percent),
        size(gpu.memory_used_bytes),
        size(gpu.memory_total_bytes),
        f"{gpu.power_w:.0f}W" if gpu.power_w is not None else "",
        f"{gpu.temperature_c:.0f}°C" if gpu.temperature_c is not None else "",
        "; ".join(trouble),
        gpu.name,
    )


def rank_lines(row: Row, times: Sequence[stragglers.Row] = ()) -> list[Text]:
    """A table of the run's ranks.

    Args:
        row: the run.
        times: each rank's own time and wait, where they were measured.
    """
    heading = (
        "rank",
        "node",
        "step",
        "phase",
        "rss",
        "pss",
        "cpu",
        "thr",
        "gpu mem",
        "own",
        "wait",
        "loaders",
    )
    of_rank = {each.rank: each for each in times}
    cells = []
    for node in row.nodes:
        for rank in node.sample.ranks:
            measured = of_rank.get(rank.rank if rank.rank is not None else -1)
            cells.append(_rank_cells(node.sample, rank, measured))
    cells.sort(key=lambda cell: int(cell[0]))
    return table(heading, cells, left=("node", "phase", "loaders"))


def _rank_cells(sample: NodeSample, rank: ProcessSample, times: stragglers.Row | None) -> tuple[str, ...]:
    loaders = [each for each in sample.processes if each.role == "loader" and each.rank == rank.rank]
    held = sum((each.rss_bytes if each.pss_bytes is None else each.pss_bytes) or 0 for each in loaders)
    return (
        str(rank.rank),
        sample.node,
        str(rank.step) if rank.step is not None else "",
        rank.phase or "",
        size(rank.rss_bytes),
        size(rank.pss_bytes),
        percent(rank.cpu_percent),
        str(rank.threads) if rank.threads is not None else "",
        size(rank.gpu_memory_bytes),
        _seconds(times.times.own_s) if times else "",
        f"{_seconds(times.times.wait_s)} {percent(100 * times.wait_share)}" if times else "",
        f"{len(loaders)}: {size(held)}" if loaders else "",
    )


def _seconds(value: float) -> str:
    return f"{value:.2f}s" if value >= 1 else f"{1000 * value:.0f}ms"


def nothing_measured(row: Row) -> str:
    """Why there is no table of ranks."""
    if row.state.state == "PENDING":
        return "not started yet"
    if row.state.state in ACTIVE:
        return "no sample yet (monitor=none writes none)"
    return "no samples were written"


def log_line(line: str) -> Text:
    """A line of the log: its time short and local, errors in red."""
    line = terminal.harmless(line)  # here, and not with its time: of a progress bar its last state stays
    found = _STAMP.match(line)
    if found is None:
        return plain(line, "red" if _BAD.search(line) else "")
    rest = line[found.end() :]
    time = f"{words.local(found.group(1))[11:]} "
    return Text.assemble(
        (time, "dim"), plain(found.group(2), "cyan"), plain(rest, "red" if _BAD.search(rest) else "")
    )


class Details:
    """What only the view of one run needs: its logs, all its events, its ranks' times.

    Args:
        run: the run.
    """

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.log: deque[str] = deque(maxlen=MOST_LINES)
        self.lines_read = 0
        """Of the log, those that have gone from it included."""
        self.events: list[str] = []
        self.times: list[stragglers.Row] = []
        self.note = ""
        """What is to be said about the log."""
        self._events = Tail(run.events_file, window=LOG_WINDOW)
        self._logs: dict[Path, Tail] = {}
        self._earlier: set[Path] | None = None
        self._ranks_stamp: tuple[int, int] | None = None

    def read(self, view: View) -> None:
        """Reads what is new.

        Args:
            view: how the run stands.

        Raises:
            OSError: a file can't be read.
        """
        records = self._events.records()
        if self._events.replaced:
            self.events.clear()
        self.events = [*self.events, *status.event_lines(records)][-MOST_LINES:]
        self._read_logs(view)
        self._read_times()

    def _read_logs(self, view: View) -> None:
        files = failure.log_files(self.run)
        self.note = ""
        if not files:
            output = failure.own_output(self.run, view.state)
            files = [output] if output is not None else []
            self.note = (
                "no log yet" if output is None else f"no log yet; the job's own output, {output.name}:"
            )
        elif self._earlier is None:  # earlier tries' logs are left to `hpcdl logs`
            last = failure.log_try(files[-1])
            self._earlier = {path for path in files if failure.log_try(path) != last}
        files = [path for path in files if path not in (self._earlier or ())]
        for path in files:
            self._logs.setdefault(path, Tail(path, window=max(1 << 14, LOG_WINDOW // len(files))))
        sources = [tail.lines() for tail in self._logs.values()]
        for line in logs.merge(sources) if sources else ():
            self.log.append(line[:MOST_CHARACTERS])
            self.lines_read += 1

    def _read_times(self) -> None:
        try:
            found = (self.run.path / "ranks.jsonl").stat()
        except FileNotFoundError:
            return
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp == self._ranks_stamp:
            return
        self._ranks_stamp = stamp
        try:
            self.times = stragglers.of_run(self.run)
        except (TypeError, ValueError):  # not as hpcdl writes it
            self.times = []


def event_line(line: str) -> Text:
    """An event as a line: the day goes, warnings stand out."""
    shown = line[11:] if line[:4].isdigit() else line
    word = line[21:].split(" ")[0] if len(line) > 21 else ""
    bad = word in ("failed", "hang", "leak", "straggler", "lost", "checkpoint_failed", "warning", "cancelled")
    return plain(shown, "red" if bad else "")
