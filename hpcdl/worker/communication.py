"""What a step costs in communication: calls, bytes and seconds in collectives, from torch's profiler.

Every collective goes through a `c10d::` operator, whoever asks for it: DDP's reducer in C++, FSDP2, DTensor's
functional collectives, pipelines' sends and receives, compiled code. The profiler sees the operator with the
shapes of its tensors (bytes, calls), and the work itself, begin to end, as `gloo:<kind>` or as NCCL's kernels
on the GPU (seconds). Starting and stopping it takes 1 to 10 ms on a CPU, outside the measured time; on a GPU
CUPTI takes its second or so at the first start. Reading what it has seen takes some 15 µs and 4 KiB an operator,
after the step's time is taken; the memory is given back, and left out of the run's peak. It is on in a few
steps only (`monitor.communication_steps`): in all others nothing of it is there.

What is counted:

bytes      the size of the larger side of each call on this rank, as nccl-tests have it: an all-reduce its tensor
           (DDP: 4 bytes a trained parameter in fp32), an all-gather its whole output, a reduce-scatter its whole
           input (FSDP2: the padded parameters, 4 bytes each, twice gathered and once scattered; once gathered
           where nothing is resharded). What a network card sends is a fixed factor of that, which depends on the
           algorithm: ring all-reduce 2(n-1)/n, all-gather and reduce-scatter (n-1)/n. The list forms of
           all-gather, gather, reduce-scatter and scatter show the profiler one rank's part only: they count as
           that part. hpcdl uses them for a few numbers a step.
           A receive counts in `by_kind` and not in the total: its bytes are the sender's.
seconds    in which at least one collective was under way, overlapping ones once. Waiting for a slower rank is
           part of it, on gloo as in NCCL's kernels: a collective lasts until the last rank has come, a receive
           from when it is posted.
exposed    those of them in which this process computed nothing (no `aten::` operator on a CPU, no other kernel
           on the GPU): what hiding communication behind computation could still win.

A strategy that talks otherwise (RPC) says so itself: `with record_function("hpcdl.comm:rpc:4096")` around its
call counts as one call of kind `rpc` with 4,096 bytes.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from hpcdl.worker import control
from hpcdl.worker.metrics import Peak

if TYPE_CHECKING:
    import torch

    from hpcdl.spec import MonitorSpec

KINDS = (
    *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "send", "recv", "rpc"),
    "other",
)
"""`other`: barrier, reduce, gather, scatter."""
OPERATORS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "recv",
}
"""How the names of the `c10d::` operators begin, without leading underscores."""
SAID = "hpcdl.comm:"
"""How a strategy's own record begins."""
WARM_UP = 2
"""Steps that are not measured: DDP orders its buckets after the first, allocators fill."""

Span = tuple[int, int]
"""Begin and end, in ns."""


@dataclass(slots=True)
class Cost:
    """Of one step on one rank."""

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """By kind."""
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """By kind, as the module says."""
    seconds: float = 0.0
    """With a collective under way."""
    exposed_s: float = 0.0
    """Those in which nothing was computed."""
    step_s: float = 0.0
    """Of the whole measured block."""

    @property
    def total_bytes(self) -> int:
        """Without receives, which are others' sends."""
        return sum(n for kind, n in self.bytes.items() if kind != "recv")

    def numbers(self) -> list[float]:
        """For the collective that brings all ranks' costs together, `(3 + 2 · len(KINDS),)`."""
        counts = [*self.calls.values(), *self.bytes.values()]
        return [self.seconds, self.exposed_s, self.step_s, *map(float, counts)]


class Measurement:
    """Profiles one training step; `cost` is there afterwards.

    Use as a context manager. A step that fails raises its own error and leaves no cost.
    """

    def __init__(self, device: torch.device, *, warm: bool = True) -> None:
        """Starts nothing yet.

        Args:
            device: where the step computes.
            warm: whether steps like this one have been before: then this one's memory, which the profiler's
                records are part of, needn't count for the peak.
        """
        import torch
        from torch.profiler import ProfilerActivity, profile

        # Kineto writes a line to stderr at each start and stop otherwise; read at its first start.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        self._device = device
        self._torch = torch
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile: Any = profile(activities=activities, record_shapes=True)
        self._warm = warm
        self._started = 0.0
        self.cost = Cost()

    def __enter__(self) -> Measurement:
        if self._warm:
            Peak.hold()
        self._profile.__enter__()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda" and error is None:
            self._torch.cuda.synchronize(self._device)
        step_s = time.perf_counter() - self._started
        if error is None:
            control.settle()
        Peak.hold()
        self._profile.__exit__(kind, error, trace)
        if error is None:
            self.cost = read(self._profile, step_s, gpu=self._device.type == "cuda")
        self._profile = None
        gc.collect()  # torch's profiler is a cycle that holds all its records: 12 KiB an operator
        Peak.release()


def read(profile: Any, step_s: float, *, gpu: bool) -> Cost:
    """The cost of what a finished torch.profiler.profile has seen.

    Args:
        profile: with shapes.
        step_s: seconds of the whole.
        gpu: whether work is done on a GPU, and its kernels were recorded.
    """
    cost = Cost(step_s=step_s)
    under_way: list[Span] = []
    computing: list[Span] = []
    results = profile.profiler.kineto_results
    for event in _walk(results.experimental_event_tree()):
        name, span = event.name, (event.start_time_ns, event.end_time_ns)
        if name.startswith("c10d::"):
            kind = kind_of(name)
            cost.calls[kind] += 1
            if "barrier" not in name:
                cost.bytes[kind] += _larger_side(event)
        elif name.startswith(SAID):
            _, kind, size = name.split(":")
            cost.calls[kind] += 1
            cost.bytes[kind] += int(size)
            under_way.append(span)
        elif name.startswith("gloo:"):
            under_way.append(span)
        elif name.startswith("aten::"):
            computing.append(span)
    if gpu:
        seen = list(kernels(results.events()))
        under_way += [span for name, span in seen if name.startswith("nccl")]
        computing = [span for name, span in seen if not name.startswith("nccl")]
    busy = union(under_way)
    cost.seconds = length(busy) / 1e9
    cost.exposed_s = (length(busy) - overlap(busy, union(computing))) / 1e9
    return cost


def kind_of(operator: str) -> str:
    """`c10d::_allgather_base_` → all_gather; what isn't one of KINDS is `other`."""
    bare = operator.removeprefix("c10d::").lstrip("_")
    return next((kind for begin, kind in OPERATORS.items() if bare.startswith(begin)), "other")


def _walk(roots: Iterable[Any]) -> Iterator[Any]:
    stack = list(roots)
    while stack:
        event = stack.pop()
        yield event
        stack += event.children


def _larger_side(event: Any) -> int:
    """Bytes of an operator's largest argument: a tensor, or a list of tensors."""
    fields = event.typed[1]
    return max((_size(argument) for argument in getattr(fields, "inputs", ())), default=0)


def _size(argument: Any) -> int:
    if isinstance(argument, list | tuple):
        return sum(_size(part) for part in argument)
    if not hasattr(argument, "sizes"):
        return 0
    return math.prod(map(int, argument.sizes)) * int(argument.dtype.itemsize)


def kernels(events: Iterable[Any]) -> Iterator[tuple[str, Span]]:
    """What ran on the GPU; annotations, which only frame kernels, are left out."""
    for event in events:
        on_gpu = str(event.device_type()) == "DeviceType.CUDA"
        if on_gpu and not event.is_user_annotation():
            yield event.name(), (event.start_ns(), event.end_ns())


def union(spans: Iterable[Span]) -> list[Span]:
    """Spans that don't overlap and cover the same time, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if end <= begin:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(merged: Iterable[Span]) -> int:
    """Time that merged spans cover, in ns."""
    return sum(end - begin for begin, end in merged)


def overlap(one: Sequence[Span], two: Sequence[Span]) -> int:
    """Time that both of two merged lists cover, in ns."""
    return length(one) + length(two) - length(union([*one, *two]))


# --- which steps, and what becomes of them -------------------------------------------------------------------


def chosen_steps(first: int, last: int, spec: MonitorSpec, period: int = 1) -> frozenset[int]:
    """The steps to measure: the first ones after the warm-up, earlier ones where the run is too short.

    Never the first step, which the others' speed and memory are to be told from: none in a run of one step.

    Args:
        first: the first step of this try.
        last: the run's last step.
        spec: how many (`communication_steps`), and whether anything is measured at all.
        period: steps between two synchronisations of a strategy that doesn't talk in each: one step that
            ends with one is then measured, and one that doesn't.
    """
    if spec.name == "none" or not spec.communication_steps or first >= last:
        return frozenset()
    if period > 1:
        return _one_of_each(range(first + 1, last + 1), last, period)
    count = min(spec.communication_steps, last - first)
    begin = min(first + WARM_UP, last - count + 1)
    return frozenset(range(begin, begin + count))


def _one_of_each(steps: range, last: int, period: int) -> frozenset[int]:
    """The first step that synchronises after the warm-up, and the nearest that doesn't."""
    talking = [step for step in steps if synchronises(step, last, period)]
    silent = [step for step in steps if step not in talking]
    chosen = next((step for step in talking if step >= steps.start + WARM_UP - 1), talking[-1])
    return frozenset([chosen, *sorted(silent, key=lambda step: (abs(step - chosen), -step))[:1]])


def synchronises(step: int, last: int, period: int) -> bool:
    """Whether a strategy that synchronises every `period` steps, and at the end, does so in `step`."""
    return step % period == 0 or step == last


def line(step: int, everyone: torch.Tensor) -> dict[str, Any]:
    """A line of metrics.jsonl from all ranks' `Cost.numbers()`, `(ranks, 3 + 2 · len(KINDS))`.

    `comm_bytes` and the calls and bytes in `comm_by_kind` are sums over the ranks; `comm_s`,
    `comm_exposed_s` and the step's seconds are the slowest rank's; `comm_share` is comm_s over the latter.
    """
    seconds, exposed, step_s = (float(value) for value in everyone[:, :3].max(dim=0).values)
    counts = [int(value) for value in everyone[:, 3:].sum(dim=0)]
    calls, sizes = counts[: len(KINDS)], counts[len(KINDS) :]
    by_kind = {
        kind: {"calls": n, "bytes": size} for kind, n, size in zip(KINDS, calls, sizes, strict=True) if n
    }
    return {
        "step": step,
        "comm_bytes": sum(record["bytes"] for kind, record in by_kind.items() if kind != "recv"),
        "comm_s": round(seconds, 6),
        "comm_exposed_s": round(exposed, 6),
        "comm_share": round(seconds / step_s, 4),
        "comm_by_kind": by_kind,
    }


def summary(lines: Iterable[dict[str, Any]], last: int, period: int = 1) -> dict[str, Any]:
    """Means over the measured steps, for result.json: `comm_bytes`, `comm_s`, `comm_exposed_s`, `comm_share`.

    Where a strategy synchronises every `period` steps only, each of both kinds of steps counts as often as
    the run has such steps. Empty where nothing was measured.
    """
    measured = [record for record in lines if "comm_bytes" in record]
    talking = [r for r in measured if synchronises(r["step"], last, period)]
    silent = [r for r in measured if not synchronises(r["step"], last, period)]
    times = sum(synchronises(step, last, period) for step in range(1, last + 1))
    found: dict[str, Any] = {}
    for key in ("comm_bytes", "comm_s", "comm_exposed_s", "comm_share") if measured else ():
        parts = [
            (_mean(group, key), weight)
            for group, weight in ((talking, times), (silent, last - times))
            if group
        ]
        weights = sum(weight for _, weight in parts)
        mean = sum(value * weight for value, weight in parts) / weights
        found[key] = round(mean) if key == "comm_bytes" else round(mean, 6)
    return found


def _mean(records: Sequence[dict[str, Any]], key: str) -> float:
    return sum(float(record[key]) for record in records) / len(records)
