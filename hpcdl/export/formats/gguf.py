"""GGUF: one file for llama.cpp and what is built on it; weights, vocabulary and chat template in it.

Names, the order of the query's and key's rows, and metadata are those of llama.cpp's own converter
(https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py); numbers are rounded by the `gguf` package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import HpcdlError
from hpcdl.export import Bound, vocabulary
from hpcdl.export.source import EMBEDDING, HEAD, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMMARY = "one file for llama.cpp, Ollama, LM Studio"
FILE = "model.gguf"
RUNTIME = "llama_cpp"
NEEDS = ("gguf",)
QUANTS = {
    "q8_0": Bound(perplexity=1.01, logits=0.06, weights=0.01),
    "f32": Bound(perplexity=1.005, logits=0.03, weights=1e-6),
    "f16": Bound(perplexity=1.005, logits=0.03, weights=1e-3),
    "bf16": Bound(perplexity=1.01, logits=0.05, weights=4e-3),
    "q5_1": Bound(perplexity=1.06, logits=0.20, weights=0.05),
    "q5_0": Bound(perplexity=1.08, logits=0.25, weights=0.06),
    "q4_1": Bound(perplexity=1.20, logits=0.40, weights=0.10),
    "q4_0": Bound(perplexity=1.25, logits=0.45, weights=0.12),
}
"""Bounds: docs/export.md has what was measured."""
EMBEDDED = {"q4_0": "q8_0", "q4_1": "q8_0", "q5_0": "q8_0", "q5_1": "q8_0"}
"""What the embedding and the head are held in unless told: as llama.cpp does, in more bits than the layers."""
GLOBAL = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
ROPE = "rope_freqs.weight"


def write(source: Source, quant: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the file, a tensor in memory at a time.

    Raises:
        HpcdlError: a tensor or the vocabulary can't be written so.
    """
    import gguf
    import numpy as np

    pieces = source.pieces()
    embedded = options.get("embedding_quant") or EMBEDDED.get(quant, quant)
    if embedded not in QUANTS:
        raise HpcdlError(f"--embedding-quant {embedded}: one of {', '.join(QUANTS)}")
    kinds = {name: _kind(name, piece.shape, quant, embedded) for name, piece in pieces.items()}
    names = {name: renamed(name) for name in pieces}
    writer = gguf.GGUFWriter(folder / FILE, source.decoder)
    _metadata(writer, source, quant, pieces[EMBEDDING].shape[0])
    for name, piece in pieces.items():
        kind = gguf.GGMLQuantizationType[kinds[name].upper()]
        stored = gguf.quant_shape_to_byte_shape(piece.shape, kind)
        writer.add_tensor_info(names[name], stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)
    _, divisors = source.inverse_frequencies()
    scaled = source.rope["rope_type"] == "llama3"
    if scaled:
        writer.add_tensor_info(ROPE, (len(divisors),), np.dtype(np.float32), 4 * len(divisors))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in source.tensors():
        kind = gguf.GGMLQuantizationType[kinds[name].upper()]
        ordered = np.ascontiguousarray(interleaved(name, tensor.numpy(), source))
        writer.write_tensor_data(gguf.quants.quantize(ordered, kind).view(np.uint8))
    if scaled:
        writer.write_tensor_data(np.array(divisors, np.float32))
    writer.close()
    wider = sorted(
        {names[name] for name, kind in kinds.items() if _wanted(name, pieces, quant, embedded) != kind}
    )
    return {"embedding": embedded, "wider_tensors": wider}


def weights(source: Source, folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What the file holds, in the source's order of rows."""
    import gguf

    back = {renamed(name): name for name in source.pieces()}
    for tensor in gguf.GGUFReader(folder / FILE).tensors:
        if tensor.name == ROPE:
            continue
        if tensor.name not in back:
            raise HpcdlError(f"{folder / FILE} holds {tensor.name}, which the source hasn't")
        whole = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(reversed(tensor.shape.tolist()))
        )
        yield back[tensor.name], interleaved(back[tensor.name], whole, source, undo=True)


def renamed(name: str) -> str:
    """llama.cpp's name of a tensor.

    Raises:
        HpcdlError: it has none.
    """
    if name in GLOBAL:
        return GLOBAL[name]
    found = _IN_LAYER.fullmatch(name)
    if found is None or found[2] not in LAYER:
        raise HpcdlError(f"{name} has no name in llama.cpp: the model can't be exported to GGUF")
    return f"blk.{found[1]}.{LAYER[found[2]]}.{found[3]}"


def interleaved(name: str, whole: Any, source: Source, *, undo: bool = False) -> Any:
    """Query's and key's rows as llama.cpp's `llama` turns them: neighbours are a pair, and no two halves of a head."""
    if source.decoder != "llama" or not re.search(r"\.(q|k)_proj\.", name):
        return whole
    heads = source.kv_heads if ".k_proj." in name else int(source.config["num_attention_heads"])
    pair, half = (source.head_dim // 2, 2) if undo else (2, source.head_dim // 2)
    return whole.reshape(heads, pair, half, *whole.shape[1:]).swapaxes(1, 2).reshape(whole.shape)


def _wanted(name: str, pieces: Mapping[str, Any], quant: str, embedded: str) -> str:
    if len(pieces[name].shape) < 2:
        return "f32"
    return embedded if name in (EMBEDDING, HEAD) else quant


def _kind(name: str, shape: tuple[int, ...], quant: str, embedded: str) -> str:
    """What a tensor is held in: vectors whole; matrices whose rows are no whole blocks in 16 bits."""
    import gguf

    if len(shape) < 2:
        return "f32"
    wanted = embedded if name in (EMBEDDING, HEAD) else quant
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted.upper()]][0]
    return wanted if shape[-1] % block == 0 else "f16"


def _metadata(writer: Any, source: Source, quant: str, rows: int) -> None:
    import gguf

    config, rope = source.config, source.rope
    writer.add_name(source.name)
    writer.add_file_type(int(gguf.LlamaFileType["ALL_F32" if quant == "f32" else f"MOSTLY_{quant.upper()}"]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(source.context)
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(int(config["num_attention_heads"]))
    writer.add_head_count_kv(source.kv_heads)
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(source.head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(rows)
    words = vocabulary.read(source, rows)
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    if words.scores is not None:
        writer.add_token_scores(words.scores)
    if words.merges is not None:
        writer.add_token_merges(words.merges)
    for name, number in words.ids.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.space_first)
    if words.template:
        writer.add_chat_template(words.template)
