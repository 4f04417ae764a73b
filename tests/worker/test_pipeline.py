"""Pipelines: how a model is cut, that every layout can be scheduled, and what equality alone doesn't show."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import schedules

from hpcdl.distributed import collectives, pipeline
from hpcdl.distributed import stages as layout
from hpcdl.distributed.decoder import Stage, named_parameters
from hpcdl.errors import HpcdlError
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec
from tests.worker.conftest import Workers


def stages_of(model: Any, ranks: int, schedule: str = "1f1b") -> list[list[Stage]]:
    """Each rank's stages; `model()` makes a fresh one for each."""
    config = SimpleNamespace(schedule=schedule, stages_per_rank=0)
    job: Any = SimpleNamespace(seq_len=16)
    grids: list[Any] = [
        SimpleNamespace(dims=SimpleNamespace(pp=ranks), rank=lambda _, place=place: place)
        for place in range(ranks)
    ]
    return [pipeline.split(config, model(), grid, job) for grid in grids]


def in_order(held: list[list[Stage]], schedule: str) -> list[Stage]:
    """All ranks' stages as the data goes through them."""
    placement, ranks = layout.SCHEDULES[schedule].placement, len(held)
    count = sum(map(len, held))
    where = [layout.held_by(placement, rank, ranks, count) for rank in range(ranks)]
    found = {
        place: stage for rank in range(ranks) for place, stage in zip(where[rank], held[rank], strict=True)
    }
    return [found[place] for place in range(count)]


def run(stages: list[Stage], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    out = batch["input_ids"]
    for stage in stages:
        out = stage(out, position_ids=batch["position_ids"], labels=batch["labels"])
    return out


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 260, (2, 17), generator=made)
    positions = torch.cat([torch.arange(9), torch.arange(7)]).repeat(2, 1)  # two documents
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}


def tiny(**shape: Any) -> nn.Module:
    from hpcdl.worker.model import from_shape

    spec = tiny_spec(**{f"model__shape__{name}": value for name, value in shape.items()})
    assert spec.model.shape is not None
    return from_shape(spec.model.shape, "sdpa", seed=0)  # type: ignore[no-any-return]


def qwen() -> nn.Module:
    """Blocks of two kinds, which transformers looks up by their place in the list; untied, biases."""
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=1,
        vocab_size=260, max_position_embeddings=64, use_sliding_window=True, sliding_window=3,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "ranks", "schedule"),
    [
        (lambda: tiny(num_hidden_layers=5), 3, "1f1b"),
        (lambda: tiny(num_hidden_layers=7, tie_word_embeddings=False), 2, "zbv"),
        (lambda: tiny(num_hidden_layers=4), 2, "zbv"),
        (qwen, 2, "interleaved_1f1b"),
        (qwen, 3, "gpipe"),
    ],
    ids=["tied", "v", "tied v", "sliding windows, loop", "sliding windows"],
)
def test_the_stages_together_are_the_model(
    make: Any, ranks: int, schedule: str, batch: dict[str, torch.Tensor]
) -> None:
    whole = Stage(make())
    expected = named_parameters(whole)
    tied = make().config.tie_word_embeddings
    with torch.no_grad():
        loss = whole(batch["input_ids"], batch["position_ids"], batch["labels"])
    held = stages_of(make, ranks, schedule)
    stages = in_order(held, schedule)
    with torch.no_grad():
        assert torch.equal(run(stages, batch), loss)
    found = [name for stage in stages for name in named_parameters(stage)]
    copy = ["model.lm_head.weight"] if tied else []
    assert sorted(found) == sorted([*expected, *copy])
    for stage in stages:
        for name, parameter in named_parameters(stage).items():
            assert torch.equal(
                parameter, expected["model.model.embed_tokens.weight" if name in copy else name]
            )
    assert [stage.tied for stage in stages if stage.is_first or stage.is_last] == (
        ["model.model.embed_tokens.weight"] * 2 if tied else [None, None]
    )


def test_a_frozen_tied_embedding_needs_no_adding_up() -> None:
    def frozen() -> nn.Module:
        return tiny(num_hidden_layers=2).requires_grad_(False)

    assert [stage.tied for held in stages_of(frozen, 2) for stage in held] == [None, None]


def test_what_cannot_be_cut_is_refused() -> None:
    from transformers.models.gemma.configuration_gemma import GemmaConfig
    from transformers.models.gemma.modeling_gemma import GemmaForCausalLM

    with pytest.raises(HpcdlError, match=r"3 blocks don't make 4 stages; set parallel.pp to 3 at most"):
        stages_of(lambda: tiny(num_hidden_layers=3), 4)
    with pytest.raises(HpcdlError, match=r"3 blocks don't make 4 stages; set parallel.pp to 1 at most"):
        stages_of(lambda: tiny(num_hidden_layers=3), 2, "zbv")
    gemma = GemmaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=260,
    )  # fmt: skip
    with pytest.raises(HpcdlError, match="a gemma can't be cut into stages"):
        stages_of(lambda: GemmaForCausalLM(gemma), 2)


@pytest.mark.parametrize(
    "name", [name for name, kind in layout.SCHEDULES.items() if kind.stages_per_rank > 1]
)
def test_torch_can_schedule_whatever_is_let_through(name: str) -> None:
    """Its constructor orders all passes and messages, and fails where they can't all come about."""
    kind = layout.SCHEDULES[name]
    let_through = 0
    for ranks in (2, 3, 4):
        for per_rank in (2, 3) if kind.any_number else (2,):
            count = ranks * per_rank
            own = {place: layout.owner(kind.placement, place, ranks) for place in range(count)}
            for micro_batches in range(1, 11):
                if layout.does_not_fit(name, ranks, micro_batches):
                    continue
                stages = [
                    SimpleNamespace(
                        stage_index=place, num_stages=count, group_size=ranks, group_rank=0, submod=None
                    )
                    for place in layout.held_by(kind.placement, 0, ranks, count)
                ]
                made = getattr(schedules, kind.torch_name)(
                    stages, micro_batches, loss_fn=min, scale_grads=False
                )
                assert made.stage_index_to_group_rank == own
                let_through += 1
    assert let_through >= 14


def test_buckets_hold_one_dtype_and_no_more_than_their_size() -> None:
    tensors = [torch.zeros(n, dtype=d) for n, d in [(4, torch.float32), (4, torch.float32), (2, torch.float32),
               (8, torch.bfloat16), (100, torch.bfloat16), (1, torch.float32)]]  # fmt: skip
    sizes = [[t.numel() for t in bucket] for bucket in collectives.buckets(tensors, 32)]
    assert sizes == [[4, 4], [2], [8], [100], [1]]


def test_a_tied_embedding_goes_through_checkpoints_as_one(workers: Workers) -> None:
    """Two ranks' shards of both copies → one rank that has both → one process; all 9 losses as undisturbed."""
    from safetensors.torch import load_file

    common: dict[str, Any] = {
        "model__shape__num_hidden_layers": 4, "trainer__max_steps": 9, "trainer__checkpoint_every": 3,
        "trainer__keep_last": 3, "optim__lr": 0.003,
    }  # fmt: skip
    pp = {"parallel__name": "pp", "parallel__pp": 2, "parallel__dp_replicate": 1}
    single = workers.train(1, **common)
    sharded = workers.make(**common, **pp, parallel__dp_shard=2, parallel__microbatches=2)
    finished = workers.go(sharded, 4)
    assert finished.losses() == pytest.approx(single.losses(), rel=1e-5)
    weights, expected = (
        load_file(str(f.run.path / "model" / "model.safetensors")) for f in (finished, single)
    )
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)
    chain = [(3, 2, {**pp, "parallel__schedule": "zbv"}), (6, 1, {})]
    for step, ranks, strategy in chain:
        for later in range(step + 3, 10, 3):
            shutil.rmtree(sharded.checkpoints / f"step-{later:08d}")
        sharded.spec_file.write_text(
            dump_yaml(to_plain(tiny_spec(trainer__threads_per_process=1, **common, **strategy)))
        )
        again = workers.go(sharded, ranks)
        assert [e["step"] for e in sharded.events() if e["event"] == "resumed"][-1] == step
        assert again.losses() == pytest.approx(single.losses(), rel=1e-5)
        assert again.evaluations() == pytest.approx(single.evaluations(), rel=1e-5)


def test_sgd_of_parameters_that_are_split(workers: Workers) -> None:
    """Torch has no fused SGD for them; shards of one rank, offloaded, are DTensors too."""
    common: dict[str, Any] = {"optim__name": "sgd", "trainer__max_steps": 3}
    split = workers.train(
        2, **common, parallel__name="pp", parallel__pp=2, parallel__dp_replicate=1,
        parallel__schedule="gpipe", parallel__cpu_offload=True,
    )  # fmt: skip
    assert split.losses() == pytest.approx(workers.train(1, **common).losses(), rel=1e-5)


def test_copies_of_a_pipeline_in_rounds(workers: Workers) -> None:
    """What DDP's hooks would miss: gradients of weights computed apart, over several rounds; LoRA, recomputed."""
    common: dict[str, Any] = {
        "model__shape__num_hidden_layers": 4, "trainer__max_steps": 3, "trainer__global_batch_size": 16,
        "trainer__activation_checkpointing": "full", "peft__name": "lora", "peft__rank": 4,
    }  # fmt: skip
    single = workers.train(1, **common)
    copies = workers.train(
        4, **common, parallel__name="pp", parallel__pp=2, parallel__dp_replicate=2,
        parallel__schedule="interleaved_zb", parallel__microbatches=2, parallel__bucket_cap_mb=1,
    )  # fmt: skip
    assert copies.losses() == pytest.approx(single.losses(), rel=1e-6)
    norms = [[m["grad_norm"] for m in f.run.metrics() if "loss" in m] for f in (copies, single)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
