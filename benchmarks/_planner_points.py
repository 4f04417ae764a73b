"""The points that benchmarks/planner.py measures: a grid by hand, and others drawn by a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from hpcdl.experiment import rules
from hpcdl.spec import ExperimentSpec
from tests.factory import tiny_spec

Settings = dict[str, Any]

Shape = tuple[int, int, int, int, int, int, bool]
"""Width, MLP, blocks, heads, key/value heads, vocabulary, whether the head is the embedding."""
SHAPES: dict[str, Shape] = {
    "small": (96, 256, 4, 6, 2, 1024, True),
    "deep": (64, 176, 12, 4, 4, 512, True),
    "shallow": (384, 1024, 2, 12, 2, 1024, True),
    "middle": (160, 432, 4, 5, 5, 2048, False),
    "wide_mlp": (128, 896, 3, 8, 2, 1000, False),
    "narrow_mlp": (192, 256, 4, 6, 1, 1500, True),
    "vocab32k": (96, 256, 3, 3, 3, 32000, False),
    "vocab128k": (32, 96, 2, 4, 2, 128256, True),
    "vocab128k_untied": (32, 96, 2, 4, 2, 128256, False),
    "large": (256, 704, 6, 8, 4, 4000, False),
    "even": (128, 352, 8, 8, 4, 2000, False),
    "even_tied": (128, 352, 8, 8, 8, 3000, True),
}
"""Up to 8 million parameters; `Point.wider` makes 3 to 25 million of them."""
HEAD_DIM = {"shallow": 16, "wide_mlp": 24}
"""Where a head is no hidden_size / num_attention_heads."""

WIDTHS = ("hidden_size", "intermediate_size", "head_dim")

LORA: Settings = {"peft__name": "lora", "peft__rank": 8}
DORA: Settings = {"peft__name": "dora", "peft__rank": 8}
RSLORA: Settings = {"peft__name": "rslora", "peft__rank": 32, "peft__targets": ["q_proj", "v_proj"]}
BF16: Settings = {"trainer__precision": "bf16"}
FULL: Settings = {"trainer__activation_checkpointing": "full"}
SELECTIVE: Settings = {"trainer__activation_checkpointing": "selective"}
PADDED: Settings = {"data__packing": False}
COMMON: Settings = {
    "data__num_samples": 1500,
    "model__shape__max_position_embeddings": 2048,
    "task__sample_tokens": 0,
    "trainer__max_steps": 2,
    "trainer__eval_samples": 1,
    "trainer__threads_per_process": 1,
    "monitor": {"name": "default", "communication_steps": 0, "leaks": False},
    "preflight__allreduce_mib": 0,
}
"""Of two steps the second is the one that the worker measures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One experiment."""

    name: str
    ranks: int
    settings: Settings
    """As tests.factory.tiny_spec takes them."""

    @property
    def strategy(self) -> str:
        return str(self.settings.get("parallel", {"name": "ddp"})["name"])

    @property
    def spec(self) -> ExperimentSpec:
        return tiny_spec(**self.settings)

    def wider(self, factor: int) -> Point:
        """The same of a model with rows so many times as long: blocks, heads and vocabulary stay."""
        widths = {key: self.settings[f"model__shape__{key}"] for key in WIDTHS}
        grown = {f"model__shape__{key}": size and factor * size for key, size in widths.items()}
        return replace(self, settings={**self.settings, **grown})


def shape(name: str, sizes: Shape) -> Settings:
    width, inner, layers, heads, keys, vocabulary, tied = sizes
    found = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "head_dim": HEAD_DIM.get(name),
    }
    return {f"model__shape__{key}": value for key, value in found.items()}


def point(
    model: str,
    seq: int,
    batch: tuple[int, int],
    *more: Settings,
    ranks: int = 1,
    words: str = "",
    sizes: Shape | None = None,
    **parallel: Any,
) -> Point:
    """One point.

    Args:
        model: of SHAPES, or any word where there are `sizes`.
        seq: tokens of a sequence.
        batch: sequences of a micro-batch, and micro-batches of a step on each data rank.
        more: settings on top.
        ranks: processes.
        words: what `more` is, in the point's name.
        sizes: of a model that isn't among SHAPES.
        parallel: the strategy's keys; `name` among them.
    """
    parallel = {"name": "ddp", **parallel}
    others = 1
    for degree in ("tp", "pp", "cp"):
        others *= parallel.get(degree, 1)
    settings: Settings = {
        **COMMON,
        **shape(model, sizes or SHAPES[model]),
        "data__seq_len": seq,
        "trainer__micro_batch_size": batch[0],
        "trainer__global_batch_size": batch[0] * batch[1] * (ranks // others),
        "cluster__processes_per_node": ranks,
        "parallel": parallel,
    }
    for each in more:
        settings |= each
    strategy = "" if ranks == 1 else f"{ranks} " + " ".join(str(value) for value in _degrees(parallel))
    name = f"{strategy} {model} {batch[0]}×{seq}×{batch[1]} {words}".strip()
    return Point(name=name, ranks=ranks, settings=settings)


def _degrees(parallel: Settings) -> Iterator[str]:
    yield parallel["name"]
    yield from (
        f"{key}={value}" for key, value in parallel.items() if key != "name" and key != parallel["name"]
    )


NF4: Settings = {**LORA, "quant__scheme": "nf4"}
NF4_HEAD: Settings = {**NF4, **BF16, "quant__head": "nf4"}
INT8: Settings = {**LORA, "quant__scheme": "int8"}
INT4: Settings = {**LORA, **BF16, "quant__scheme": "int4"}
FP4: Settings = {**LORA, "quant__scheme": "fp4"}
DYNAMIC: Settings = {**LORA, "quant__scheme": "int8_dynamic"}
SGD: Settings = {"optim__name": "sgd", "optim__lr": 0.01}
PLAIN_SGD: Settings = {**SGD, "optim__momentum": 0.0}
ADAM8: Settings = {"optim__name": "adamw8bit"}

ONE = (
    point("small", 256, (4, 1)),
    point("small", 64, (8, 4), BF16, words="bf16"),
    point("small", 1024, (1, 2), FULL, words="full"),
    point("deep", 256, (2, 2)),
    point("deep", 512, (2, 1), SELECTIVE, BF16, words="bf16 selective"),
    point("deep", 256, (6, 1), FULL, BF16, words="bf16 full"),
    point("shallow", 128, (2, 2)),
    point("shallow", 256, (2, 1), BF16, words="bf16"),
    point("shallow", 384, (1, 1), SELECTIVE, words="selective"),
    point("middle", 256, (1, 2)),
    point("middle", 128, (2, 1), SGD, words="sgd"),
    point("middle", 256, (2, 1), PLAIN_SGD, BF16, FULL, words="sgd without momentum bf16 full"),
    point("wide_mlp", 512, (1, 1)),
    point("wide_mlp", 256, (2, 2), ADAM8, words="adamw8bit"),
    point("narrow_mlp", 512, (2, 1)),
    point("narrow_mlp", 256, (4, 1), PADDED, words="padded"),
    point("vocab32k", 256, (4, 1)),
    point("vocab32k", 512, (2, 2), BF16, words="bf16"),
    point("vocab128k", 128, (4, 1)),
    point("vocab128k", 128, (4, 1), BF16, FULL, words="bf16 full"),
    point("vocab128k_untied", 128, (2, 2)),
    point("large", 128, (1, 1)),
    point("large", 256, (1, 1), BF16, FULL, words="bf16 full"),
    point("middle", 384, (2, 1), LORA, words="lora"),
    point("middle", 256, (2, 2), LORA, BF16, words="lora bf16"),
    point("deep", 512, (2, 1), LORA, FULL, words="lora full"),
    point("shallow", 256, (2, 1), LORA, SELECTIVE, BF16, words="lora bf16 selective"),
    point("large", 256, (1, 1), DORA, words="dora"),
    point("small", 512, (2, 1), DORA, BF16, words="dora bf16"),
    point("large", 256, (1, 1), RSLORA, words="rslora q v"),
    point("vocab128k", 128, (4, 1), RSLORA, BF16, words="rslora q v bf16"),
    point("wide_mlp", 256, (4, 1), LORA, PADDED, words="lora padded"),
    point("large", 256, (1, 1), NF4, words="nf4"),
    point("even", 256, (4, 1), NF4_HEAD, FULL, words="nf4 head bf16 full"),
    point("large", 256, (1, 1), INT8, words="int8"),
    point("even", 256, (4, 1), INT8, BF16, words="int8 bf16"),
    point("even", 512, (2, 1), INT4, words="int4 bf16"),
    point("large", 256, (1, 2), FP4, words="fp4"),
    point("even", 256, (4, 1), DYNAMIC, words="int8_dynamic"),
)

SHARDED = (
    point("middle", 256, (1, 2), ranks=2, name="ddp"),
    point("middle", 256, (2, 1), BF16, ranks=2, name="ddp", words="bf16"),
    point("large", 256, (1, 1), LORA, ranks=2, name="ddp", words="lora"),
    point("even", 256, (2, 2), ranks=2, name="fsdp"),
    point("large", 128, (1, 1), BF16, ranks=2, name="fsdp", words="bf16"),
    point("large", 128, (1, 1), FULL, ranks=4, name="fsdp", words="full"),
    point("vocab128k", 128, (2, 1), ranks=2, name="fsdp"),
    point("even", 256, (2, 1), ranks=2, name="fsdp", reshard_after_forward=False),
    point("large", 256, (1, 2), LORA, BF16, ranks=2, name="fsdp", words="lora bf16"),
    point("even", 256, (2, 1), ranks=4, name="hsdp", dp_shard=2),
    point("even", 512, (2, 1), ranks=2, name="tp", tp=2),
    point("large", 256, (1, 1), BF16, ranks=2, name="tp", tp=2, words="bf16"),
    point("even_tied", 256, (2, 2), ranks=4, name="tp", tp=4),
    point("even", 512, (2, 1), FULL, ranks=2, name="tp", tp=2, sequence_parallel=False, words="full"),
    point("even", 512, (2, 1), LORA, ranks=2, name="tp", tp=2, words="lora"),
    point("even", 256, (2, 1), ranks=4, name="fsdp", tp=2),
    point("even", 128, (2, 4), ranks=2, name="pp", pp=2, schedule="gpipe"),
    point("even", 128, (2, 4), ranks=2, name="pp", pp=2, schedule="1f1b"),
    point("large", 128, (1, 4), BF16, FULL, ranks=2, name="pp", pp=2, words="bf16 full"),
    point("even_tied", 128, (1, 4), ranks=4, name="pp", pp=4),
    point("even", 128, (1, 4), ranks=2, name="pp", pp=2, schedule="interleaved_1f1b"),
    point("even", 128, (1, 4), ranks=2, name="pp", pp=2, schedule="interleaved_zb"),
    point("even", 128, (1, 4), ranks=2, name="pp", pp=2, schedule="zbv"),
    point("even", 128, (1, 4), ranks=2, name="pp", pp=2, schedule="dualpipev"),
    point("even", 128, (1, 4), LORA, ranks=2, name="pp", pp=2, words="lora"),
    point("even", 128, (1, 4), ranks=4, name="pp", pp=2, dp_replicate=2),
    point("even", 128, (1, 4), ranks=4, name="pp", pp=2, dp_replicate=1, dp_shard=2),
    point("even", 512, (2, 1), ranks=2, name="cp", cp=2),
    point("even", 512, (2, 1), BF16, ranks=2, name="cp", cp=2, cp_method="ulysses", words="bf16"),
    point("even", 512, (1, 1), LORA, ranks=4, name="cp", cp=4, words="lora"),
    point("even", 512, (2, 1), ranks=4, name="fsdp", cp=2),
    point("middle", 256, (2, 1), ranks=2, name="param_server"),
    point("middle", 256, (2, 1), ranks=2, name="param_server", mode="async"),
    point("large", 256, (1, 1), LORA, ranks=2, name="param_server", words="lora"),
    point("middle", 256, (2, 1), ranks=2, name="hogwild"),
    point("middle", 256, (2, 1), ranks=2, name="local_sgd", sync_every=2),
    point("large", 256, (1, 1), LORA, ranks=2, name="local_sgd", sync_every=2, words="lora"),
    point("middle", 256, (2, 1), ranks=2, name="diloco", sync_every=2),
    point("even", 256, (2, 1), BF16, ranks=4, name="diloco", sync_every=2, words="bf16"),
)

GRID = ONE + SHARDED


STRATEGIES: tuple[tuple[int, Settings], ...] = (
    *((1, {"name": "ddp"}),) * 8,
    (2, {"name": "ddp"}),
    (2, {"name": "fsdp"}),
    (4, {"name": "fsdp"}),
    (4, {"name": "hsdp", "dp_shard": 2}),
    (2, {"name": "tp", "tp": 2}),
    (4, {"name": "fsdp", "tp": 2}),
    (2, {"name": "pp", "pp": 2, "schedule": "gpipe"}),
    (2, {"name": "pp", "pp": 2}),
    (4, {"name": "pp", "pp": 2, "tp": 2}),
    (2, {"name": "pp", "pp": 2, "schedule": "interleaved_1f1b"}),
    (2, {"name": "cp", "cp": 2}),
    (2, {"name": "cp", "cp": 2, "cp_method": "ulysses"}),
    (2, {"name": "param_server"}),
    (2, {"name": "hogwild"}),
    (2, {"name": "local_sgd", "sync_every": 2}),
    (2, {"name": "diloco", "sync_every": 2}),
)


def drawn(seed: int, count: int) -> tuple[Point, ...]:
    """Points nobody has chosen: shapes, batches, methods and strategies by chance; what can't be is drawn anew."""
    rng = random.Random(seed)
    found: list[Point] = []
    while len(found) < count:
        candidate = _one(rng, f"drawn{seed}-{len(found)}")
        if _possible(candidate.spec):
            found.append(candidate)
    return tuple(found)


def _one(rng: random.Random, name: str) -> Point:
    keys = rng.choice((1, 2, 4))
    heads = keys * rng.choice((1, 2, 3))
    width = heads * rng.choice((16, 32, 48, 64))
    ranks, parallel = rng.choice(STRATEGIES)
    # Of the width, but no multiple of much.
    sizes = (
        width,
        8 * rng.randrange(width // 8, width // 2),
        rng.randrange(2, 13),
        heads,
        keys,
        rng.choice((512, 3001, 10000, 32000, 128256)),
        rng.random() < 0.5,
    )
    method = rng.choice((*({},) * 5, LORA, LORA, DORA, RSLORA, NF4, INT8, INT4))
    precision = rng.choice(({}, BF16))
    recomputing = rng.choice(({}, {}, FULL, SELECTIVE))
    optimizer = rng.choice(({}, {}, {}, SGD))
    batch = rng.choice((1, 2, 3, 4)), 4 if "pp" in parallel else rng.choice((1, 2, 3))
    made = (method, precision, recomputing, optimizer, rng.choice(({}, {}, PADDED)))
    drawn_point = point(name, 32 * rng.randrange(2, 24), batch, *made, ranks=ranks, sizes=sizes, **parallel)
    names = (method.get("peft__name", ""), method.get("quant__scheme", ""), precision and "bf16",
             *recomputing.values(), *optimizer.values(), "padded" if made[-1] else "")  # fmt: skip
    words = " ".join(str(word) for word in names if word)
    return Point(name=f"{drawn_point.name} {words}", ranks=ranks, settings=drawn_point.settings)


def _possible(spec: ExperimentSpec) -> bool:
    """Whether a launch would take it, and a point of it ends soon: no more than 40 million parameters."""
    from hpcdl.spec.layout import parameters

    assert spec.model.shape is not None
    size = parameters(spec.model.shape)
    tokens = spec.trainer.global_batch_size * spec.data.seq_len
    if size > 40e6 or size * tokens > 40e9:
        return False
    parts = {
        name: getattr(spec, name)
        for name in ("name", "model", "data", "parallel", "cluster", "optim", "trainer")
    }
    return not rules.broken(parts) and not list(rules.refused(spec))
