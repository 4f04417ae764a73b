"""Where the bytes of a step go: what is planned, what a real training measures, and where it is told."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from hpcdl.distributed import stages as layout
from hpcdl.plan.schedules import order
from hpcdl.runs import memory as report
from tests.worker.conftest import Finished, Workers

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SHAPE: dict[str, Any] = {
    "model__shape__hidden_size": 96,
    "model__shape__intermediate_size": 320,
    "model__shape__num_hidden_layers": 3,
    "data__seq_len": 80,
    "trainer__max_steps": 4,
    "monitor": {"name": "default"},
}
LORA: dict[str, Any] = {"peft__name": "lora", "peft__rank": 4}
EXACT = ("weights", "adapters", "gradients", "optimizer", "activations", "recomputed", "logits", "buffers")


def record_of(done: Finished) -> dict[str, Any]:
    record = report.load(done.run.path)
    assert record is not None, done.log[-3000:]
    return record


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"trainer__activation_checkpointing": "full", "trainer__precision": "bf16"},
        {**LORA, "trainer__activation_checkpointing": "selective"},
        {**LORA, "trainer__precision": "bf16", "trainer__activation_checkpointing": "full"},
        {**LORA, "peft__targets": ["q_proj", "v_proj"], "model__shape__tie_word_embeddings": False},
        {**LORA, "quant__scheme": "nf4", "quant__head": "nf4", "trainer__precision": "bf16"},
    ],
    ids=["full", "full-bf16-recomputed", "lora-selective", "lora-bf16", "lora-untied", "qlora"],
)
def test_the_plan_is_what_a_step_takes(workers: Workers, case: dict[str, Any]) -> None:
    record = record_of(workers.train(1, **SHAPE, **case))
    planned, measured = record["planned"], record["measured"]
    for name in EXACT:
        assert planned[name] == pytest.approx(measured[name], rel=0.1, abs=512), name
    assert planned["tensors"] == pytest.approx(measured["tensors"], rel=0.1)
    assert measured["weights"] and measured["activations"] and measured["gradients"]
    assert measured["peak"] > measured["runtime"] > measured["tensors"] and measured["kept"] >= 0


def test_the_table_is_told_in_the_log_the_card_and_the_run(workers: Workers) -> None:
    done = workers.train(1, **SHAPE, **LORA)
    record = record_of(done)
    assert record["step"] == 2  # 3 and 4 are the communication's
    assert report.as_text(record) in done.log
    assert "optimizer state" in done.log and "where the bytes go: step 2" in done.log
    assert f"| memory | {report.in_short(record)} |" in (done.run.path / "card.md").read_text()
    # the step that is measured is told apart from the others
    assert [m["step"] for m in done.run.metrics() if m.get("profiled")] == [2, 3, 4]


def test_each_rank_has_its_own(workers: Workers) -> None:
    done = workers.train(2, **SHAPE, parallel__name="fsdp")
    first = record_of(done)
    second = json.loads(report.file_of(done.run.path, 1).read_text())
    assert (first["rank"], second["rank"]) == (0, 1)
    assert "rank 0 of 2: this rank's own" in done.log and "step 2, rank 1" not in done.log
    told = done.result()["memory"]
    fullest = (first, second)[told["fullest_rank"]]
    assert told["ranks"] == 2 and told["tensors_bytes"] == fullest["measured"]["tensors"]
    assert told["planned_peak_bytes"] == fullest["planned"]["peak"] > fullest["ended"]["peak"]
    assert first["ended"]["peak"] >= first["measured"]["peak"]  # its checkpoint and its result are in it
    alone = record_of(workers.train(1, **SHAPE))
    for name in ("weights", "optimizer"):
        assert first["measured"][name] == pytest.approx(alone["measured"][name] / 2, rel=0.05)
        assert first["planned"][name] == pytest.approx(first["measured"][name], rel=0.05)


def test_nothing_is_measured_where_nobody_wants_to_know(workers: Workers) -> None:
    done = workers.train(1, trainer__max_steps=2)
    assert report.load(done.run.path) is None and "where the bytes go" not in done.log


def test_weights_in_a_mapped_file_are_told_from_those_in_memory(tmp_path: Any) -> None:
    import torch

    from hpcdl.worker.memory import mapped_files
    from hpcdl.worker.storages import unique

    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(1 << 20))
    mapped = torch.from_file(str(file), shared=False, size=1 << 20, dtype=torch.uint8)
    held = torch.zeros(1 << 20, dtype=torch.uint8)
    found = mapped_files(unique([mapped, held]))
    assert list(found) == [mapped.untyped_storage().data_ptr()]
    assert next(iter(found.values())) <= 1 << 17  # nothing of it was read
    mapped.sum()
    (resident,) = mapped_files(unique([mapped, held])).values()
    assert resident == 1 << 20


def test_the_plan_knows_the_losses_chunks() -> None:
    from hpcdl.distributed import losses
    from hpcdl.plan import memory

    assert losses.CHUNK_LOGITS == memory.CHUNK_LOGITS and losses.HELD_WEIGHTS == memory.HELD_WEIGHTS


@pytest.mark.parametrize(
    ("ranks", "strategy"),
    [
        (2, {"name": "tp", "tp": 2}),
        (4, {"name": "fsdp", "dp_shard": 2, "tp": 2}),
        (2, {"name": "pp", "pp": 2}),
        (2, {"name": "cp", "cp": 2}),
        (2, {"name": "local_sgd"}),
        pytest.param(2, {"name": "diloco"}, marks=pytest.mark.slow),
        pytest.param(2, {"name": "param_server"}, marks=pytest.mark.slow),
        pytest.param(2, {"name": "hogwild"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_every_strategy_can_be_measured(workers: Workers, ranks: int, strategy: dict[str, Any]) -> None:
    done = workers.train(ranks, **SHAPE, **{f"parallel__{key}": value for key, value in strategy.items()})
    for rank in range(ranks):
        record = json.loads(report.file_of(done.run.path, rank).read_text())
        planned, measured = record["planned"], record["measured"]
        assert 0 < measured["weights"] < measured["tensors"]
        assert planned["tensors"] == pytest.approx(measured["tensors"], rel=0.2)
        assert planned["peak"] > record["ended"]["peak"]  # else it would be said to fit where it doesn't
    assert len(done.losses()) == SHAPE["trainer__max_steps"]


def test_a_tensor_that_cannot_be_looked_into_ends_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hpcdl.worker import storages

    def broken(tensor: object) -> object:
        raise RuntimeError("no storage here")

    monkeypatch.setattr(storages, "storages", broken)
    weight = torch.nn.Parameter(torch.ones(3))
    with storages.Watching(storages.Tracker({}), torch.nn.ModuleList(), []) as watching:
        found = weight.detach() * 2
    assert found.tolist() == [2.0, 2.0, 2.0]
    assert "RuntimeError: no storage here" in watching.fault


def test_a_pipeline_goes_in_the_order_that_is_planned() -> None:
    """Every schedule, rank by rank, as torch's own classes lay it out."""
    from torch.distributed.pipelining import schedules

    names = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    compared = 0
    for name, kind in layout.SCHEDULES.items():
        made = getattr(schedules, kind.torch_name)
        for ranks, at_once in itertools.product((2, 3, 4), (2, 4, 6, 8, 9, 12)):
            if kind.one_stage or layout.does_not_fit(name, ranks, at_once):
                continue  # of one stage a rank torch's own list is for display, and off by one
            each = kind.stages_per_rank
            for rank in range(ranks):
                held = layout.held_by(kind.placement, rank, ranks, ranks * each)
                schedule = made.__new__(made)
                schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = (
                    ranks,
                    each,
                    at_once,
                )
                schedule.num_stages = schedule._num_stages = ranks * each
                schedule.microbatches_per_round = at_once // max(1, at_once // ranks)
                actions = [a for a in schedule._calculate_single_rank_operations(rank) if a is not None]
                theirs = [
                    (names[one.computation_type.name], held.index(one.stage_index), one.microbatch_index)
                    for action in actions
                    for one in (action.sub_actions or (action,))
                ]
                assert [tuple(op) for op in order(name, ranks, rank, each, at_once)] == theirs
                compared += 1
    assert compared > 100
