"""How a pipeline is laid out, and what is refused: no torch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from hpcdl import experiment
from hpcdl.distributed import stages as layout
from hpcdl.errors import Fault
from hpcdl.spec import ModelShape
from tests.factory import tiny_plain, tiny_spec


def all_partitions(blocks: int, stages: int) -> list[list[range]]:
    return [
        [range(a, b) for a, b in itertools.pairwise([0, *ends, blocks])]
        for ends in itertools.combinations(range(1, blocks), stages - 1)
    ]


@pytest.mark.parametrize("head", [0.0, 0.5, 3.0, 40.0])
@pytest.mark.parametrize(("blocks", "stages"), [(1, 1), (4, 4), (5, 3), (7, 4), (9, 2), (11, 5)])
def test_the_dearest_stage_is_as_cheap_as_can_be(blocks: int, stages: int, head: float) -> None:
    costs = [1.0] * blocks

    def of(parts: list[range]) -> list[float]:
        sums = [sum(costs[i] for i in part) for part in parts]
        return [*sums[:-1], sums[-1] + head]

    parts = layout.partition(costs, stages, head=head)
    assert [block for part in parts for block in part] == list(range(blocks))
    assert len(parts) == stages
    assert all(parts)
    best = min(all_partitions(blocks, stages), key=lambda p: (max(of(p)), sum(c * c for c in of(p))))
    assert max(of(parts)) == max(of(best))
    assert sum(c * c for c in of(parts)) == pytest.approx(sum(c * c for c in of(best)))


def test_blocks_that_differ_and_a_vocabulary_that_outweighs_them() -> None:
    assert layout.partition([4, 1, 1, 1, 1], 2) == [range(1), range(1, 5)]
    assert sorted(map(len, layout.partition([1.0] * 10, 3, head=100.0))) == [1, 4, 5]
    llama = ModelShape(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, head_dim=64,
    )  # fmt: skip
    block, head = layout.block_cost(llama, 1024), layout.head_cost(llama)
    assert head == 2 * 128256 * 2048
    # Llama-3.2-1B has 60.8M weights a block; attention to 512 tokens on average comes to 4 × 2048 × 512
    assert block == pytest.approx(2 * 60_817_408 + 4 * 2048 * 512, rel=1e-3)
    parts = layout.partition([block] * 16, 4, head=head)
    assert [len(part) for part in parts] == [5, 5, 5, 1]


def test_where_stages_lie() -> None:
    assert [layout.held_by("loop", rank, 3, 6) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    assert [layout.held_by("v", rank, 3, 6) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


def faults(processes: int, **dotted: Any) -> dict[str, Fault]:
    """Faults of an experiment with 8 blocks and 4 micro-batches a step of one pipeline."""
    settled = {
        "parallel__name": "pp", "parallel__pp": processes, "parallel__dp_replicate": -1,
        "cluster__processes_per_node": processes, "model__shape__num_hidden_layers": 8, **dotted,
    }  # fmt: skip
    return {fault.key: fault for fault in experiment.check(tiny_plain(**settled)).faults}


@pytest.mark.parametrize("schedule", list(layout.SCHEDULES))
def test_what_fits_has_no_fault(schedule: str) -> None:
    assert not faults(2, parallel__schedule=schedule)


REFUSED: list[tuple[int, str, dict[str, Any], str, str]] = [
    (4, "trainer.global_batch_size", {"trainer__global_batch_size": 4}, "at least as many", "micro_batch_size=1"),
    (4, "trainer.global_batch_size", {"trainer__global_batch_size": 2}, "and has 1", "global_batch_size=8"),
    (4, "parallel.microbatches", {"parallel__microbatches": 2}, "as its 4 ranks, and has 2", "microbatches=4"),
    (4, "parallel.microbatches", {"parallel__microbatches": 3}, "rounds of 3", "microbatches=4"),
    (2, "parallel.microbatches", {"parallel__microbatches": 8}, "rounds of 8", "microbatches=4"),
    (2, "parallel.microbatches", {"parallel__microbatches": 1, "parallel__schedule": "gpipe"}, "has 1", "=2"),
    (
        2, "parallel.microbatches", {"parallel__microbatches": 2, "parallel__schedule": "dualpipev"},
        "dualpipev's 4 stages", "microbatches=4",
    ),
    (
        2, "parallel.microbatches", {"trainer__global_batch_size": 30, "parallel__schedule": "interleaved_1f1b"},
        "7 groups, which must be equal", "microbatches=3",
    ),
    (
        2, "trainer.global_batch_size", {"trainer__global_batch_size": 14, "parallel__schedule": "interleaved_zb"},
        "3 groups", "micro_batch_size=1",
    ),
    (
        4, "trainer.global_batch_size", {"parallel__pp": 2, "trainer__global_batch_size": 4},
        "4 sequences in micro-batches of 2 on 2 pipelines", "micro_batch_size=1",
    ),
    (4, "parallel.pp", {"model__shape__num_hidden_layers": 3}, "3 blocks are too few for 4 stages", "pp=3"),
    (
        2, "parallel.schedule", {"model__shape__num_hidden_layers": 3, "parallel__schedule": "zbv"},
        "3 blocks are too few for 2 ranks × 2 stages", "schedule=1f1b",
    ),
    (
        4, "parallel.pp",
        {
            "model__shape__num_hidden_layers": 3, "parallel__schedule": "interleaved_1f1b",
            "parallel__stages_per_rank": 3,
        },
        "4 ranks × 3 stages", "pp=1",
    ),
    (2, "parallel.stages_per_rank", {"parallel__stages_per_rank": 2}, "wants exactly 1 stage", "=1"),
    (
        2, "parallel.stages_per_rank", {"parallel__stages_per_rank": 3, "parallel__schedule": "zbv"},
        "exactly 2 stages", "stages_per_rank=2",
    ),
    (
        2, "parallel.stages_per_rank", {"parallel__stages_per_rank": 1, "parallel__schedule": "interleaved_zb"},
        "2 stages or more", "stages_per_rank=2",
    ),
    (2, "trainer.compile", {"trainer__compile": True, "parallel__schedule": "zbv"}, "apart", "compile=false"),
]  # fmt: skip


@pytest.mark.parametrize(("processes", "key", "changes", "problem", "fix"), REFUSED)
def test_what_would_hang_or_fail_is_refused(
    processes: int, key: str, changes: dict[str, Any], problem: str, fix: str
) -> None:
    found = faults(processes, **changes)
    assert found.keys() == {key}, found
    assert problem in found[key].problem
    assert found[key].fix.endswith(fix)


@pytest.mark.parametrize(("processes", "key", "changes", "problem", "fix"), REFUSED)
def test_each_fix_is_one(processes: int, key: str, changes: dict[str, Any], problem: str, fix: str) -> None:
    typed, _, value = faults(processes, **changes)[key].fix.partition("=")
    mended = int(value) if value.isdigit() else value
    after = {**changes, typed.replace(".", "__"): False if mended == "false" else mended}
    assert key not in faults(processes, **after)


def test_a_model_of_unknown_shape_is_left_to_the_worker() -> None:
    spec = tiny_spec(
        parallel__name="pp", parallel__pp=4, parallel__dp_replicate=1, cluster__processes_per_node=4,
        model__shape=None,
    )  # fmt: skip
    from hpcdl.parallel import pp

    assert not list(pp.check(spec.parallel, spec))  # type: ignore[arg-type]
