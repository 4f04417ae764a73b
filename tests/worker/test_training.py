"""The loop as real processes: the number of ranks changes nothing, a resume changes nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hpcdl.runs.kinds import NEVER_RESTART
from tests.worker.conftest import Finished, Workers, until

pytestmark = pytest.mark.torch

SFT = {"task__name": "sft", "data__seq_len": 64, "data__packing": False}
LORA_DROPOUT = {
    "peft__name": "lora", "peft__rank": 4, "peft__dropout": 0.2, "trainer__eval_every": 4, "trainer__max_steps": 40,
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [{}, SFT, {"peft__name": "lora", "data__packing": False}], ids=["packed", "sft", "lora"]
)
def test_two_ranks_equal_one(workers: Workers, case: dict[str, Any]) -> None:
    one = workers.train(1, **case)
    two = workers.train(2, **case)
    assert one.losses() == pytest.approx(two.losses(), rel=1e-5)
    assert one.evaluations() == pytest.approx(two.evaluations(), rel=1e-5)
    norms = [[m["grad_norm"] for m in f.run.metrics() if "loss" in m] for f in (one, two)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert one.losses()[-1] < one.losses()[0]
    assert two.result()["world_size"] == 2


def test_accumulation_equals_one_large_batch(workers: Workers) -> None:
    """Answers of uneven length: a mean of micro-batch means would be another number."""
    small = workers.train(1, **SFT, trainer__micro_batch_size=1)
    large = workers.train(1, **SFT, trainer__micro_batch_size=8)
    assert small.losses() == pytest.approx(large.losses(), rel=1e-5)


def test_recomputing_activations_changes_nothing(workers: Workers) -> None:
    plain = workers.train(1)
    for how in ("full", "selective"):
        assert workers.train(1, trainer__activation_checkpointing=how).losses() == pytest.approx(
            plain.losses(), rel=1e-6
        )


def test_bf16_and_sgd_learn(workers: Workers) -> None:
    finished = workers.train(
        2,
        trainer__precision="bf16",
        optim__name="sgd",
        optim__lr=0.1,
        trainer__max_steps=12,
        optim__schedule="linear",
    )
    assert finished.losses()[-1] < finished.losses()[0] - 0.2


@pytest.fixture(scope="module")
def undisturbed(workers: Workers) -> Finished:
    return workers.train(2, **LORA_DROPOUT)


def stopped(workers: Workers, how: str) -> tuple[Finished, int]:
    """A run that was asked to stop after some step, and that step."""
    run = workers.make(**LORA_DROPOUT)
    pids = workers.start(run, 2)
    until(lambda: run.step() >= 3, "the third step")
    if how == "file":
        run.stop_file.write_text("cancel by test\n")
    else:
        os.kill(pids[1], getattr(signal, how))  # not the rank that writes
    finished = workers.finish(run)
    assert finished.codes == [0, 0], finished.log
    outcome = finished.outcome()
    assert outcome["status"] == "stopped"
    assert outcome["reason"] == ("cancel" if how == "file" else f"signal {how.removeprefix('SIG')}")
    assert 3 <= outcome["step"] < 40
    assert {"event": "stopping", "reason": outcome["reason"], "step": outcome["step"]}.items() <= next(
        e for e in run.events() if e["event"] == "stopping"
    ).items()
    return finished, outcome["step"]


@pytest.mark.parametrize("how", ["SIGUSR2", "SIGTERM", "file"])
def test_resume_is_exact(workers: Workers, undisturbed: Finished, how: str) -> None:
    """Bit for bit, with dropout, evaluations and the optimizer's state."""
    first, step = stopped(workers, how)
    first.run.stop_file.unlink(missing_ok=True)
    again = workers.go(first.run, 2)
    assert again.outcome()["status"] == "finished"
    assert [e["step"] for e in again.run.events() if e["event"] == "resumed"] == [step]
    assert again.losses() == undisturbed.losses()
    assert again.evaluations() == undisturbed.evaluations()
    weights = [f.run.path / "adapter" / "adapter_model.safetensors" for f in (again, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert again.result()["tokens"] == undisturbed.result()["tokens"]


def test_killed_between_checkpoints(workers: Workers, undisturbed: Finished) -> None:
    """Lines of the lost steps are taken back, and the newest checkpoint was torn: the one before counts."""
    run = workers.make(**LORA_DROPOUT, trainer__checkpoint_every=5, trainer__keep_last=3)
    pids = workers.start(run, 2)
    second = run.checkpoints / "step-00000010"  # written in the background: whole a few steps later
    until(lambda: run.step() >= 12 and second.exists(), "step 12 and two checkpoints")
    os.kill(pids[0], signal.SIGKILL)
    assert -signal.SIGKILL in workers.finish(run).codes
    # The kill may come before or after the rename of step 15; what is whole is whole.
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    part = next(newest.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    (run.checkpoints / ".tmp-step-99-0.0-0").mkdir()
    (run.checkpoints / "step-00000099").mkdir()  # made by someone's copy that broke off
    again = workers.go(run, 2)
    before = int(newest.name.removeprefix("step-")) - 5
    assert [e["step"] for e in run.events() if e["event"] == "resumed"] == [before]
    assert [e["message"].split()[1] for e in run.events() if e["event"] == "warning"] == [
        "step-00000099",
        newest.name,
    ]
    assert again.losses() == undisturbed.losses()
    assert [m["step"] for m in run.metrics() if "loss" in m] == list(range(1, 41))
    assert sorted(p.name for p in run.checkpoints.iterdir()) == [
        "step-00000030",
        "step-00000035",
        "step-00000040",
    ]


def test_resume_on_another_number_of_ranks(workers: Workers) -> None:
    """The same batches: the same losses up to the order of sums."""
    case = {"trainer__max_steps": 16, "trainer__checkpoint_every": 1}
    whole = workers.train(1, **case)
    run = workers.make(**case)
    workers.start(run, 2)
    until(lambda: run.step() >= 4, "the fourth step")
    run.stop_file.write_text("")
    assert workers.finish(run).outcome()["reason"] == "STOP file"
    run.stop_file.unlink()
    assert workers.go(run, 1).losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_changed_data_is_not_resumed(workers: Workers, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says nothing new. " * 60 for i in range(40)))
    run = workers.make(data__kind="text", data__paths=[str(text)])
    workers.go(run)
    text.write_text(text.read_text().replace("nothing", "something"))
    failed = workers.go(run, ok=False)
    assert failed.codes == [NEVER_RESTART]
    assert "the data has changed since step-00000006 was saved" in failed.log


def test_failing_rank_says_why(workers: Workers, tmp_path: Path) -> None:
    """Rank 1 alone can't write its cache; rank 0 waits for it and is ended."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    run = workers.make(data__num_samples=300)
    failed = workers.go(
        run, 2, ok=False, env={"HPCDL_TRY": "2.1"}, rank_env={"1": {"HPCDL_CACHE": str(blocked)}}
    )
    assert failed.codes[1] == NEVER_RESTART
    record = json.loads((run.errors / "try2.1-restart0-rank1.json").read_text())
    assert record["type"] in ("NotADirectoryError", "FileExistsError")
    assert (record["rank"], record["step"]) == (1, 0)
    assert "open_dataset" in record["traceback"] and str(blocked) in record["message"]
    assert not run.outcome_file.exists()


def test_user_fault_has_no_traceback(workers: Workers) -> None:
    run = workers.make(model__path="/nonexistent/model")
    failed = workers.go(run, ok=False)
    assert "error: model.path=/nonexistent/model is not a folder with a config.json" in failed.log
    assert "Traceback" not in failed.log


def test_gpus_that_are_not_there(workers: Workers) -> None:
    failed = workers.go(workers.make(cluster__gpus_per_node=1), ok=False, env={"CUDA_VISIBLE_DEVICES": ""})
    assert "cluster.gpus_per_node=1, but torch" in failed.log
    assert "sees no GPU" in failed.log


def test_diverged_loss_ends_the_run(workers: Workers) -> None:
    failed = workers.go(workers.make(optim__lr=1e30, trainer__max_grad_norm=None), ok=False)
    assert "lower optim.lr" in failed.log


def test_result_and_its_files(workers: Workers) -> None:
    run = workers.make(
        monitor__name="default", tracker__name="tensorboard", task__sample_prompt="Ada has",
        task__sample_tokens=8, trainer__log_every=4,
    )  # fmt: skip
    finished = workers.go(run, 2)
    result = finished.result()
    assert [m["step"] for m in run.metrics() if "loss" in m] == [4, 6]
    assert result["eval_loss_before"] == finished.evaluations()[0]
    assert result["eval_loss_after"] == finished.evaluations()[6] < result["eval_loss_before"]
    assert result["trainable_parameters"] == result["parameters"] == 26912
    assert result["tokens"] <= 6 * 8 * 32
    assert result["adapter"] is None
    assert result["sample"]["before"] and result["sample"]["after"]
    assert "| perplexity |" in (run.path / "card.md").read_text()
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run.path / "tensorboard").iterdir())


def test_model_and_adapter_load_elsewhere(workers: Workers) -> None:
    """What is saved gives the same loss in plain transformers and peft."""
    from transformers import AutoModelForCausalLM

    from hpcdl.runs.spec import read_spec
    from hpcdl.worker.check_adapter import plain_loss

    tuned = workers.train(2, peft__name="lora", peft__rank=4, peft__targets=["q_proj", "v_proj"])
    adapter = Path(tuned.result()["adapter"])
    loss = plain_loss(read_spec(tuned.run.spec_file), adapter)
    assert loss == pytest.approx(tuned.result()["eval_loss_after"], rel=1e-5)
    assert abs(loss - tuned.result()["eval_loss_before"]) > 1e-3  # the adapter does something

    whole = workers.train(1)
    model = AutoModelForCausalLM.from_pretrained(whole.result()["model"])
    assert sum(p.numel() for p in model.parameters()) == whole.result()["parameters"]
    # Trained on from there: the first evaluation is the last one of the run before.
    more = workers.train(1, model__path=whole.result()["model"], trainer__max_steps=1)
    assert more.evaluations()[0] == pytest.approx(whole.evaluations()[6], rel=1e-6)
