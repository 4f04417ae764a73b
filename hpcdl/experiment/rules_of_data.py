"""Rules on what is trained and what it reads: models, data, and the tasks that need them."""

from __future__ import annotations

from collections.abc import Iterator

from hpcdl import tasks
from hpcdl.errors import Fault
from hpcdl.spec import DataSpec, ModelSpec, TaskSpec

BYTE_VOCABULARY = 260
"""256 bytes and the tokenizer's four special tokens."""


def model_has_a_source(model: ModelSpec) -> Iterator[Fault]:
    """Random weights need a shape; everything else brings its own."""
    if model.source == "random" and model.shape is None and model.mlp is None:
        yield Fault(
            key="model",
            value=model.name,
            problem="has no weights: none of path, hub_id and package is set, and no shape for random ones",
            allowed="model.path, model.hub_id, model.package or model.shape",
            fix="model.path=/path/of/the/model",
        )


def shape_is_a_transformer(model: ModelSpec) -> Iterator[Fault]:
    """Heads share the width evenly, and query heads share key and value heads evenly."""
    shape = model.shape
    if shape is None:
        return
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    if shape.head_dim is None and shape.hidden_size % heads:
        near = _nearest_divisor(shape.hidden_size, heads)
        yield Fault(
            key="model.shape.num_attention_heads",
            value=str(heads),
            problem=f"does not divide hidden_size {shape.hidden_size}",
            allowed="a divisor of hidden_size, or set model.shape.head_dim",
            nearest=str(near),
            fix=f"model.shape.num_attention_heads={near}",
        )
    if heads % kv_heads:
        near = _nearest_divisor(heads, kv_heads)
        yield Fault(
            key="model.shape.num_key_value_heads",
            value=str(kv_heads),
            problem=f"does not divide num_attention_heads {heads}",
            allowed="a divisor of num_attention_heads",
            nearest=str(near),
            fix=f"model.shape.num_key_value_heads={near}",
        )
    width = shape.head_dim or shape.hidden_size // heads
    if width % 2 and not (shape.head_dim is None and shape.hidden_size % heads):
        yield Fault(
            key="model.shape.head_dim",
            value=str(width),
            problem="the rotary embedding turns pairs of numbers, so a head's width must be even",
            allowed="an even number; hidden_size / num_attention_heads where null",
            fix=f"model.shape.head_dim={width + 1}",
        )


def scaling_says_how(model: ModelSpec) -> Iterator[Fault]:
    """Transformers wants to know the kind of a rotary scaling."""
    scaling = model.shape.rope_scaling if model.shape else None
    if scaling is not None and not isinstance(scaling.get("rope_type"), str):
        yield Fault(
            key="model.shape.rope_scaling",
            value=", ".join(scaling),
            problem="does not say which scaling: rope_type is missing",
            allowed="rope_type (linear, dynamic, yarn, llama3, …) with its own keys, or null",
            fix="+model.shape.rope_scaling.rope_type=linear",
        )


def bytes_fit_the_vocabulary(model: ModelSpec) -> Iterator[Fault]:
    """The byte tokenizer gives numbers up to 259."""
    if model.tokenizer == "byte" and model.shape is not None and model.shape.vocab_size < BYTE_VOCABULARY:
        yield Fault(
            key="model.shape.vocab_size",
            value=str(model.shape.vocab_size),
            problem="is too small for the byte tokenizer: 256 bytes and 4 special tokens",
            allowed=f"at least {BYTE_VOCABULARY}",
            fix=f"model.shape.vocab_size={BYTE_VOCABULARY}",
        )


def random_weights_have_a_tokenizer(model: ModelSpec) -> Iterator[Fault]:
    """Random weights come without a tokenizer of their own."""
    if model.source == "random" and model.shape is not None and model.tokenizer == "auto":
        yield Fault(
            key="model.tokenizer",
            value="auto",
            problem="there are no weights that a tokenizer could lie beside: this model is random",
            allowed="byte",
            fix="model.tokenizer=byte",
        )


def sequence_fits_the_model(data: DataSpec, model: ModelSpec) -> Iterator[Fault]:
    """No position beyond those the model was made for."""
    limit = model.shape.max_position_embeddings if model.shape else None
    if limit is not None and data.seq_len > limit:
        yield Fault(
            key="data.seq_len",
            value=str(data.seq_len),
            problem=f"is longer than the model's max_position_embeddings {limit}",
            allowed=f"8 to {limit}",
            nearest=str(limit),
            fix=f"data.seq_len={limit}",
        )


def data_has_a_source(data: DataSpec) -> Iterator[Fault]:
    """Files for text and jsonl, a dataset for hf."""
    if data.kind in ("text", "jsonl") and not data.paths:
        yield Fault(
            key="data.paths",
            value="[]",
            problem=f"data={data.kind} needs at least one file",
            allowed="files or globs",
            fix="'data.paths=[/path/of/the/files/*.txt]'",
        )
    if data.kind == "hf" and not data.dataset:
        yield Fault(
            key="data.dataset",
            value="null",
            problem="data=hf needs a dataset",
            allowed="a datasets name or a local folder",
            fix="data.dataset=wikitext",
        )


def task_has_what_it_takes(task: TaskSpec, data: DataSpec, model: ModelSpec) -> Iterator[Fault]:
    """Text for all tasks that read some, and for them no network that plays."""
    if not getattr(tasks.get(task.name), "READS_TEXT", True):
        return  # says itself what it needs
    if data.kind == "none":
        yield Fault(
            key="data",
            value="none",
            problem=f"task={task.name} reads text",
            allowed="pydoc, text, jsonl, hf, synthetic",
            fix="data=pydoc",
        )
    if model.mlp is not None:
        yield Fault(
            key="model",
            value=model.name,
            problem=f"task={task.name} is for language models, and this network plays an environment",
            allowed="another model; or task=policy_gradient",
            fix="task=policy_gradient",
        )


def _nearest_divisor(number: int, near: int) -> int:
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: (abs(d - near), d))
