"""offload=stream: a layer in memory at a time, and the very training that ordinary training is."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcdl.compress import offload
from hpcdl.distributed import losses, shelf, update
from hpcdl.errors import HpcdlError
from hpcdl.runs.kinds import NEVER_RESTART
from hpcdl.spec import streaming
from tests.factory import tiny_spec
from tests.worker.conftest import Finished, Workers, until

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {
    "trainer__max_steps": 5,
    "trainer__global_batch_size": 6,
    "trainer__micro_batch_size": 1,
    "trainer__eval_every": 2,
    "trainer__eval_samples": 14,
    "task__name": "sft",  # every sequence has another number of targets
    "data__packing": False,
    "data__seq_len": 64,
    "optim__lr": 0.003,
    "optim__eps": 1e-6,
    "optim__weight_decay": 0.1,
    "model__shape__num_hidden_layers": 3,
}
UNTIED = {"model__shape__tie_word_embeddings": False, "model__shape__vocab_size": 261}
SGD = {"optim__name": "sgd", "optim__lr": 0.02}
STREAM = {"offload__name": "stream"}
CASES: dict[str, dict[str, Any]] = {
    "tied-adamw-clipped": {"trainer__max_grad_norm": 0.5},
    "untied-sgd": {**UNTIED, **SGD, "trainer__max_grad_norm": None},
    "untied-adamw-activations_on_disk": {**UNTIED, "offload__activations": "disk"},
    "tied-sgd_without_state-in_host_memory": {**SGD, "optim__momentum": 0.0, "offload__device": "host"},
}


def plainly(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if not key.startswith("offload")}


def weights(finished: Finished) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(finished.result()["model"], output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    return dict(model.state_dict())


def assert_alike(streamed: Finished, plain: Finished) -> None:
    assert streamed.losses() == pytest.approx(plain.losses(), rel=1e-5)
    assert streamed.evaluations() == pytest.approx(plain.evaluations(), rel=1e-5)
    norms = [[m["grad_norm"] for m in f.run.metrics() if "loss" in m] for f in (plain, streamed)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    ours, theirs = weights(streamed), weights(plain)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def plain(workers: Workers) -> Finished:
    return workers.train(
        **COMMON, trainer__max_grad_norm=0.5, trainer__checkpoint_every=2, trainer__keep_last=9
    )


@pytest.mark.parametrize("case", CASES)
def test_it_is_ordinary_training(workers: Workers, plain: Finished, case: str) -> None:
    """Losses, gradient norms, evaluations and the weights that transformers loads from the result."""
    given = {**COMMON, **CASES[case]}
    same = plain if case == "tied-adamw-clipped" else workers.train(**plainly(given))
    streamed = workers.train(**{**given, **STREAM})
    assert_alike(streamed, same)
    assert list((streamed.run.path / "stream").glob("*")) == []


@pytest.mark.parametrize("copies", ["", "1"])
def test_pieces_of_a_few_rows(workers: Workers, plain: Finished, copies: str) -> None:
    """Head, embedding and updates in slices that don't divide evenly; with a sample before and after.

    Also with weights that are copied to where they are used, as for a GPU.
    """
    sample = {"task__sample_prompt": "One day", "task__sample_tokens": 8}
    run = workers.make(**COMMON, **STREAM, **sample, trainer__max_grad_norm=0.5)
    finished = workers.go(
        run, module="tests.worker.small_pieces", env={"TEST_ROWS": "960", "TEST_COPIES": copies}
    )
    assert_alike(finished, plain)


def test_several_processes(workers: Workers, plain: Finished) -> None:
    assert_alike(workers.train(3, **COMMON, **STREAM, trainer__max_grad_norm=0.5), plain)


def test_it_goes_on_with_what_ordinary_training_saved(workers: Workers, plain: Finished) -> None:
    """And the other way round."""
    place = str(plain.run.checkpoints / "step-00000002")
    given = {**COMMON, "trainer__max_grad_norm": 0.5, "trainer__checkpoint_every": 2, "trainer__keep_last": 9}
    streamed = workers.train(**given, **STREAM, trainer__resume_from=place)
    assert streamed.losses() == pytest.approx(plain.losses()[2:], rel=1e-5)
    there = str(streamed.run.checkpoints / "step-00000004")
    back = workers.train(**given, trainer__resume_from=there)
    assert back.losses() == pytest.approx(plain.losses()[4:], rel=1e-5)


LONG = {
    **COMMON,
    **STREAM,
    "trainer__max_steps": 12,
    "trainer__checkpoint_every": 3,
    "trainer__precision": "bf16",
    "offload__weights": "bf16",
}


@pytest.fixture(scope="module")
def undisturbed(workers: Workers) -> Finished:
    return workers.train(**LONG)


@pytest.mark.parametrize("how", ["SIGUSR2", "SIGKILL"])
def test_resume_is_exact(workers: Workers, undisturbed: Finished, how: str) -> None:
    """Bit for bit, random rounding included, also from a checkpoint that was written beside a step that died."""
    run = workers.make(**LONG)
    pids = workers.start(run)
    until(lambda: run.step() >= 5, "the fifth step")
    os.kill(pids[0], getattr(signal, how))
    workers.finish(run)
    again = workers.go(run)
    assert [e["event"] for e in run.events()].count("resumed") == 1
    assert again.losses() == undisturbed.losses()
    assert again.evaluations() == undisturbed.evaluations()
    ours, theirs = weights(again), weights(undisturbed)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert list((run.path / "stream").glob("*")) == []


def test_bf16_weights_learn_as_fp32_ones(workers: Workers, undisturbed: Finished) -> None:
    exact = workers.train(**plainly(LONG))
    assert undisturbed.losses() == pytest.approx(exact.losses(), rel=0.01)
    assert {tensor.dtype for tensor in weights(undisturbed).values()} == {torch.bfloat16}


def test_rounding_at_random_is_right_on_average() -> None:
    random = torch.Generator().manual_seed(0)
    exact = torch.tensor([1.0, -3.5, 0.0, 2.0**-120])
    assert torch.equal(update.round_at_random(exact, random).float(), exact)
    # bf16 has 1.0 and 1.0078125 here: rounding to the nearest would lose a thousandth.
    rounded = update.round_at_random(torch.full((100_003,), 1.001), random).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert float(rounded.mean()) == pytest.approx(1.001, abs=5e-5)
    assert float(
        update.round_at_random(torch.full((99_999,), -1.001), random).float().mean()
    ) == pytest.approx(-1.001, abs=5e-5)


def test_from_a_folder(workers: Workers, plain: Finished, tmp_path: Path) -> None:
    """A pretrained model, in bf16 on the disk; and one of whose files the end is missing."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(plain.result()["model"], dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="50KB"
    )
    given = {**COMMON, "model__path": str(folder), "model__shape": None, "trainer__max_steps": 2}
    assert_alike(workers.train(**given, **STREAM), workers.train(**given))
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    broken = workers.go(workers.make(**given, **STREAM), ok=False)
    assert broken.codes == [NEVER_RESTART]
    assert f"error: {file} is cut short: model." in broken.log
    assert "Traceback" not in broken.log


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_memory_does_not_grow_with_the_layers(workers: Workers, optimizer: str) -> None:
    """Weights, gradients and AdamW's state of ten more layers are 640 MiB in ordinary training."""
    shape = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    given = {f"model__shape__{key}": value for key, value in shape.items()} | STREAM
    given |= {"trainer__max_steps": 1, "trainer__global_batch_size": 2, "trainer__micro_batch_size": 1}
    given |= {"trainer__eval_samples": 2}
    given |= {"optim__name": optimizer}
    runs = (workers.make(**given, model__shape__num_hidden_layers=n) for n in (2, 12))
    small = {"module": "tests.worker.small_pieces", "env": {"TEST_ROWS": str(2**18)}}
    shallow, deep = (workers.go(run, **small) for run in runs)
    spec = tiny_spec(**given, model__shape__num_hidden_layers=12)
    layer = 4 * offload.stream.layer_parameters(spec.model.shape)  # type: ignore[attr-defined, arg-type]
    assert 15 * 2**20 < layer < 17 * 2**20
    grown = deep.result()["peak_memory_bytes"] - shallow.result()["peak_memory_bytes"]
    assert grown < 2 * layer
    assert deep.result()["offload_bytes"] == pytest.approx(
        offload.get("stream").disk_bytes(spec.offload, spec),
        rel=0.05,  # type: ignore[attr-defined]
    )


def test_the_shelf(tmp_path: Path) -> None:
    place = shelf.Shelf(tmp_path)
    first, second = place.new((3, 700), torch.float32), place.new((5,), torch.bfloat16)
    assert not first.any() and not second.any()
    place.write(first[1:2], torch.ones(1, 700))
    place.write(second, torch.full((5,), 2.0, dtype=torch.bfloat16))
    place.settle()
    for tensor in (first, second, first[1:]):
        place.expect(tensor)
        place.release(tensor)
    assert first.sum() == 700 and first[1].all() and second.tolist() == [2.0] * 5
    place.release(torch.ones(3))  # not the shelf's: nothing happens
    assert list(tmp_path.iterdir()) == []


def test_no_room_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(HpcdlError, match=r"no room for the working file, [\d,]+ bytes"):
        shelf.Shelf(tmp_path).new((2**50,), torch.float32)
    (tmp_path / "file").touch()
    with pytest.raises(HpcdlError, match="there can be no working file here"):
        shelf.Shelf(tmp_path / "file")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "parallel=fsdp": ({"parallel__name": "fsdp"}, "parallel=ddp"),
    "parallel.dp_shard": ({"parallel__dp_shard": 2}, "parallel.dp_shard=1"),
    "peft=lora": ({"peft__name": "lora"}, "peft=none, or offload=none"),
    "quant=nf4": ({"quant__scheme": "nf4"}, "quant=none, or offload=none"),
    "compile": ({"trainer__compile": True}, "trainer.compile=false"),
    "weights": ({"offload__weights": "bf16"}, "trainer.precision=bf16"),
    "activations": (
        {"offload__device": "host", "offload__activations": "disk"},
        "offload.activations=memory",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_can_not_do(case: str) -> None:
    changes, fix = REFUSED[case]
    spec = tiny_spec(**{**STREAM, **changes})
    assert [fault.fix for fault in offload.get("stream").check(spec.offload, spec)] == [fix]
    assert not list(offload.get("none").check(spec.offload, spec))


def test_the_plan_knows_how_the_engine_works() -> None:
    assert losses.CHUNK_LOGITS["cpu"] >= streaming.CHUNK_LOGITS
    spec = tiny_spec(**STREAM, trainer__precision="bf16", offload__weights="bf16")
    planned = offload.get("stream").memory(spec.offload, spec)
    assert planned is not None and all(value >= 0 for value in planned.values())


def test_there_may_be_more_tensors_than_open_files(tmp_path: Path) -> None:
    """Each mapping keeps a descriptor: a deep model's weights and moments are more than the usual 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files + 16, hard))
    try:
        place = shelf.Shelf(tmp_path)
        made = [place.new((8,), torch.float32) for _ in range(64)]
        assert all(place.has(tensor) for tensor in made)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
