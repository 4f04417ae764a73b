"""Which plots a run's page has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpcdl.report import plots, scale
from hpcdl.report.plots import Axis, Line, Plot
from hpcdl.report.series import Point
from hpcdl.runs import words

STEPS = Axis(label="step", unit="step")
TIME = Axis(label="time since the first start", unit=scale.SECONDS)


def training(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Loss, speed and what else is logged by step."""
    curves, faults = report["curves"], _fault_steps(report)
    wide = [
        Plot(
            title="Loss",
            x=STEPS,
            y=Axis(label="loss"),
            lines=[
                Line(label="training", points=curves["loss"]),
                Line(label="held-out", points=curves["eval_loss"], style="both", colour=2),
            ],
            events=faults,
        ),
        _by_step("Throughput", "tokens/s", curves["tokens_per_s"], faults, from_zero=True),
        _by_step("Time of a step", "seconds", curves["step_s"], faults, unit=scale.SECONDS, from_zero=True),
        _by_step(
            "Model FLOPs utilisation",
            "MFU",
            [(x, 100 * y) for x, y in curves["mfu"]],
            faults,
            unit="%",
            from_zero=True,
        ),
        Plot(
            title="Own time of the ranks",
            x=STEPS,
            y=Axis(label="of a step, without waiting for others", unit=scale.SECONDS, from_zero=True),
            lines=plots.many([(f"rank {each['rank']}", each["points"]) for each in report["own_s"]], "ranks"),
            events=faults,
        ),
        _by_step(
            "Gradient norm",
            "norm before clipping",
            curves["grad_norm"],
            faults,
            log=_spread(curves["grad_norm"]),
        ),
        _by_step("Learning rate", "learning rate", curves["lr"], faults, from_zero=True),
        _by_step(
            "Communication", "seconds a step", curves["comm_s"], faults, unit=scale.SECONDS, from_zero=True
        ),
    ]
    return _drawn(wide)


def system(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Memory, CPU, GPU and network over time."""
    faults = _fault_times(report)
    memory = report["memory"]
    planned, limit = memory.get("planned_peak_bytes"), memory.get("limit_bytes")
    level = [(planned, f"planned peak of rank 0: {scale.written(planned, scale.BYTES)}")] if planned else []
    on_gpu = memory.get("device") == "cuda"
    kinds: tuple[tuple[str, str, str, bool, str, list[tuple[float, str]]], ...] = (
        ("Memory of the ranks", "resident memory", "rss_bytes", True, scale.BYTES,
         [] if on_gpu else level),
        ("Memory of the nodes", "resident memory, all processes", "rss_bytes", False, scale.BYTES,
         [(limit, f"cluster.mem_gb: {scale.written(limit, scale.BYTES)}")] if limit else []),
        ("CPU of the ranks", "of one core", "cpu_percent", True, "%", []),
        ("CPU of the nodes", "of one core, all processes", "cpu_percent", False, "%", []),
        ("GPU use", "share of time with a kernel running", "gpu_percent", False, "%", []),
        ("GPU memory", "highest of the node's GPUs", "gpu_memory_bytes", False, scale.BYTES,
         level if on_gpu else []),
        ("Network", "sent and received", "net_bytes_per_s", False, scale.BYTES_PER_S, []),
    )  # fmt: skip
    return _drawn(
        Plot(
            title=title,
            x=TIME,
            y=Axis(label=label, unit=unit, from_zero=True),
            lines=plots.many(_of(report["system"], what, of_ranks), "ranks" if of_ranks else "nodes"),
            levels=levels,
            events=faults,
        )
        for title, label, what, of_ranks, unit, levels in kinds
    )


def _of(curves: Sequence[Mapping[str, Any]], what: str, of_ranks: bool) -> list[tuple[str, list[Point]]]:
    """The curves of a kind, in the order of ranks or nodes."""
    chosen = [each for each in curves if each["what"] == what and (each["rank"] is not None) == of_ranks]
    if of_ranks:  # a rank may have been on several nodes, one try after the other
        several = len({each["node"] for each in chosen}) > len({each["rank"] for each in chosen})
        chosen = sorted(chosen, key=lambda each: each["rank"])
        return [
            (f"rank {each['rank']}{' on ' + each['node'] if several else ''}", each["points"])
            for each in chosen
        ]
    return [(each["node"], each["points"]) for each in chosen]


def _by_step(
    title: str,
    label: str,
    points: Sequence[Point],
    faults: Sequence[tuple[float, str]],
    *,
    unit: str = "",
    log: bool = False,
    from_zero: bool = False,
) -> Plot:
    axis = Axis(label=label, unit=unit, log=log, from_zero=from_zero)
    return Plot(title=title, x=STEPS, y=axis, lines=[Line(label=label, points=points)], events=faults)


def _drawn(wanted: Iterable[Plot]) -> list[dict[str, Any]]:
    return [drawn for plot in wanted if (drawn := plots.draw(plot)) is not None]


def _spread(points: Sequence[Point]) -> bool:
    values = [y for _, y in points]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 50


def _fault_steps(report: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Where the run came to before it went on from an earlier step."""
    found = []
    for each in report["tries"]:
        for mark in each["marks"]:
            if mark["kind"] == "fault":
                step = each["last_step"] if mark["step"] is None else mark["step"]
                found.append((float(step), mark["text"]))
    return found[:50]


def _fault_times(report: Mapping[str, Any]) -> list[tuple[float, str]]:
    start = next((each["started"] for each in report["tries"] if each["started"]), None)
    return [
        (words.between(start, mark["time"]), mark["text"])
        for each in report["tries"]
        for mark in each["marks"]
        if mark["kind"] == "fault"
    ][:50]
