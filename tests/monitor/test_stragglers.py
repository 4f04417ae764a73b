"""Who is slow, by numbers as real runs have them and as they might be."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from hpcdl.monitor import stragglers
from hpcdl.monitor.stragglers import Ranks, Suspicion, Times, Verdict, judge
from hpcdl.runs.files import append_line
from tests.runs.making import make_run

Own = Mapping[str, float]
"""Fields of Times that a rank has besides what all have."""


def ranks(count: int, per_node: int = 1, work: Sequence[float] | None = None) -> Ranks:
    return Ranks(
        nodes=tuple(f"n{rank // per_node}" for rank in range(count)), work=tuple(work or [1.0] * count)
    )


def together(own: Sequence[float], more: Mapping[int, Own]) -> list[Times]:
    """What collectives make of ranks that need so long: all take as long as the slowest, and the others wait."""
    slowest = max(own) + 0.002
    return [
        Times(step_s=slowest, wait_s=slowest - value, **{"cpu_s": 0.9 * value, **more.get(rank, {})})
        for rank, value in enumerate(own)
    ]


def looks(
    own: Sequence[float], more: Mapping[int, Own] | None = None, *, noise: float = 0.03, seed: int = 0
) -> list[list[Times]]:
    chance = random.Random(seed)
    return [
        together([value * (1 + abs(chance.gauss(0, noise))) for value in own], more or {})
        for _ in range(stragglers.LOOKS)
    ]


@pytest.mark.parametrize("count", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("slower", [1.6, 3.0])
def test_the_slow_rank_is_named(count: int, slower: float) -> None:
    guilty = count - 1
    own = [0.1] * count
    own[guilty] *= slower
    found = judge(looks(own), ranks(count))
    assert found is not None
    assert (found.rank, found.node, found.ranks) == (guilty, f"n{guilty}", (guilty,))
    assert found.slower_by == pytest.approx(slower, rel=0.1)
    assert found.costs == pytest.approx(1 - 1 / slower, abs=0.1)
    assert found.cause == "computing"


@pytest.mark.parametrize("count", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_healthy_ranks_are_not(count: int, noise: float) -> None:
    for seed in range(40):
        assert judge(looks([0.1] * count, noise=noise, seed=seed), ranks(count)) is None


def test_little_is_found_among_many() -> None:
    """25 % of one GPU of 64, by which all are slowed down."""
    own = [0.1] * 64
    own[40] = 0.125
    found = judge(looks(own, noise=0.01), ranks(64, per_node=8))
    assert found is not None
    assert (found.rank, found.node) == (40, "n5")


@pytest.mark.parametrize(
    ("more", "cause", "why"),
    [
        ({"data_s": 0.06}, "loading data", "its batches take 60 ms a step"),
        ({"delay_s": 0.05}, "its node", "others had its CPU for 50 ms"),
        ({"still_s": 0.05}, "its node", "the process stood still for 50 ms"),
        ({"cpu_s": 0.15}, "computing", "160 ms a step beside 100 ms"),
        ({"cpu_s": 0.09}, "computing", "no more of the CPU than the others"),
    ],
)
def test_the_cause(more: Own, cause: str, why: str) -> None:
    found = judge(looks([0.1, 0.1, 0.16, 0.1], {2: more}, noise=0.0), ranks(4))
    assert found is not None
    assert (found.rank, found.cause) == (2, cause)
    assert why in found.why


def test_what_all_suffer_alike_is_no_cause() -> None:
    """An oversubscribed machine takes the CPU from everybody."""
    more = {rank: {"delay_s": 0.05} for rank in range(4)} | {1: {"delay_s": 0.05, "cpu_s": 0.2}}
    found = judge(looks([0.1, 0.2, 0.1, 0.1], more, noise=0.0), ranks(4))
    assert found is not None
    assert found.cause == "computing"


def test_a_busy_machine_hides_nobody() -> None:
    """Most of a step the CPU is others': what is left without that tells."""
    own, late = [0.1, 0.1, 0.16, 0.1], [0.4, 0.42, 0.38, 0.36]
    more = {rank: {"delay_s": value, "cpu_s": 0.1} for rank, value in enumerate(late)}
    both = [value + late[rank] for rank, value in enumerate(own)]
    found = judge(looks(both, more, noise=0.0), ranks(4))
    assert found is not None
    assert (found.rank, found.cause) == (2, "computing")


@pytest.mark.parametrize("nodes", [2, 4])
def test_a_slow_node(nodes: int) -> None:
    own = [0.1] * (4 * nodes)
    own[4:8] = [0.17, 0.16, 0.18, 0.16]
    found = judge(looks(own, noise=0.01), ranks(4 * nodes, per_node=4))
    assert found is not None
    assert (found.node, found.ranks, found.cause) == ("n1", (4, 5, 6, 7), "its node")
    assert found.rank in (4, 6)
    assert "all ranks of node n1" in found.words


def test_one_slow_rank_does_not_blame_its_node() -> None:
    own = [0.1] * 8
    own[5] = 0.3
    found = judge(looks(own), ranks(8, per_node=4))
    assert found is not None
    assert found.ranks == (5,)


def test_stages_that_have_more_to_do_are_healthy() -> None:
    """A pipeline's head is dearer than its blocks, and its real cost another than its operations."""
    for real in ([0.1, 0.1, 0.1, 0.14], [0.1, 0.11, 0.1, 0.08], [0.12, 0.1, 0.1, 0.1]):
        assert judge(looks(real), ranks(4, work=[10, 10, 10, 13])) is None


def test_a_slow_stage_is_found_all_the_same() -> None:
    found = judge(looks([0.1, 0.2, 0.1, 0.12]), ranks(4, work=[10, 10.5, 11, 13]))
    assert found is not None
    assert found.rank == 1


def test_stages_are_compared_with_their_like() -> None:
    """Two pipelines of two stages each: the second stage does twice the work; one of the two is slow."""
    found = judge(looks([0.1, 0.2, 0.1, 0.3]), ranks(4, work=[1, 2, 1, 2]))
    assert found is not None
    assert found.rank == 3
    assert found.slower_by == pytest.approx(1.5, rel=0.1)


def test_one_bad_look_is_chance() -> None:
    seen = looks([0.1, 0.1, 0.1, 0.1])
    seen[2] = together([0.1, 0.1, 0.9, 0.1], {})
    assert judge(seen, ranks(4)) is None


def test_thousands_of_ranks_are_judged_in_no_time() -> None:
    own = [0.1] * 2048
    own[2000] = 0.2
    seen = looks(own)
    started = time.process_time()
    found = judge(seen, ranks(2048, per_node=8))
    assert found is not None
    assert found.rank == 2000
    assert time.process_time() - started < 2.0


def test_nothing_to_compare() -> None:
    assert judge([], ranks(4)) is None
    assert judge(looks([0.1]), ranks(1)) is None
    idle = [[Times(step_s=0.0, wait_s=0.0)] * 2] * 5
    assert judge(idle, ranks(2)) is None


# --- over time -------------------------------------------------------------------------------------------------


def verdict(rank: int) -> Verdict:
    return Verdict(rank=rank, node="n", ranks=(rank,), slower_by=2.0, costs=0.5, cause="computing", why="why")


def test_it_is_told_once_and_its_end_once() -> None:
    heard = Suspicion()
    story: list[tuple[int | None, str]] = [
        (1, ""), (None, ""), (1, ""), (1, "straggler since 30"), (1, ""), (None, ""), (1, ""), (None, ""),
        (None, "straggler_over since 90"), (None, ""), (2, ""), (3, ""), (3, "straggler since 120"),
    ]  # fmt: skip
    for number, (rank, said) in enumerate(story, start=1):
        event = heard.hear(None if rank is None else verdict(rank), number * 10)
        assert (f"{event[0]} since {event[2]}" if event else "") == said, number


# --- ranks.jsonl -----------------------------------------------------------------------------------------------


def test_the_table_of_a_run(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="RUNNING")
    assert stragglers.of_run(run) == []
    path = run.path / "ranks.jsonl"
    append_line(path, {"try": "0.0", **stragglers.header(ranks(3))})
    append_line(path, stragglers.line(50, together([0.1, 0.1, 0.1], {})))
    append_line(path, {"try": "0.1", **stragglers.header(ranks(2))})
    append_line(path, stragglers.line(90, together([0.1, 0.3], {1: {"data_s": 0.123456789}})))
    with path.open("a") as file:
        file.write('{"step": 100, "step_s": [0.3, 0.')
    rows = stragglers.of_run(run)
    assert [(row.rank, row.node) for row in rows] == [(0, "n0"), (1, "n1")]
    assert rows[1].times.own_s == pytest.approx(0.3)
    assert rows[1].times.data_s == 0.1235
    assert rows[0].wait_share > 0.6 > rows[1].wait_share
    assert [step for step, _ in stragglers.history(run)] == [50, 90]


def test_somebody_elses_file_may_hold_anything(runs_dir: Path) -> None:
    run = make_run(runs_dir, state="RUNNING")
    column = {name: [1.0, 2.0] for name in stragglers.COLUMNS}
    for line in (
        {"step": 1, **column}, {"nodes": 3}, {"nodes": ["a"]}, {"step": 2, **column},
        {"nodes": ["a", "b"]}, {"step": "x", **column}, {"step": 3, **column, "wait_s": ["q", None]},
    ):  # fmt: skip
        append_line(run.path / "ranks.jsonl", line)
    assert stragglers.of_run(run) == []


@pytest.fixture
def runs_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs"
