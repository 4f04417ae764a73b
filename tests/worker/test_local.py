"""Local SGD and DiLoCo: what they equal, what they send, and that a resume changes nothing."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from hpcdl.experiment import rules
from hpcdl.runs.store import RunDir
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec
from tests.worker.conftest import Finished, Workers, until

pytestmark = pytest.mark.torch

SGD = {"optim__name": "sgd", "optim__lr": 0.1, "trainer__max_grad_norm": None}
LOCAL = {"parallel__name": "local_sgd"}
DILOCO = {"parallel__name": "diloco"}
PLAIN_OUTER = {"outer_lr": 1.0, "outer_momentum": 0.0}


def convex(workers: Workers, engine: str, ranks: int, **more: Any) -> dict[str, Any]:
    """A logistic regression under an engine (tests/worker/convex.py)."""
    how = {"engine": engine, "optimizer": "sgd", "steps": 60, "rate": 0.5, "settings": {}, **more}
    run = workers.make()
    (run.path / "convex.json").write_text(json.dumps(how))
    workers.go(run, ranks, module="tests.worker.convex")
    return dict(json.loads((run.path / "convex-result.json").read_text()))


@pytest.mark.parametrize(
    ("engine", "settings"),
    [("local_sgd", {"sync_every": 1}), ("diloco", {"sync_every": 1, **PLAIN_OUTER})],
)
def test_averaging_after_each_step_is_the_synchronous_step(
    workers: Workers, engine: str, settings: dict[str, Any]
) -> None:
    """With momentum too: it is linear in the gradient. Uneven numbers of targets are among the batches."""
    one = convex(workers, "one", 1, momentum=0.9)
    averaged = convex(workers, engine, 3, momentum=0.9, settings=settings)
    assert averaged["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert averaged["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-6)


def test_averaging_after_each_step_is_ddp(workers: Workers) -> None:
    ddp = workers.train(2, **SGD)
    for case in (
        {**LOCAL, "parallel__sync_every": 1},
        {**DILOCO, "parallel__sync_every": 1, "parallel__outer_lr": 1.0, "parallel__outer_momentum": 0.0},
    ):
        local = workers.train(2, **SGD, **case)
        assert local.losses() == pytest.approx(ddp.losses(), rel=1e-5)
        assert local.evaluations() == pytest.approx(ddp.evaluations(), rel=1e-5)


def test_sends_the_less_the_rarer_it_averages(workers: Workers) -> None:
    weights = (12 * 3 + 3) * 4
    for engine, more in (("local_sgd", {}), ("diloco", {"outer_lr": 0.7, "outer_momentum": 0.9})):
        sent = {
            every: convex(workers, engine, 2, steps=12, settings={"sync_every": every, **more})["bytes"]
            for every in (1, 4, 5)
        }
        # the last step always averages: after 5, 10 and 12
        assert sent == {1: 12 * weights, 4: 3 * weights, 5: 3 * weights}
    both = {"sync_every": 4, "average_optimizer_state": True}
    assert convex(workers, "local_sgd", 2, steps=12, optimizer="adamw", settings=both)["bytes"] == 9 * weights


def test_rarer_averages_still_converge(workers: Workers) -> None:
    one = convex(workers, "one", 1)
    for engine, more in (("local_sgd", {}), ("diloco", {"outer_lr": 0.7, "outer_momentum": 0.5})):
        local = convex(workers, engine, 4, settings={"sync_every": 6, **more})
        assert local["final"] == pytest.approx(one["final"], rel=0.05)
        assert local["losses"] != pytest.approx(one["losses"], rel=1e-3)


def test_speed_is_that_of_the_steps_which_took_the_time(workers: Workers) -> None:
    """Numbers of a step come in later than it is done: neither its tokens nor its seconds count twice."""
    done = workers.train(2, **{**LOCAL, "parallel__sync_every": 5, "trainer__max_steps": 12})
    lines = [m for m in done.run.metrics() if "loss" in m]
    assert [m["step"] for m in lines] == list(range(1, 13))
    for line in lines:
        assert line["tokens_per_s"] * line["step_s"] == pytest.approx(lines[-1]["tokens"] / 12, rel=0.2)


CASES: dict[str, dict[str, Any]] = {
    "local_sgd": {**LOCAL, "parallel__sync_every": 7},
    "local_sgd with optimizer": {
        **LOCAL,
        "parallel__sync_every": 7,
        "parallel__average_optimizer_state": True,
    },
    "diloco": {**DILOCO, "parallel__sync_every": 7},
}
DISTURBED = {"peft__name": "lora", "peft__rank": 4, "peft__dropout": 0.2}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_resume_is_exact(workers: Workers, case: dict[str, Any]) -> None:
    """Bit for bit from between two averages, with dropout, evaluations and the optimizer's state."""
    run = workers.make(
        **DISTURBED,
        **case,
        trainer__eval_every=5,
        trainer__checkpoint_every=5,
        trainer__max_steps=12,
        trainer__keep_last=3,
    )
    whole = workers.go(run, 2)
    before, evaluations = whole.losses(), whole.evaluations()
    adapter = run.path / "adapter" / "adapter_model.safetensors"
    weights = adapter.read_bytes()
    for step in (10, 12):
        shutil.rmtree(run.checkpoints / f"step-{step:08d}")
    adapter.unlink()
    again = workers.go(run, 2)
    assert [e["step"] for e in run.events() if e["event"] == "resumed"] == [5]
    assert again.losses() == before
    assert again.evaluations() == evaluations
    assert adapter.read_bytes() == weights


def test_a_stop_between_averages_is_exact(workers: Workers) -> None:
    """Ranks hear of it some steps late, and all at the same step."""
    case = {**LOCAL, "parallel__sync_every": 30, "trainer__max_steps": 60}
    whole = workers.train(2, **case)
    run = workers.make(**case)
    workers.start(run, 2)
    until(lambda: run.step() >= 3, "the third step")
    run.stop_file.write_text("")
    step = workers.finish(run).outcome()["step"]
    assert 3 < step < 60
    run.stop_file.unlink()
    assert workers.go(run, 2).losses() == whole.losses()


def go_on(workers: Workers, run: RunDir, ranks: int, **dotted: Any) -> Finished:
    """The same run under other settings."""
    run.spec_file.write_text(dump_yaml(to_plain(tiny_spec(**dotted, trainer__threads_per_process=1))))
    run.outcome_file.unlink(missing_ok=True)
    return workers.go(run, ranks)


CHAIN: list[tuple[int, dict[str, Any]]] = [
    (2, {**LOCAL, "parallel__sync_every": 4}),
    (1, {}),
    (4, {**DILOCO, "parallel__sync_every": 4}),
    (2, {"parallel__name": "param_server", "parallel__mode": "async"}),
    (2, {"parallel__name": "hogwild"}),
    (2, {**DILOCO, "parallel__sync_every": 5}),
    (4, {**LOCAL, "parallel__sync_every": 5}),
    (2, {"parallel__name": "param_server"}),
]


def test_each_goes_on_where_another_stopped(workers: Workers) -> None:
    """Each link resumes the run before, trains three steps, and its first evaluation is the other's last.

    With a batch that all numbers of ranks divide; the steps are no multiples of `sync_every`.
    """
    run, last = None, -1.0
    for number, (ranks, case) in enumerate(CHAIN):
        dotted = {"trainer__max_steps": 3 * number + 3, "trainer__eval_every": 3, **case}
        dotted |= {"optim__schedule": "constant", "optim__lr": 0.003}
        if run is None:
            run = workers.make(**dotted)
        finished = go_on(workers, run, ranks, **dotted)
        evaluations = finished.evaluations()
        if number:
            assert evaluations[3 * number] == pytest.approx(last, rel=1e-6), case
            assert [e["step"] for e in run.events() if e["event"] == "resumed"][-1] == 3 * number
        last = evaluations[3 * number + 3]
    losses = finished.losses()
    assert len(losses) == 3 * len(CHAIN)
    assert losses[-1] < losses[0] - 1.0


def test_what_is_evaluated_between_averages_is_what_others_resume(workers: Workers) -> None:
    case = {"trainer__eval_every": 5, "trainer__checkpoint_every": 5, "trainer__max_steps": 9}
    for local in (LOCAL, DILOCO):
        run = workers.make(**case, **local, parallel__sync_every=4)
        finished = workers.go(run, 2)
        average = finished.evaluations()[5]
        shutil.rmtree(run.checkpoints / "step-00000009")
        ddp = go_on(workers, run, 1, **case)
        assert ddp.evaluations()[5] == pytest.approx(average, rel=1e-6)
        assert [m["step"] for m in run.metrics() if "loss" in m] == list(range(1, 10))


@pytest.mark.parametrize("name", ["local_sgd", "diloco", "param_server", "hogwild"])
def test_nothing_else_goes_with_copies(name: str) -> None:
    spec = tiny_spec(parallel__name=name, parallel__tp=2, parallel__dp_shard=-1)
    faults = list(rules.refused(spec))
    assert [f.key for f in faults] == ["parallel.dp_shard", "parallel.tp"]
    assert [f.fix for f in faults] == ["parallel.dp_shard=1", "parallel.tp=1"]
    assert f"{name} trains a whole model on every process" in faults[0].problem
    assert list(rules.refused(tiny_spec(parallel__name=name))) == []
