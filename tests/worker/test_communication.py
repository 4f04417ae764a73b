"""What communication costs: bytes against closed forms, seconds against written timelines."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hpcdl.spec import MonitorSpec
from hpcdl.spec.checkpoint import Totals
from hpcdl.worker import communication, loop, metrics
from hpcdl.worker.communication import KINDS, Cost, Measurement, chosen_steps, line, summary
from tests.worker.conftest import Finished, Workers

pytestmark = pytest.mark.torch
CPU = torch.device("cpu")


# --- time ------------------------------------------------------------------------------------------------


def test_overlapping_spans_count_once() -> None:
    merged = communication.union([(5, 9), (0, 3), (2, 4), (9, 10), (7, 7)])
    assert merged == [(0, 4), (5, 10)]
    assert communication.length(merged) == 9
    assert communication.overlap(merged, [(3, 6), (20, 30)]) == 2


def event(name: str, begin: int, end: int, *inputs: Any, children: tuple[Any, ...] = ()) -> Any:
    return SimpleNamespace(
        name=name, start_time_ns=begin, end_time_ns=end, children=list(children),
        typed=(None, SimpleNamespace(inputs=list(inputs))),
    )  # fmt: skip


def tensor(*sizes: int, dtype: torch.dtype = torch.float32) -> Any:
    return SimpleNamespace(sizes=list(sizes), dtype=dtype)


def kernel(name: str, begin: int, end: int, *, gpu: bool = True, annotation: bool = False) -> Any:
    return SimpleNamespace(
        name=lambda: name, start_ns=lambda: begin, end_ns=lambda: end,
        device_type=lambda: "DeviceType.CUDA" if gpu else "DeviceType.CPU",
        is_user_annotation=lambda: annotation,
    )  # fmt: skip


def seen(tree: list[Any], gpu: tuple[Any, ...] = ()) -> Cost:
    results = SimpleNamespace(experimental_event_tree=lambda: tree, events=lambda: list(gpu))
    return communication.read(
        SimpleNamespace(profiler=SimpleNamespace(kineto_results=results)), 1.0, gpu=bool(gpu)
    )


def test_what_computing_hides_is_not_exposed() -> None:
    cost = seen(
        [
            event("aten::mm", 0, 100_000_000),
            event("c10d::allreduce_", 50_000_000, 51_000_000, [tensor(10), tensor(5)], None, -1),
            event("gloo:all_reduce", 60_000_000, 160_000_000),
            event("gloo:all_gather", 150_000_000, 200_000_000),
        ]
    )
    assert cost.seconds == pytest.approx(0.14)
    assert cost.exposed_s == pytest.approx(0.10)
    assert (cost.calls["all_reduce"], cost.bytes["all_reduce"], cost.total_bytes) == (1, 60, 60)


def test_on_a_gpu_kernels_are_what_counts() -> None:
    """The CPU only launches; NCCL's annotations frame its kernels and would count them twice."""
    cost = seen(
        [
            event("aten::mm", 0, 1_000_000),
            event("c10d::_allgather_base_", 1, 2, tensor(8, dtype=torch.bfloat16), tensor(4)),
        ],
        (
            kernel("nccl:_all_gather_base", 0, 900_000_000, annotation=True),
            kernel("ncclDevKernel_AllGather_RING_LL(…)", 100_000_000, 300_000_000),
            kernel("ampere_sgemm_128x64_nn", 200_000_000, 400_000_000),
            kernel("cudaLaunchKernel", 0, 5_000_000, gpu=False),
        ),
    )
    assert [cost.seconds, cost.exposed_s] == pytest.approx([0.2, 0.1])
    assert cost.bytes["all_gather"] == 16


def test_a_strategy_says_what_it_sends_otherwise() -> None:
    inside = event("hpcdl.comm:rpc:4096", 0, 2_000_000)
    cost = seen([event("step", 0, 9_000_000, children=(inside,))])
    assert (cost.calls["rpc"], cost.bytes["rpc"]) == (1, 4096)
    assert cost.seconds == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("c10d::allreduce_coalesced_", "all_reduce"),
        ("c10d::_allgather_base_", "all_gather"),
        ("c10d::allgather_into_tensor_coalesced_", "all_gather"),
        ("c10d::_reduce_scatter_base_", "reduce_scatter"),
        ("c10d::reduce_", "other"),
        ("c10d::alltoall_base_", "all_to_all"),
        ("c10d::recv_any_source_", "recv"),
        ("c10d::monitored_barrier_", "other"),
    ],
)
def test_kinds(operator: str, kind: str) -> None:
    assert communication.kind_of(operator) == kind


# --- the profiler ----------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_each_collective_is_seen(alone: None) -> None:
    half = torch.ones(6, dtype=torch.bfloat16)
    with Measurement(CPU) as measured:
        dist.all_reduce(torch.ones(10))
        dist.all_gather_into_tensor(torch.empty(10), torch.ones(10))
        dist.all_to_all_single(torch.empty_like(half), half)
        dist.broadcast(torch.ones(3, dtype=torch.int64), 0)
        dist.barrier()
    cost = measured.cost
    sizes = {kind: size for kind, size in cost.bytes.items() if size}
    assert sizes == {"all_reduce": 40, "all_gather": 40, "all_to_all": 12, "broadcast": 24}
    assert cost.calls["other"] == 1 and cost.total_bytes == 116
    assert 0 < cost.seconds <= cost.step_s and 0 <= cost.exposed_s <= cost.seconds
    assert len(cost.numbers()) == 3 + 2 * len(KINDS)


def test_nothing_is_profiled_outside(alone: None, capfd: pytest.CaptureFixture[str]) -> None:
    with Measurement(CPU) as measured:
        pass
    dist.all_reduce(torch.ones(10))
    assert measured.cost.total_bytes == 0
    assert not torch._C._autograd._profiler_enabled()
    with pytest.raises(ZeroDivisionError), Measurement(CPU) as failed:
        1 / 0  # noqa: B018
    assert failed.cost.step_s == 0 and not torch._C._autograd._profiler_enabled()


def test_the_profilers_memory_is_no_part_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.Peak, "before", 0)
    before = metrics.resident_peak_bytes()
    with Measurement(CPU):
        records = bytearray(b"x" * (before + 50_000_000))  # as much as all that is there, and touched
        assert metrics.resident_peak_bytes() < before + 10_000_000
        del records
    assert before <= metrics.resident_peak_bytes() < before + 40_000_000


def test_the_profilers_records_are_gone_at_once() -> None:
    gc.disable()
    try:
        with Measurement(CPU):
            torch.ones(10) + 1
        assert not [found for found in gc.get_objects() if isinstance(found, torch.profiler.profile)]
    finally:
        gc.enable()


def test_a_cold_steps_memory_is() -> None:
    before = metrics.resident_peak_bytes()
    with Measurement(CPU, warm=False):
        del_me = bytearray(b"x" * (before + 50_000_000))
        del del_me
    assert metrics.resident_peak_bytes() >= before + 40_000_000


# --- steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "count", "period", "chosen"),
    [
        (1, 100, 2, 1, {3, 4}),
        (51, 100, 3, 1, {53, 54, 55}),  # a resumed run
        (1, 3, 2, 1, {2, 3}),
        (1, 2, 2, 1, {2}),
        (1, 1, 2, 1, set()),
        (1, 100, 0, 1, set()),
        (101, 100, 2, 1, set()),
        (1, 100, 2, 8, {8, 9}),
        (1, 8, 2, 8, {7, 8}),
        (1, 20, 2, 50, {19, 20}),  # talks at the end only
        (2, 3, 2, 2, {3}),
        (1, 100, 2, 2, {4, 5}),
    ],
)
def test_steps_that_are_measured(first: int, last: int, count: int, period: int, chosen: set[int]) -> None:
    assert chosen_steps(first, last, MonitorSpec(communication_steps=count), period) == chosen


def test_monitor_none_measures_nothing() -> None:
    assert chosen_steps(1, 100, MonitorSpec(name="none")) == frozenset()


def cost(seconds: float, step_s: float, **sizes: int) -> list[float]:
    made = Cost(seconds=seconds, exposed_s=seconds / 2, step_s=step_s)
    for kind, size in sizes.items():
        made.calls[kind], made.bytes[kind] = 1, size
    return made.numbers()


def test_sums_and_the_slowest_rank() -> None:
    everyone = torch.tensor(
        [cost(0.1, 1.0, send=100), cost(0.3, 1.2, recv=100, all_reduce=8)], dtype=torch.float64
    )
    assert line(7, everyone) == {
        "step": 7, "comm_bytes": 108, "comm_s": 0.3, "comm_exposed_s": 0.15, "comm_share": 0.25,
        "comm_by_kind": {
            "all_reduce": {"calls": 1, "bytes": 8},
            "send": {"calls": 1, "bytes": 100},
            "recv": {"calls": 1, "bytes": 100},
        },
    }  # fmt: skip


def test_a_mean_over_the_run() -> None:
    def record(step: int, size: int) -> dict[str, Any]:
        return {
            "step": step,
            "comm_bytes": size,
            "comm_s": size / 100,
            "comm_exposed_s": 0.0,
            "comm_share": 0.5,
        }

    assert summary([{"step": 1, "loss": 2.0}], 10) == {}
    plain = summary([record(3, 100), record(4, 300), {"step": 4, "loss": 1.0}], 10)
    assert plain == {"comm_bytes": 200, "comm_s": 2.0, "comm_exposed_s": 0.0, "comm_share": 0.5}
    # Steps 4, 8 and 10 of 10 talk.
    assert summary([record(4, 1000), record(5, 0)], 10, period=4)["comm_bytes"] == 300


def test_profiled_steps_are_no_part_of_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 1.0, 11.0, 11.0, 14.0, 14.0, 24.0])
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    watch, totals = loop.Stopwatch(started=next(clock)), Totals()
    for profiled in (False, True, False):
        watch.start()
        totals.add_time(watch.stop(100, profiled=profiled), 100, profiled=profiled)
        totals.tokens += 100
    assert watch.read(None) == {"tokens_per_s": 50.0, "step_s": 2.0, "mfu": None}
    watch.start()
    watch.stop(100, profiled=True)  # alone in its line: its own figures, and the line says so
    assert watch.read(None) == {"tokens_per_s": 10.0, "step_s": 10.0, "mfu": None, "profiled": True}
    assert (totals.train_s, totals.tokens_per_s) == (14.0, 50.0)
    assert Totals(tokens=100, train_s=2.0, profiled_s=2.0, profiled_tokens=100).tokens_per_s == 50.0


# --- whole runs ------------------------------------------------------------------------------------------

PARAMETERS = 26_912
"""Of the tiny Llama; the head is the embedding."""
BLOCKS = 18_560
"""Of them in its two blocks."""


def measured(finished: Finished) -> list[dict[str, Any]]:
    return [m for m in finished.run.metrics() if "comm_bytes" in m]


def kinds(finished: Finished, name: str) -> int:
    """Bytes of one kind, over both ranks, the same in each measured step."""
    (size,) = {m["comm_by_kind"].get(name, {"bytes": 0})["bytes"] for m in measured(finished)}
    return int(size)


MONITORED = {"monitor__name": "default", "monitor__every_s": 60.0}


def test_ddp_reduces_each_gradient_once(workers: Workers) -> None:
    finished = workers.train(2, **MONITORED)  # two micro-batches a step
    lines = measured(finished)
    assert [m["step"] for m in lines] == [3, 4]
    assert kinds(finished, "all_reduce") == 2 * 4 * PARAMETERS
    assert all(0 < m["comm_exposed_s"] <= m["comm_s"] and 0 < m["comm_share"] < 1 for m in lines)
    result = finished.result()
    assert result["comm_bytes"] == lines[0]["comm_bytes"] == lines[1]["comm_bytes"]
    assert result["comm_s"] == pytest.approx((lines[0]["comm_s"] + lines[1]["comm_s"]) / 2, abs=1e-6)
    assert "USDT" not in finished.log


def test_fsdp_gathers_blocks_twice_and_scatters_once(workers: Workers) -> None:
    finished = workers.train(2, **MONITORED, parallel__name="fsdp", trainer__micro_batch_size=4)
    assert kinds(finished, "reduce_scatter") == 2 * 4 * PARAMETERS
    gathered = 2 * 4 * (PARAMETERS + BLOCKS)  # the root isn't let go between the passes
    numbers = kinds(finished, "all_gather") - gathered
    assert 0 < numbers < 1000  # losses and norms
    assert kinds(finished, "all_reduce") == 0


def test_local_sgd_talks_every_other_step(workers: Workers) -> None:
    finished = workers.train(
        2, **MONITORED, parallel__name="local_sgd", parallel__sync_every=2, trainer__max_steps=8
    )
    silent, talking = sorted(measured(finished), key=lambda m: float(m["comm_bytes"]))
    assert talking["comm_by_kind"]["all_reduce"]["bytes"] == 2 * 4 * PARAMETERS
    assert "all_reduce" not in silent["comm_by_kind"]
    assert (talking["step"] % 2, silent["step"] % 2) == (0, 1)
    mean = (talking["comm_bytes"] + silent["comm_bytes"]) / 2
    assert finished.result()["comm_bytes"] == pytest.approx(mean, abs=1)


def test_pipelines_send_hidden_states_there_and_gradients_back(workers: Workers) -> None:
    finished = workers.train(2, **MONITORED, parallel__name="pp", parallel__pp=2, trainer__max_steps=4)
    hidden = 8 * 32 * 32 * 4  # sequences, tokens, width, fp32
    embedding = 260 * 32 * 4  # tied to the head, on the other stage: both send their gradient
    assert kinds(finished, "send") == kinds(finished, "recv") == 2 * hidden + 2 * embedding
    (total,) = {m["comm_bytes"] for m in measured(finished)}
    others = sum(kinds(finished, kind) for kind in KINDS if kind not in ("send", "recv"))
    assert total == kinds(finished, "send") + others


def test_ulysses_swaps_sequence_for_heads(workers: Workers) -> None:
    """In each block queries, keys and values, then the answer; the gradients the same way back."""
    finished = workers.train(
        2, **MONITORED, parallel__name="cp", parallel__dp_replicate=1, parallel__cp=2,
        parallel__cp_method="ulysses", trainer__max_steps=4,
    )  # fmt: skip
    tokens, width, kv_width = 8 * 32, 32, 16
    assert kinds(finished, "all_to_all") == 2 * 2 * 4 * tokens * (width + 2 * kv_width + width)
    assert kinds(finished, "all_reduce") == 2 * 4 * PARAMETERS  # gradients, as DDP


def test_tensor_parallel_functional_collectives(workers: Workers) -> None:
    finished = workers.train(2, **MONITORED, parallel__name="tp", parallel__tp=2, trainer__max_steps=4)
    assert kinds(finished, "all_gather") > 2 * 4 * 8 * 32 * 32  # sequence parallel: hidden states of a block
    assert kinds(finished, "reduce_scatter") > 0


@pytest.mark.parametrize(("mode", "calls"), [("sync", 1), ("async", 2)])
def test_parameter_servers_say_what_goes_over_rpc(workers: Workers, mode: str, calls: int) -> None:
    """Rank 1 sends gradients and gets weights; rank 0 has the server in its own process."""
    finished = workers.train(
        2, **MONITORED, parallel__name="param_server", parallel__mode=mode, trainer__max_steps=4
    )
    assert kinds(finished, "rpc") == 2 * 4 * PARAMETERS
    assert {m["comm_by_kind"]["rpc"]["calls"] for m in measured(finished)} == {2 * calls}
    assert all(m["comm_s"] > 0 for m in measured(finished))
