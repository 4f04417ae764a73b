"""AdamW with 8-bit moments: bitsandbytes' numbers, exact resume, what it is refused with."""

from __future__ import annotations

from typing import Any

import pytest

from hpcdl.experiment.rules import moments_stay_where_they_are
from tests.factory import tiny_spec
from tests.worker.conftest import Workers

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.torch

EIGHT: dict[str, Any] = {"optim__name": "adamw8bit", "optim__lr": 0.003, "trainer__max_steps": 6}


def test_steps_are_those_of_bitsandbytes() -> None:
    import bitsandbytes

    from hpcdl.distributed.adamw8bit import AdamW8bit

    keys: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
    torch.manual_seed(0)
    start = [torch.randn(96, 64), torch.randn(50)]  # 8-bit, and too small for it
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    mine, other = AdamW8bit(ours, **keys), bitsandbytes.optim.AdamW8bit(theirs, **keys)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, first)
    assert mine.state[ours[0]]["exp_avg"].dtype == torch.uint8
    assert mine.state[ours[1]]["exp_avg"].dtype == torch.float32


def test_a_run_goes_on_bit_for_bit(workers: Workers) -> None:
    whole = workers.train(1, **EIGHT, trainer__checkpoint_every=3)
    again = workers.make(**EIGHT, trainer__resume_from=str(whole.run.checkpoints / "step-00000003"))
    assert workers.go(again).losses() == whole.losses()[3:]
    plain = workers.train(1, **{**EIGHT, "optim__name": "adamw"})
    assert whole.losses() == pytest.approx(plain.losses(), rel=2e-2)
    assert whole.losses() != plain.losses()


def test_two_processes_step_as_one(workers: Workers) -> None:
    one, two = workers.train(1, **EIGHT), workers.train(2, **EIGHT)
    assert two.losses() == pytest.approx(one.losses(), rel=1e-3)


@pytest.mark.parametrize("strategy", ["fsdp", "tp", "local_sgd", "hogwild", "param_server"])
def test_it_is_refused_where_moments_are_split_or_averaged(strategy: str) -> None:
    degrees = {"fsdp": {"parallel__dp_shard": 2}, "tp": {"parallel__tp": 2}}.get(strategy, {})
    spec = tiny_spec(**EIGHT, parallel__name=strategy, cluster__processes_per_node=2, **degrees)
    (fault,) = moments_stay_where_they_are(spec.optim, spec.parallel, spec.cluster)
    assert fault.key == "optim.name" and fault.fix == "optim=adamw"
    assert "8-bit" in fault.problem


def test_it_is_taken_where_parameters_are_whole() -> None:
    for strategy in ("ddp", "pp", "cp"):
        spec = tiny_spec(**EIGHT, parallel__name=strategy, cluster__processes_per_node=2)
        assert list(moments_stay_where_they_are(spec.optim, spec.parallel, spec.cluster)) == []
