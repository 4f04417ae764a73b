"""Tensor parallel: what each rank holds, other builds of decoder, the split vocabulary, and what is refused.

That training under it equals one process is in test_strategies.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdl.errors import Fault, HpcdlError
from hpcdl.parallel import tp
from tests.factory import tiny_spec
from tests.worker.conftest import Workers

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from hpcdl.distributed import losses, tensor  # noqa: E402
from hpcdl.distributed.decoder import Stage, blocks, cut, inner, trunk  # noqa: E402

SEQ_LEN = 16

# --- what a rank holds, and what travels: one rank of two, whose collectives give back what they are given ---


@pytest.fixture(scope="module")
def grid() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from hpcdl.distributed.mesh import Grid
    from hpcdl.spec.parallel import ParallelDims

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Grid(ParallelDims(pp=1, dp_replicate=1, dp_shard=1, cp=1, tp=2), torch.device("cpu"))
    dist.destroy_process_group()


def config(*, sequence: bool = True) -> Any:
    return SimpleNamespace(sequence_parallel=sequence, loss_parallel=True)


def llama(vocabulary: int = 261, *, tied: bool = True, kind: str = "llama", **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM
    shape = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "vocab_size": vocabulary, "max_position_embeddings": 64,
        "tie_word_embeddings": tied, "pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make.from_config(AutoConfig.for_model(kind, **(shape | more)))
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases begin as ones and zeros
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def lora(model: Any, *targets: str) -> Any:
    from hpcdl.compress import lora as method

    return method.apply(method.Config(name="lora", rank=4, targets=targets or ("all-linear",)), model)


def batch() -> dict[str, Any]:
    tokens = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
    return {"inputs": tokens, "position_ids": torch.arange(SEQ_LEN).expand(2, -1), "labels": tokens + 1}


def test_every_matrix_is_split_and_the_rest_copied(grid: Any) -> None:
    whole = dict(llama(tied=False).named_parameters())
    stage = Stage(llama(tied=False))
    tensor.shard(config(), stage, grid)
    for name, parameter in inner(stage.model).named_parameters():
        assert parameter.shape == whole[name].shape
        part = parameter.to_local()
        if name.endswith("norm.weight"):
            assert torch.equal(part, whole[name])
        elif "o_proj" in name or "down_proj" in name:
            assert torch.equal(part, whole[name].chunk(2, dim=1)[0])
        else:  # the vocabulary of 261 is split into 131 and 130
            assert torch.equal(part, whole[name].chunk(2)[0])
        # what other ranks have isn't kept alive by a view
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_a_tied_head_stays_the_embedding_and_frozen_weights_frozen(grid: Any) -> None:
    stage = Stage(lora(llama()))
    tensor.shard(config(), stage, grid)
    assert stage.head().weight is trunk(stage.model).embed_tokens.weight
    trained = {name for name, parameter in stage.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    stage(**batch()).backward()
    assert all(p.grad is not None for name, p in stage.named_parameters() if name in trained)


def saved_bytes(run: Callable[[], Any]) -> int:
    """Of what autograd keeps for the backward pass."""
    from hpcdl.distributed.engine import local

    kept: dict[int, Any] = {}

    def keep(saved: Any) -> Any:
        part = local(saved)
        kept[part.untyped_storage().data_ptr()] = part
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        run()
    return sum(part.untyped_storage().nbytes() for part in kept.values())


def test_sequence_parallel_splits_what_lies_between_the_matrices(grid: Any) -> None:
    kept, seen = {}, {}
    for sequence in (True, False):
        stage = Stage(llama())
        tensor.shard(config(sequence=sequence), stage, grid)
        lengths: list[int] = []

        def look(_: Any, args: tuple[Any, ...], to: list[int] = lengths) -> None:
            to.append(args[0].to_local().shape[1])

        for block in blocks(stage):
            block.register_forward_pre_hook(look)
        kept[sequence] = saved_bytes(partial(stage, **batch()))
        seen[sequence] = lengths
    assert seen == {True: [SEQ_LEN // 2] * 2, False: [SEQ_LEN] * 2}
    # At least a norm's input in fp32 before and after the attention and the MLP of each block, by half.
    assert kept[False] - kept[True] >= 4 * 2 * (2 * SEQ_LEN // 2 * 32 * 4)


def test_between_stages_go_parts_of_the_sequence(grid: Any) -> None:
    first = cut(llama(), 0, 1, is_first=True, is_last=False)
    last = cut(llama(), 1, 2, is_first=False, is_last=True)
    for stage in (first, last):
        tensor.shard(config(), stage, grid)
    tokens = batch()
    sent = first(tokens["inputs"], tokens["position_ids"])
    assert type(sent) is torch.Tensor and sent.shape == (2, SEQ_LEN // 2, 32)
    arrived = sent.detach().requires_grad_()
    last(arrived, tokens["position_ids"], tokens["labels"]).backward()
    assert type(arrived.grad) is torch.Tensor and arrived.grad.shape == arrived.shape


# --- other builds of decoder -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen3", {}),  # norms over each head
        ("llama", {"attention_bias": True, "mlp_bias": True}),  # those of rows are added once
    ],
    ids=["norms-of-heads", "biases"],
)
def test_other_decoders_train_as_in_one_process(
    workers: Workers, tmp_path: Path, kind: str, more: dict[str, Any]
) -> None:
    llama(kind=kind, **more).save_pretrained(tmp_path)
    common = {"model__shape": None, "model__path": str(tmp_path), "trainer__max_steps": 4, "optim__lr": 0.003}
    one = workers.train(1, **common)
    two = workers.train(2, parallel__name="tp", parallel__tp=2, **common)
    assert two.losses() == pytest.approx(one.losses(), rel=1e-5)
    norms = [[m["grad_norm"] for m in each.run.metrics() if "loss" in m] for each in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_the_result_is_the_whole_trained_model(workers: Workers) -> None:
    two = workers.train(2, parallel__name="tp", parallel__tp=2, trainer__max_steps=2)
    again = workers.train(1, model__path=two.result()["model"], trainer__max_steps=1)
    assert again.evaluations()[0] == pytest.approx(two.evaluations()[2], rel=1e-6)
    assert again.evaluations()[0] < two.evaluations()[0]


# --- the vocabulary in parts -------------------------------------------------------------------------------


class Meeting:
    """all_reduce among threads."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.brought: list[Any] = []

    def all_reduce(self, value: Any, op: Any = None, group: Any = None) -> None:
        self.barrier.wait()
        self.brought.append(value.clone())
        self.barrier.wait()
        together = torch.stack(self.brought)
        self.barrier.wait()
        self.brought.clear()
        value.copy_(together.sum(0) if op is None else together.amax(0))


@pytest.mark.parametrize(("vocabulary", "ranks"), [(12, 2), (11, 2), (10, 4)])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_split_loss_and_its_gradients_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, vocabulary: int, ranks: int, frozen: bool
) -> None:
    meeting = Meeting(ranks)
    monkeypatch.setattr(torch.distributed, "all_reduce", meeting.all_reduce)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", {"cpu": 1})  # 64 tokens at a time: 3 chunks
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(2, 75, 6, generator=draw)
    weight = torch.randn(vocabulary, 6, generator=draw) * 40  # exponentials of such logits overflow
    labels = torch.randint(vocabulary, (2, 75), generator=draw)
    labels[0, :9] = losses.IGNORE
    whole = (states.clone().requires_grad_(), weight.clone().requires_grad_())
    expected = torch.nn.functional.cross_entropy(
        (whole[0] @ whole[1].T).flatten(0, 1), labels.flatten(), ignore_index=losses.IGNORE, reduction="sum"
    )
    expected.backward()
    answers: dict[int, tuple[Any, Any, Any]] = {}

    def rank(number: int) -> None:
        mesh: Any = SimpleNamespace(size=lambda: ranks, get_local_rank=lambda: number)
        first, most = tensor.rows_here(vocabulary, mesh)
        mine = weight[first : first + most].clone().requires_grad_(not frozen)
        hidden = states.clone().requires_grad_()
        nobody: Any = None
        loss: Any = losses.linear_cross_entropy(hidden, mine, labels, losses.Part(nobody, first, most))
        loss.backward()
        answers[number] = (loss.detach(), hidden.grad, mine.grad)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = [answers[number] for number in range(ranks)]
    assert all(torch.allclose(loss, expected) for loss, _, _ in got)
    assert torch.allclose(sum(hidden for _, hidden, _ in got), whole[0].grad, atol=1e-3)
    if frozen:
        assert all(head is None for _, _, head in got)
    else:
        assert torch.allclose(torch.cat([head for _, _, head in got]), whole[1].grad, atol=1e-4)


# --- what is refused ---------------------------------------------------------------------------------------


def faults(world: int, **dotted: Any) -> list[Fault]:
    spec = tiny_spec(parallel__name="tp", cluster__processes_per_node=world, **dotted)
    strategy: Any = spec.parallel
    return list(tp.check(strategy, spec))


NINE = {"model__shape__num_attention_heads": 9, "model__shape__num_key_value_heads": 3,
        "model__shape__hidden_size": 36, "model__shape__intermediate_size": 72, "data__seq_len": 36}  # fmt: skip


def test_a_degree_that_does_not_divide_is_one_fault_with_a_fix_that_fits_the_processes() -> None:
    assert not faults(3, parallel__tp=3, **NINE)
    (fault,) = faults(4, parallel__tp=4, **NINE)
    assert fault.problem == "does not divide the model's num_attention_heads 9 and num_key_value_heads 3"
    assert (fault.allowed, fault.fix) == ("divisors of 3: 1, 3", "parallel.tp=1")  # 3 don't make 4
    (fault,) = faults(6, parallel__tp=2, **NINE)
    assert fault.fix == "parallel.tp=3" and not faults(6, parallel__tp=3, **NINE)


def test_sequence_parallel_wants_equal_parts_of_the_sequence() -> None:
    (fault,) = faults(2, parallel__tp=2, data__seq_len=33)
    assert fault.problem == "tp does not divide data.seq_len 33" and fault.fix == "parallel.tp=1"
    assert not faults(2, parallel__tp=2, parallel__sequence_parallel=False, data__seq_len=33)
    (fault,) = faults(4, parallel__tp=2, parallel__cp=2, parallel__dp_replicate=1, data__seq_len=34)
    assert fault.problem == "tp × cp = 4 does not divide data.seq_len 34" and fault.fix == "parallel.tp=1"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: llama(kind="gemma2"), "parallel.tp=2: a gemma2 with this head can't be split"),
        (lambda: llama(num_key_value_heads=1), "the model's num_key_value_heads 1"),
        (lambda: lora(llama(), "embed_tokens"), "can't split a peft.*Embedding"),
        (lambda: with_a_stranger(llama()), "no rule how to split .*stranger"),
    ],
    ids=["head", "heads", "lora-on-embedding", "stranger"],
)
def test_what_cannot_be_split_is_refused(grid: Any, make: Callable[[], Any], says: str) -> None:
    with pytest.raises(HpcdlError, match=says):
        tensor.shard(config(), Stage(make()), grid)


def with_a_stranger(model: Any) -> Any:
    model.model.layers[0].mlp.stranger = torch.nn.Parameter(torch.ones(4))
    return model
