"""Context parallel: who sees whom, the two ways of attending to the whole sequence, and what is refused.

That training under it equals one process is in test_strategies.py.
"""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdl.errors import Fault, HpcdlError
from hpcdl.parallel import cp
from tests.factory import tiny_spec

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from hpcdl.distributed import context  # noqa: E402

POSITIONS = [[0, 1, 2, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 0, 0, 1]]
"""Packed documents; the second row begins within one, and has one of a single token."""


def seen_in_one_process(positions: Any) -> Any:
    """transformers' own mask."""
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama.configuration_llama import LlamaConfig

    return create_causal_mask(
        config=LlamaConfig(attn_implementation="sdpa"),
        inputs_embeds=torch.zeros(*positions.shape, 4),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
        allow_is_causal_skip=False,
    )


def test_the_mask_is_transformers_own() -> None:
    positions = torch.tensor(POSITIONS)
    whole = seen_in_one_process(positions)
    assert torch.equal(context.visible(positions, slice(None)), whole)
    assert torch.equal(context.visible(positions, slice(4, 8)), whole[:, :, 4:8])


def test_padding_goes_on_counting_and_is_seen_as_by_one_process() -> None:
    positions = torch.arange(8).expand(2, 8)
    assert torch.equal(
        context.visible(positions, slice(None)), torch.ones(8, 8).tril().bool().expand(2, 1, 8, 8)
    )


def at(rank: int, ranks: int) -> Any:
    return SimpleNamespace(rank={"cp": rank}.get, dims=SimpleNamespace(cp=ranks))


def test_a_batch_is_cut_along_the_sequence() -> None:
    positions = torch.tensor(POSITIONS)
    batch = {"input_ids": positions + 10, "position_ids": positions, "labels": positions + 20}
    parts = [context.cut_batch("allgather", at(rank, 4), batch) for rank in range(4)]
    for name, whole in batch.items():
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole)
    masks = torch.cat([part["attention_mask"] for part in parts], dim=2)
    assert torch.equal(masks, seen_in_one_process(positions))


def test_ulysses_attends_with_all_queries() -> None:
    positions = torch.tensor(POSITIONS)
    batch = {"input_ids": positions, "position_ids": positions, "labels": positions}
    mine = context.cut_batch("ulysses", at(1, 4), batch)
    assert mine["input_ids"].shape == (2, 2)
    assert torch.equal(mine["attention_mask"], seen_in_one_process(positions))


# --- the two ways ------------------------------------------------------------------------------------------

RANKS = 2
CASES = [
    ("allgather", 3, 4),
    ("allgather", 1, 6),
    ("ulysses", 2, 4),  # a kv head a rank
    ("ulysses", 3, 6),  # 3 kv heads for 2 ranks: each is sent twice
    ("ulysses", 1, 4),
]
"""Method, key and value heads, width of a value."""


def inputs(kv_heads: int, value_width: int) -> list[Any]:
    """Query, key, value of the whole sequence: 2 × 6 heads × 8 tokens × 4."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 8, 4), (2, kv_heads, 8, 4), (2, kv_heads, 8, value_width)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]


def weighted(out: Any) -> Any:
    """A scalar that each element of `(batch, seq, heads, width)` has its own part in."""
    return (out * torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view(1, *out.shape[1:])).sum()


def of_one_process(kv_heads: int, value_width: int) -> list[Any]:
    """Output and gradients."""
    query, key, value = inputs(kv_heads, value_width)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key.repeat_interleave(6 // kv_heads, 1),
        value.repeat_interleave(6 // kv_heads, 1),
        attn_mask=seen_in_one_process(torch.tensor(POSITIONS)),
        scale=0.3,
    ).transpose(1, 2)
    weighted(out).backward()
    return [out.detach(), query.grad, key.grad, value.grad]


def of_a_rank(rank: int, method: str, kv_heads: int, value_width: int) -> list[Any]:
    """The same, of this rank's tokens; zeros elsewhere."""
    import torch.distributed as dist

    whole, positions = inputs(kv_heads, value_width), torch.tensor(POSITIONS)
    mine = context.chunk_of(8, rank, RANKS)
    mask = context.visible(positions, slice(None) if method == "ulysses" else mine)
    out, _ = context.attend(
        dist.group.WORLD, torch.nn.Identity(), *(tensor[:, :, mine] for tensor in whole), mask,
        scaling=0.3, swap=method == "ulysses",
    )  # fmt: skip
    full = torch.zeros(2, 8, 6, value_width, dtype=torch.float64)
    full[:, mine] = out
    weighted(full).backward()
    return [full.detach(), *(tensor.grad for tensor in whole)]


def answer(rank: int, store: str, pipe: Any) -> None:
    """What a process of the world does."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    pipe.send([[tensor.numpy() for tensor in of_a_rank(rank, *case)] for case in CASES])
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of each case, of each rank."""
    spawn, store = multiprocessing.get_context("spawn"), str(tmp_path_factory.mktemp("world") / "store")
    pipes = [spawn.Pipe(duplex=False) for _ in range(RANKS)]
    children = [
        spawn.Process(target=answer, args=(rank, store, send), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    for child in children:
        child.start()
    assert all(receive.poll(120) for receive, _ in pipes)
    told = [receive.recv() for receive, _ in pipes]
    for child in children:
        child.join(30)
    return list(zip(*told, strict=True))


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case)) for case in CASES])
def test_attention_and_its_gradients_are_those_of_one_process(case: int, answers: list[Any]) -> None:
    _, kv_heads, value_width = CASES[case]
    expected = of_one_process(kv_heads, value_width)
    for name, whole, *parts in zip(("out", "dq", "dk", "dv"), expected, *answers[case], strict=True):
        total = sum(torch.from_numpy(part) for part in parts)
        # gradients of keys and values are added up in fp32
        assert torch.allclose(total, whole, rtol=1e-6, atol=1e-6), name


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sliding_window": 16}, "a window of 16 tokens"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "the rotary scaling 'dynamic'"),
    ],
)
def test_attention_that_is_not_plain_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(HpcdlError, match=said):
        context.refuse_other_attention(SimpleNamespace(model_type="some", **settings))


def test_attention_that_wants_more_than_a_mask_is_refused() -> None:
    x = torch.zeros(1, 2, 4, 4)
    with pytest.raises(HpcdlError, match=r"parallel\.cp: Identity asks for softcap"):
        context.attend(Any, torch.nn.Identity(), x, x, x, None, swap=False, softcap=30.0)


def test_a_plain_llama_is_taken() -> None:
    from transformers.models.llama.configuration_llama import LlamaConfig

    context.refuse_other_attention(LlamaConfig())


def faults(cp_degree: int, world: int, **dotted: Any) -> list[Fault]:
    spec = tiny_spec(parallel__name="cp", parallel__cp=cp_degree, cluster__processes_per_node=world, **dotted)
    return list(cp.check(spec.parallel, spec))


def test_a_sequence_that_does_not_divide_is_refused_before_submission() -> None:
    (fault,) = faults(3, 3)
    assert (fault.key, fault.value, fault.nearest, fault.fix) == ("parallel.cp", "3", "2", "parallel.cp=2")
    assert "data.seq_len 32" in fault.problem


def test_ulysses_wants_heads_for_each_rank_and_allgather_does_not() -> None:
    assert faults(8, 8) == []
    (fault,) = faults(8, 8, parallel__cp_method="ulysses")
    assert "num_attention_heads 4" in fault.problem and fault.fix == "parallel.cp=4"
    (fault,) = faults(4, 8, parallel__cp_method="ulysses", parallel__tp=2)
    assert "num_attention_heads / tp 2" in fault.problem and fault.fix == "parallel.cp=2"


def test_a_rotary_scaling_that_looks_at_the_longest_position_is_refused() -> None:
    (fault,) = faults(2, 2, model__shape__rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert "rotary scaling dynamic" in fault.problem and fault.fix == "parallel.cp=1"
    assert faults(2, 2, model__shape__rope_scaling={"rope_type": "linear", "factor": 2.0}) == []
