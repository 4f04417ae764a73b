"""The memory plan as arithmetic: published sizes, what grows with what, and where no closed form is known."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcdl import compress
from hpcdl.compress import quant
from hpcdl.plan import memory
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.layout import matrices, parameters
from tests.factory import tiny_spec

LLAMA3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
LORA = {"peft__name": "lora", "peft__rank": 16}
GIB = 2**30


def plan(**dotted: Any) -> dict[str, int]:
    return bytes_of(tiny_spec(**dotted))


def bytes_of(spec: ExperimentSpec, device: str = "cpu", world_size: int | None = None) -> dict[str, int]:
    """Of the first stage."""
    found = memory.ranks(spec, device, world_size)
    assert found is not None
    rank = found[0]
    assert sum(rank.at_peak.values()) == rank.tensors and set(rank.bytes) == set(memory.CATEGORIES)
    return {**rank.bytes, "tensors": rank.tensors, "runtime": rank.runtime, "peak": rank.peak}


def big(**dotted: Any) -> dict[str, int]:
    return plan(
        model__shape=LLAMA3_8B, data__seq_len=512, trainer__micro_batch_size=1, trainer__global_batch_size=1,
        trainer__precision="bf16", trainer__activation_checkpointing="full", **LORA, **dotted,
    )  # fmt: skip


def test_parameters_are_the_published_ones() -> None:
    shape = dataclasses.replace(tiny_spec().model.shape, **LLAMA3_8B)  # type: ignore[type-var]
    assert parameters(shape) == 8_030_261_248
    tied = dataclasses.replace(shape, tie_word_embeddings=True)
    assert parameters(shape) - parameters(tied) == 128256 * 4096
    assert sum(m.count for m in matrices(shape)) == 291  # tensors in meta-llama/Llama-3.1-8B's index


def test_an_8b_under_lora() -> None:
    found = big()
    assert found["weights"] == 2 * 8_030_261_248
    assert (
        found["adapters"] == 4 * 41_943_040
    )  # peft: «trainable params: 41,943,040» at rank 16, all linear layers
    assert found["gradients"] == found["adapters"] and found["optimizer"] == 2 * found["adapters"]
    # the residual of each block in bf16, and what the last norm keeps
    assert found["activations"] == pytest.approx(512 * 4096 * (2 * 32 + 4), rel=1e-3)


def test_four_bits_are_four_and_an_eighth() -> None:
    found = big(quant__scheme="nf4")
    blocks = 8_030_261_248 - 2 * 128256 * 4096
    expected = blocks * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * 2 * 128256 * 4096
    assert found["weights"] == pytest.approx(expected, rel=1e-3)
    small = big(quant__scheme="nf4", quant__embedding="nf4", quant__head="nf4", model__path="/weights")
    assert small["weights"] == pytest.approx(8_030_261_248 * 4.127 / 8, rel=1e-3)
    assert small["peak"] < 5.5 * GIB < found["peak"]


@pytest.mark.parametrize("scheme", quant.names())
def test_every_scheme_says_what_a_matrix_takes(scheme: str) -> None:
    config = quant.get(scheme).Config(scheme=scheme)
    shape = tiny_spec(model__shape=LLAMA3_8B).model.shape
    assert shape is not None
    for matrix in matrices(shape):
        held = quant.get(scheme).memory(config, matrix, 2, 2)
        assert 0 < held.bytes <= 2.1 * matrix.numel and 0 <= held.whole < 2**31
        if scheme == "none" or matrix.role == "norm":
            assert held.bytes == 2 * matrix.numel


@pytest.mark.parametrize("name", compress.names())
def test_every_method_says_what_it_puts_beside_a_matrix(name: str) -> None:
    config = compress.get(name).Config(name=name)
    shape = tiny_spec().model.shape
    assert shape is not None
    found = {m.name: compress.get(name).memory(config, m).parameters for m in matrices(shape)}
    assert found["embed_tokens"] == found["norm"] == 0
    assert bool(found["q_proj"]) == getattr(compress.get(name), "FREEZES_BASE", False)


def test_checkpointing_and_sharding_take_less() -> None:
    none, selective, full = (
        plan(trainer__activation_checkpointing=how) for how in ("none", "selective", "full")
    )
    assert none["activations"] > selective["activations"] > full["activations"]
    assert none["recomputed"] == 0 < selective["recomputed"] == full["recomputed"]
    spec = tiny_spec(parallel__name="fsdp", parallel__dp_replicate=1, parallel__dp_shard=-1)
    one, four = bytes_of(spec, world_size=1), bytes_of(spec, world_size=4)
    assert 4 * four["weights"] == pytest.approx(one["weights"], abs=4)
    assert 4 * four["optimizer"] == pytest.approx(one["optimizer"], abs=4)


def test_a_gpu_takes_larger_chunks() -> None:
    spec = tiny_spec(
        model__shape__vocab_size=50000, data__seq_len=2048, model__shape__max_position_embeddings=2048
    )
    cpu, cuda = bytes_of(spec), bytes_of(spec, "cuda")
    assert cuda["logits"] > cpu["logits"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__shape": None, "model__hub_id": "a/b"}, "model.shape"),
        ({"task": {"name": "distill", "teacher": "/teacher"}}, "teacher"),
    ],
)
def test_nothing_is_said_where_no_closed_form_is_known(changes: dict[str, Any], words: str) -> None:
    spec = tiny_spec(**changes)
    assert memory.ranks(spec) is None and words in (memory.why_unknown(spec) or "")


def test_stages_of_a_pipeline_hold_what_is_theirs() -> None:
    spec = tiny_spec(
        model__shape__num_hidden_layers=8, parallel={"name": "pp", "pp": 4}, trainer__global_batch_size=16,
    )  # fmt: skip
    found = memory.ranks(spec, world_size=8)
    assert found is not None
    assert [(rank.stage, rank.ranks) for rank in found] == [(0, 2), (1, 2), (2, 2), (3, 2)]
    held = [rank.bytes for rank in found]
    assert held[0]["logits"] == held[1]["logits"] == 0 < held[3]["logits"]
    assert held[1]["weights"] == held[2]["weights"] < held[0]["weights"]  # that one has the embedding
    # 1F1B: the first rank has most micro-batches under way
    assert held[0]["activations"] > held[1]["activations"] > held[2]["activations"]
    all_at_once = tiny_spec(**{**vars_of(spec), "parallel": {"name": "pp", "pp": 4, "schedule": "gpipe"}})
    gpipe = memory.ranks(all_at_once, world_size=4)
    assert gpipe is not None and gpipe[2].bytes["activations"] > held[2]["activations"]


def vars_of(spec: ExperimentSpec) -> dict[str, Any]:
    return {
        "model__shape__num_hidden_layers": spec.model.shape.num_hidden_layers if spec.model.shape else 0,
        "trainer__global_batch_size": spec.trainer.global_batch_size,
    }


def test_the_server_holds_more_than_its_workers() -> None:
    found = memory.ranks(tiny_spec(parallel={"name": "param_server"}), world_size=4)
    assert found is not None
    server, worker = found
    assert (server.ranks, worker.ranks) == (1, 3)
    assert server.bytes["weights"] == 3 * worker.bytes["weights"] and worker.bytes["optimizer"] == 0


@pytest.mark.parametrize("strategy", ["ddp", "local_sgd", "diloco", "hogwild"])
def test_copies_hold_what_their_strategy_adds(strategy: str) -> None:
    alone = plan(trainer__global_batch_size=4)
    found = bytes_of(tiny_spec(parallel={"name": strategy}), world_size=2)
    copies = 2 if strategy == "diloco" else 1
    assert found["weights"] == copies * alone["weights"]
    assert found["gradients"] == (0 if strategy == "ddp" else alone["gradients"])
    assert (found["tensors"] > alone["tensors"]) == (strategy in ("ddp", "diloco"))


def test_a_teacher_is_held_beside_its_student(tmp_path: Path) -> None:
    shape = dataclasses.asdict(tiny_spec().model.shape)  # type: ignore[arg-type]
    (tmp_path / "config.json").write_text(json.dumps({**shape, "hidden_size": 128, "intermediate_size": 256}))
    alone, taught = plan(), plan(task={"name": "distill", "teacher": str(tmp_path)})
    # 260 words, two blocks of 4 heads and 2 of keys with 32 numbers each, fp32
    block = 128 * (2 * 128 + 2 * 64) + 3 * 128 * 256 + 2 * 128
    assert taught["weights"] - alone["weights"] == 4 * (260 * 128 + 2 * block + 128)
    assert taught["logits"] > alone["logits"] and taught["tensors"] > alone["tensors"]


def test_what_streams_says_for_itself() -> None:
    found = plan(offload__name="stream", trainer__max_grad_norm=None)
    assert found["weights"] < plan()["weights"] and found["peak"] == found["tensors"] + found["runtime"]


def test_planning_imports_no_torch() -> None:
    code = "import sys, hpcdl.plan.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
