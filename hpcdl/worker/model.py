"""The model: from a folder, the hub, a package that carries GGUF, or random from its shape.

Every rank loads the same weights from the same place (or the same seed), so nothing is broadcast.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl import compress
from hpcdl.errors import HpcdlError
from hpcdl.foreign import ONLY_WEIGHTS
from hpcdl.spec import ExperimentSpec, ModelShape, ModelSpec
from hpcdl.worker.convert import package_folder
from hpcdl.worker.tokenizer import ByteTokenizer, HfTokenizer, Tokenizer

if TYPE_CHECKING:
    import torch


def weights_place(spec: ModelSpec) -> str | None:
    """What `from_pretrained` is given: an absolute folder or a hub id; None for random weights.

    A package's weights are converted first, where nobody has done so yet.

    Raises:
        HpcdlError: `model.path` is no folder, or the package isn't installed.
    """
    if spec.source == "path":
        folder = Path(str(spec.path)).expanduser().absolute()
        if not (folder / "config.json").is_file():
            raise HpcdlError(f"model.path={folder} is not a folder with a config.json on this node")
        return str(folder)
    if spec.source == "package":
        return str(package_folder(str(spec.package)))
    return spec.hub_id if spec.source == "hub" else None


def tokenizer_for(spec: ModelSpec, place: str | None) -> Tokenizer:
    """The tokenizer that the experiment asks for.

    Raises:
        HpcdlError: random weights have no tokenizer beside them, and none was named.
    """
    if spec.tokenizer == "byte":
        return ByteTokenizer()
    if place is None:
        raise HpcdlError(
            "model.tokenizer=auto: random weights have no tokenizer beside them; model.tokenizer=byte"
        )
    return HfTokenizer(place, spec.revision)


def import_library() -> None:
    """Imports what every load of a model needs, so that seconds taken after it are the load's own.

    transformers imports lazily: torch's compiler, sympy, scipy and each quantization package come with the first
    model, 3 to 7 s in which nothing is read.
    """
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto  # noqa: F401


def dtype_for(spec: ExperimentSpec) -> torch.dtype:
    """What weights are held in: fp32, but bf16 for a frozen base under `precision=bf16`.

    Frozen weights take no updates that bf16 would lose, and autocast would cast them to bf16 for every
    matmul anyway, each time anew: held in bf16 they take half the memory and none of that time.
    """
    import torch

    frozen = compress.freezes_base(spec)
    return torch.bfloat16 if frozen and spec.trainer.precision == "bf16" else torch.float32


def load(spec: ExperimentSpec, place: str | None) -> Any:
    """The causal language model on the CPU, as transformers has it.

    Args:
        spec: the experiment; random weights come from its seed.
        place: what `weights_place` gave.

    Raises:
        HpcdlError: the weights can't be had; says how to help.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a log wants lines
    dtype = dtype_for(spec)
    if place is None:
        assert spec.model.shape is not None, "checked before submission"
        return from_shape(spec.model.shape, spec.model.attention, spec.seed).to(dtype)
    from hpcdl.distributed import shards
    from hpcdl.worker import quantized, streaming

    if Path(place).is_dir() and (held := quantized.scheme_of(Path(place))) is not None:
        return quantized.load(Path(place), held, spec.model.attention, dtype)
    whole = streaming.why_whole(spec, place)
    if whole is None:
        try:
            return streaming.load(spec, place, dtype)
        except streaming.CannotStream as error:
            whole = str(error)
    if spec.quant.scheme != "none":
        print(f"quant={spec.quant.scheme}: the model is loaded whole first: {whole}", flush=True)
    if shards.files(Path(place)):
        shards.pieces(Path(place))  # tells of a broken file by its name
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            place,
            revision=spec.model.revision,
            dtype=dtype,
            attn_implementation=spec.model.attention,
            **ONLY_WEIGHTS,
        )
    except (OSError, ValueError) as error:
        raise HpcdlError(_cannot_load(spec.model, place, error)) from error


def from_shape(shape: ModelShape, attention: str, seed: int) -> Any:
    """A Llama of this shape with random fp32 weights, the same on every rank."""
    import torch
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim or shape.hidden_size // shape.num_attention_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": shape.rope_theta,
            **(shape.rope_scaling or {}),
        },
        rms_norm_eps=shape.rms_norm_eps,
        tie_word_embeddings=shape.tie_word_embeddings,
        bos_token_id=ByteTokenizer.bos_id,
        eos_token_id=ByteTokenizer.eos_id,
        pad_token_id=ByteTokenizer.pad_id,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _cannot_load(spec: ModelSpec, place: str, error: Exception) -> str:
    if spec.source != "hub":
        return f"transformers can't load a causal language model from {place}: {error}"
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"model.hub_id={place} can't be fetched{offline}: {error}\n"
        "Where this node has no internet: download it on one that has (`hf download "
        f"{place} --local-dir FOLDER`), copy the folder, and give model.path=FOLDER. "
        "A gated model needs your token too (HF_TOKEN)."
    )
