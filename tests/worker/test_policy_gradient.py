"""Policy gradients: their formulas, and trainings that are the same on any number of processes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax

from hpcdl import experiment
from hpcdl.distributed import clipped
from hpcdl.distributed.clipped import Answered, LinearClipped, Terms, token_logs
from hpcdl.distributed.losses import IGNORE
from hpcdl.launch import sweep
from hpcdl.launch.compose import Composer
from hpcdl.spec.plain import dump_yaml, to_plain
from hpcdl.worker.rl.advantages import generalised, normal, within_groups
from hpcdl.worker.rl.answering import sequences
from hpcdl.worker.rl.environments import choose
from hpcdl.worker.rl.problems import Problems
from hpcdl.worker.tokenizer import ByteTokenizer
from tests.factory import tiny_plain, tiny_spec
from tests.worker.conftest import Finished, Workers

pytestmark = pytest.mark.torch


# --- formulas ---------------------------------------------------------------------------------------------


def test_advantages_by_hand() -> None:
    """Three steps, the second ends an episode; what follows the last is the value."""
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, 1.0, 2.0]])
    after = torch.tensor([[1.0, 9.0, 4.0]])
    ends, cuts = torch.tensor([[False, True, False]]), torch.tensor([[False, False, True]])
    found = generalised(rewards, values, after, ends, cuts, gamma=0.9, lam=0.5)
    last, second = 3 + 0.9 * 4 - 2, 2 - 1
    first = (1 + 0.9 * 1.0 - 0.5) + 0.9 * 0.5 * second
    assert found.tolist()[0] == pytest.approx([first, second, last])


def test_with_lambda_one_it_is_the_return_less_the_baseline() -> None:
    torch.manual_seed(0)
    rewards, values = torch.rand(2, 7), torch.rand(2, 7)
    after = torch.cat([values[:, 1:], torch.rand(2, 1)], dim=1)
    ends = torch.zeros(2, 7, dtype=torch.bool)
    cuts = ends.clone()
    cuts[:, -1] = True
    found = generalised(rewards, values, after, ends, cuts, gamma=0.9, lam=1.0)
    for row in range(2):
        for t in range(7):
            later = sum(0.9 ** (k - t) * rewards[row, k].item() for k in range(t, 7))
            later += 0.9 ** (7 - t) * after[row, -1].item()
            assert found[row, t].item() == pytest.approx(later - values[row, t].item(), abs=1e-5)


def test_better_and_worse_within_a_group() -> None:
    found = within_groups(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]]))
    assert found[0].tolist() == pytest.approx([0.866, -0.866, -0.866, 0.866], abs=1e-3)
    assert found[1].tolist() == [0, 0, 0, 0]  # nobody is better: nothing is learned
    assert normal(torch.tensor([3.0])).tolist() == [0]


def test_what_is_chosen_is_as_likely_as_it_should_be() -> None:
    chances = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64).numpy()
    found = choose(torch.tensor([[0.2, 0.5, 0.3]]).expand(1000, 3), chances)
    assert [int((found == action).sum()) for action in range(3)] == pytest.approx([200, 500, 300], abs=1)


def plain(logits: torch.Tensor, labels: torch.Tensor, answered: Answered, terms: Terms) -> torch.Tensor:
    """The definition, summed over tokens."""
    chosen = log_softmax(logits / terms.temperature, -1).gather(1, labels[:, None]).squeeze(1)
    old = chosen.detach() if answered.old is None else answered.old
    ratio = (chosen - old).exp()
    bounded = ratio.clamp(1 - terms.clip, 1 + terms.clip)
    gain = torch.minimum(ratio * answered.advantages, bounded * answered.advantages)
    if answered.reference is not None:
        away = answered.reference - chosen
        gain = gain - terms.kl_coef * (away.exp() - away - 1)
    return -(answered.weights * gain).sum()


@pytest.mark.parametrize("known", ["all", "fresh", "no reference"])
def test_the_loss_and_its_gradients(monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    """In several chunks, the last one smaller; some ratios beyond their bounds on either side."""
    monkeypatch.setitem(clipped.CHUNK_LOGITS, "cpu", 16 * 4 * 11)
    torch.manual_seed(0)
    hidden = torch.randn(37, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 4, dtype=torch.float64, requires_grad=True)
    labels, terms = torch.randint(0, 11, (37,)), Terms(clip=0.2, kl_coef=0.3, temperature=0.7)
    now = log_softmax((hidden @ weight.T).detach() / 0.7, -1).gather(1, labels[:, None]).squeeze(1)
    answered = Answered(
        old=None if known == "fresh" else now + 0.4 * torch.randn(37).double(),
        reference=None if known == "no reference" else now + torch.randn(37).double(),
        advantages=torch.randn(37).double(), weights=torch.rand(37).double(),
    )  # fmt: skip
    loss, sums = LinearClipped.apply(hidden, weight, labels, answered, terms, True)
    (3 * loss).backward()
    mine = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = plain(hidden @ weight.T, labels, answered, terms)
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert sums[0].item() == pytest.approx(expected.item(), rel=1e-9)
    for got, want in zip(mine, (hidden.grad, weight.grad), strict=True):
        assert got is not None and want is not None
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
    if known != "fresh":
        assert sums[3] > 0  # some were clipped
    assert token_logs(hidden.detach()[None], weight.detach(), labels[None], 0.7)[0].tolist() == pytest.approx(
        now.tolist()
    )


def test_sequences() -> None:
    """Prompts of two lengths; only answers are targets, each predicted from the token before it."""
    answers = torch.tensor([[7, 9, 0], [8, 8, 9]])
    found = sequences([[1, 2], [3, 4, 5]], answers, torch.tensor([2, 3]), pad_id=0)
    assert found["input_ids"].tolist() == [[1, 2, 7, 9, 0], [3, 4, 5, 8, 8]]
    skip = IGNORE
    assert found["labels"].tolist() == [[skip, 7, 9, skip, skip], [skip, skip, 8, 8, 9]]
    assert found["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2


# --- an environment ---------------------------------------------------------------------------------------

POLE: dict[str, Any] = {
    "model": {"name": "mlp", "mlp": {"widths": [16], "activation": "tanh"}},
    "data__kind": "none",
    "task": {"name": "policy_gradient", "envs": 4, "steps": 60, "epochs": 2, "sample_prompt": ""},
    "trainer": {
        "max_steps": 4, "global_batch_size": 120, "micro_batch_size": 30, "eval_samples": 5, "checkpoint_every": 2,
        "threads_per_process": 1, "eval_every": 2, "keep_last": 4,
    },
}  # fmt: skip
MEASURED = (
    "loss",
    "policy_loss",
    "value_loss",
    "entropy",
    "kl",
    "grad_norm",
    "episode_return",
    "clip_fraction",
)


def measured(finished: Finished, *names: str) -> list[list[float]]:
    lines = [line for line in finished.run.metrics() if "loss" in line]
    return [[line[name] for name in names if name in line] for line in lines]


def alike(one: Finished, other: Finished, *names: str, rel: float = 1e-6) -> None:
    """Every number of every iteration; sums in another order part slowly, and an optimizer widens what is apart."""
    mine, theirs = measured(one, *names), measured(other, *names)
    assert len(mine) == len(theirs) > 0
    for number, (left, right) in enumerate(zip(mine, theirs, strict=True)):
        assert left == pytest.approx(right, rel=rel * 10**number, abs=1e-7)


@pytest.fixture(scope="module")
def pole(workers: Workers) -> Finished:
    return workers.train(1, **POLE)


def test_any_number_of_processes_play_the_same(workers: Workers, pole: Finished) -> None:
    """Three don't share four copies evenly; they update from the same samples."""
    three = workers.train(3, **{**POLE, "trainer": {**POLE["trainer"], "micro_batch_size": 10}})
    alike(three, pole, *MEASURED)
    result = pole.result()
    assert result["env_steps"] == 4 * 240 and result["world_size"] == 1
    assert result["eval_return_after"] == pytest.approx(three.result()["eval_return_after"])
    assert (pole.run.path / "reward.png").stat().st_size > 10_000
    assert (pole.run.path / "model" / "policy.safetensors").is_file()
    assert "return of an episode" in (pole.run.path / "card.md").read_text()


def test_a_cut_run_goes_on_exactly(workers: Workers, pole: Finished) -> None:
    """As if it had been killed after the second iteration's checkpoint."""
    run = workers.make(**POLE)
    for name in ("step-00000002",):
        source, target = pole.run.checkpoints / name, run.checkpoints / name
        target.mkdir(parents=True)
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    lines = [line for line in pole.run.metrics() if line["step"] <= 2]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = workers.go(run)
    alike(again, pole, *MEASURED, rel=1e-12)
    assert any(event["event"] == "resumed" for event in run.events())
    assert again.result()["eval_return_after"] == pole.result()["eval_return_after"]


def test_reinforce_with_its_baseline(workers: Workers) -> None:
    task = {**POLE["task"], "method": "reinforce", "epochs": 1}
    found = workers.train(
        1, **{**POLE, "task": task, "trainer": {**POLE["trainer"], "global_batch_size": 240}}
    )
    lines = measured(found, "kl", "clip_fraction")
    assert lines == [[pytest.approx(0, abs=1e-6), 0]] * 4  # each sample serves once: no other policy yet


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole", "cartpole_reinforce"])
def test_the_pole_stays_up(workers: Workers, name: str) -> None:
    """As the experiments have it."""
    overrides = (f"+experiment={name}", "monitor=none", "trainer.threads_per_process=1")
    spec = sweep.read(Composer(), overrides, multirun=False).points[0].spec
    run = workers.make(**POLE)
    run.spec_file.write_text(dump_yaml(to_plain(spec)))
    assert workers.go(run).result()["eval_return_after"] >= 475


# --- a language model -------------------------------------------------------------------------------------

SUMS: dict[str, Any] = {
    "data__kind": "none",
    "task": {
        "name": "policy_gradient", "method": "grpo", "reward": "sums", "prompts": 4, "group": 4, "epochs": 2,
        "max_new_tokens": 4, "write_batch": 6, "sample_prompt": "1+1=", "kl_coef": 0.1,
    },
    "optim__lr": 0.02,
    "optim__eps": 1e-5,
    "trainer": {
        "max_steps": 3, "global_batch_size": 8, "micro_batch_size": 2, "eval_samples": 5, "threads_per_process": 1,
    },
}  # fmt: skip
TOLD = ("reward", "answer_tokens", "loss", "kl", "entropy", "clip_fraction", "grad_norm")
BYTES = """
from hpcdl.worker.rewards import Problem

def problem(draw):
    return Problem(f"{draw.randrange(50)}:")

def reward(problem, answer):
    return sum(ord(each) % 2 for each in answer) / 4
"""
"""Every second character is right: a model that knows nothing has some of them."""


@pytest.fixture(scope="module")
def own_reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("rewards") / "odd.py"
    path.write_text(BYTES)
    return str(path)


def asked(own_reward: str, **more: Any) -> dict[str, Any]:
    return {**SUMS, "task": {**SUMS["task"], "reward": own_reward}, **more}


@pytest.fixture(scope="module")
def alone(workers: Workers, own_reward: str) -> Finished:
    return workers.train(1, **asked(own_reward))


def test_what_is_held_out_is_not_trained_on(own_reward: str) -> None:
    """Fifty problems, ten of them held out: drawn by chance, most of these would come in eighty draws."""
    trainer = {**SUMS["trainer"], "eval_samples": 10}
    problems = Problems(tiny_spec(**asked(own_reward, trainer=trainer)), ByteTokenizer())
    trained = [problem for iteration in range(1, 21) for problem in problems.of(iteration)]
    assert len(trained) == 80 and len(set(trained)) > 25
    assert not set(trained) & set(problems.heldout())
    assert trained[4:8] == problems.of(2)


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_answer_and_learn_the_same(
    workers: Workers, own_reward: str, alone: Finished, name: str
) -> None:
    two = workers.train(2, **asked(own_reward, parallel={"name": name}))
    alike(two, alone, *TOLD)
    assert measured(alone, "reward")[0][0] > 0 and measured(alone, "kl")[-1][0] > 0
    assert two.result()["eval_reward_after"] == pytest.approx(alone.result()["eval_reward_after"])
    assert two.result()["sample"]["prompt"] == "1+1="


def test_an_adapters_base_is_the_reference(workers: Workers, own_reward: str) -> None:
    """No second copy; an adapter begins as nothing, and so the divergence does."""
    lora = {"peft": {"name": "lora", "rank": 4}}
    one = workers.train(1, **asked(own_reward, **lora))
    two = workers.train(2, **asked(own_reward, **lora, parallel={"name": "fsdp"}))
    alike(two, one, *TOLD)
    kl = [line[0] for line in measured(one, "kl")]
    assert kl[-1] > kl[0] >= 0
    assert one.result()["adapter"]


def test_problems_from_data(workers: Workers, tmp_path: Path) -> None:
    """A prompt and its answer in each line; hpcdl's own reward by name."""
    file = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"Say {n}.", "answer": str(n)} for n in range(20)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"kind": "jsonl", "paths": [str(file)], "seq_len": 32, "split": 0.2}
    task = {**SUMS["task"], "reward": "exact", "kl_coef": 0.0}
    found = workers.train(1, **{**SUMS, "data": data, "task": task})
    assert [line[0] for line in measured(found, "reward")] == [0, 0, 0]
    assert measured(found, "silent_groups")[0] == [1.0]


def test_evaluation_is_a_task(workers: Workers) -> None:
    """The loss that a training of the same experiment begins with; on two ranks, too, whole or sharded."""
    trained = workers.train(1, trainer__max_steps=1)
    for name in ("ddp", "fsdp"):
        found = workers.train(2, task__name="eval", parallel={"name": name})
        assert found.result()["eval_loss_after"] == pytest.approx(trained.evaluations()[0], rel=1e-5)
    assert found.outcome()["status"] == "finished" and not found.run.checkpoints.exists()


# --- refused before submission ----------------------------------------------------------------------------


def faults(base: dict[str, Any], **dotted: Any) -> dict[str, Any]:
    return {
        fault.key: fault for fault in experiment.check(tiny_plain(**copy.deepcopy({**base, **dotted}))).faults
    }


@pytest.mark.parametrize(
    ("base", "dotted", "key", "words"),
    [
        (POLE, {"model": tiny_plain()["model"]}, "model", "this is a language model"),
        (POLE, {"data__kind": "synthetic"}, "data", "no text is read"),
        (POLE, {"peft": {"name": "lora"}}, "peft", "all of them trained"),
        (POLE, {"cluster__processes_per_node": 5}, "task.envs", "5 processes"),
        (POLE, {"task__method": "reinforce"}, "task.epochs", "serve once"),
        (POLE, {"trainer__global_batch_size": 90}, "trainer.global_batch_size", "240 samples"),
        (POLE, {"parallel": {"name": "local_sgd"}}, "parallel", "weights of their own"),
        (SUMS, {"model": POLE["model"]}, "model", "needs a language model"),
        (SUMS, {"task__reward": None}, "task.reward", "worth"),
        (SUMS, {"task__reward": "summs"}, "task.reward", "no such reward"),
        (SUMS, {"task__reward": "/no/such.py"}, "task.reward", "no such file"),
        (SUMS, {"task__reward": "exact"}, "data", "no problems of its own"),
        (SUMS, {"data__kind": "pydoc"}, "data", "plain text"),
        (SUMS, {"task__max_new_tokens": 32}, "task.max_new_tokens", "no room"),
        (SUMS, {"prune": {"name": "magnitude"}}, "prune", "no text"),
        ({}, {"data__kind": "none"}, "data", "reads text"),
        ({}, {"model": POLE["model"]}, "model", "for language models"),
        ({}, {"task": {"name": "eval"}, "parallel": {"name": "diloco"}}, "parallel", "nothing is trained"),
    ],
)
def test_what_cannot_be(base: dict[str, Any], dotted: dict[str, Any], key: str, words: str) -> None:
    fault = faults(base, **dotted)[key]
    assert words in fault.problem and fault.allowed and fault.fix


def test_a_split_policy_is_refused() -> None:
    split = {"parallel": {"name": "tp", "tp": 2, "dp_replicate": 1}, "cluster__processes_per_node": 2}
    assert "parallel.tp" in faults(SUMS, **split)
    assert not faults(SUMS) and not faults(POLE)
