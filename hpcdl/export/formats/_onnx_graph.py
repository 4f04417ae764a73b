"""A decoder as an ONNX graph, node by node, with keys and values of earlier tokens as inputs and outputs.

Inputs and outputs are called as optimum and ONNX Runtime's own tools call them. Standard operators of opset 21;
matrices in few bits are ONNX Runtime's MatMulNBits (blocks of 32 along the input, a scale each, no zero point).

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from hpcdl.export.source import EMBEDDING, HEAD, Source

OPSET = 21
BLOCK = 32
BITS = {"int8": 8, "int4": 4}
ALIGNED = 4096
"""Weights begin at multiples of this in their file, so that they can be mapped."""
DATA = "model.onnx.data"


def quantized(weight: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Blocks `(rows, blocks, 32 · bits / 8)` around 2^(bits - 1), and scales `(rows, blocks)`.

    As Q4_0 and Q8_0 of llama.cpp: of the 4-bit grid, which has one step more below zero than above, the block's
    largest number sits on the far end.
    """
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :columns] = weight
    grouped = padded.reshape(rows, blocks, BLOCK)
    middle = 2 ** (bits - 1)
    if bits == 8:
        scales = np.abs(grouped).max(axis=2) / (middle - 1)
    else:
        far = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[..., None], axis=2)[..., 0]
        scales = far / -middle
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)[..., None]
    levels = np.clip(np.rint(grouped * inverse) + middle, 0, 2**bits - 1).astype(np.uint8)
    if bits == 4:
        levels = levels[..., 0::2] | levels[..., 1::2] << 4
    return np.ascontiguousarray(levels), np.ascontiguousarray(scales, np.float32)


def whole(
    levels: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, columns: int
) -> NDArray[np.float32]:
    """What `quantized` stands for, `(rows, columns)`."""
    if bits == 4:
        levels = np.stack([levels & 15, levels >> 4], axis=-1).reshape(*levels.shape[:2], BLOCK)
    made = (levels.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]
    found: NDArray[np.float32] = made.reshape(len(levels), -1)[:, :columns]
    return found


class Graph:
    """Nodes and weights; these go to their file as they come."""

    def __init__(self, source: Source, quant: str, data: BinaryIO) -> None:
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self._source, self._quant, self._data = source, quant, data
        self._pieces = source.pieces()
        self._count = 0

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Writes a tensor; returns its name."""
        self._data.write(b"\0" * (-self._data.tell() % ALIGNED))
        kinds = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
        made = TensorProto(name=name, dims=array.shape, data_type=kinds[str(array.dtype)])
        made.data_location = TensorProto.EXTERNAL
        told = {"location": DATA, "offset": self._data.tell(), "length": array.nbytes}
        for key, value in told.items():
            made.external_data.add(key=key, value=str(value))
        flat: Any = np.ascontiguousarray(array)
        self._data.write(memoryview(flat).cast("B"))
        self.tensors.append(made)
        return name

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        """A small number or list."""
        self._count += 1
        array = np.asarray(value, dtype)
        name = f"constant_{self._count}"
        kind = TensorProto.INT64 if dtype == np.int64 else TensorProto.FLOAT
        self.tensors.append(helper.make_tensor(name, kind, array.shape, array.flatten().tolist()))
        return name

    def node(
        self, kind: str, *inputs: str, domain: str = "", name: str | None = None, **attributes: Any
    ) -> str:
        """Adds a node of one output; returns that."""
        self._count += 1
        out = name or f"{kind.lower()}_{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), [out], domain=domain, **attributes))
        return out

    def split(self, given: str, size: int) -> tuple[str, str]:
        """Halves of the last axis, each of `size`."""
        self._count += 1
        outs = (f"first_{self._count}", f"second_{self._count}")
        self.nodes.append(
            helper.make_node("Split", [given, self.constant([size, size])], list(outs), axis=-1)
        )
        return outs

    def reshape(self, given: str, shape: Sequence[int]) -> str:
        """0 keeps a dimension, -1 takes what is left."""
        return self.node("Reshape", given, self.constant(shape))

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor of the source."""
        found: NDArray[np.float32] = self._pieces[name].read().float().numpy()
        return found

    def linear(self, given: str, module: str) -> str:
        """`given @ weight.T (+ bias)`."""
        out = self.product(given, f"{module}.weight", self._quant)
        if f"{module}.bias" in self._pieces:
            out = self.node("Add", out, self.weight(f"{module}.bias", self.read(f"{module}.bias")))
        return out

    def product(self, given: str, name: str, quant: str) -> str:
        """`given @ weight.T`, the weight as its kind of numbers has it."""
        if quant == "f32":
            return self.node("MatMul", given, self.weight(name, self.read(name).T))
        rows, columns = self._pieces[name].shape
        return self.in_bits(given, *self.packed(name, BITS[quant]), rows, columns, BITS[quant])

    def packed(self, name: str, bits: int) -> tuple[str, str]:
        """Names of a matrix's blocks and scales, which are written."""
        levels, scales = quantized(self.read(name), bits)
        return self.weight(name, levels), self.weight(f"{name}.scales", scales)

    def in_bits(self, given: str, levels: str, scales: str, rows: int, columns: int, bits: int) -> str:
        """ONNX Runtime's product with a matrix in blocks; inputs are rounded to int8 too, as llama.cpp does."""
        return self.node(
            "MatMulNBits", given, levels, scales, domain="com.microsoft", K=columns, N=rows, bits=bits,
            block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip

    def norm(self, given: str, name: str, eps: float) -> str:
        """Root mean square norm over the last axis."""
        square = self.node("ReduceMean", self.node("Mul", given, given), self.constant([-1]), keepdims=1)
        root = self.node("Sqrt", self.node("Add", square, self.constant(eps, np.float32)))
        return self.node("Mul", self.node("Div", given, root), self.weight(name, self.read(name)))


def build(source: Source, quant: str, folder: Path, file: str) -> None:
    """Writes the graph into `file` and its weights beside it."""
    config, layers = source.config, int(source.config["num_hidden_layers"])
    with (folder / DATA).open("wb") as data:
        graph = Graph(source, quant, data)
        hidden, table = _embedded(graph, source, quant)
        angles = _angles(graph, source)
        bias = _bias(graph)
        for layer in range(layers):
            hidden = _block(graph, source, hidden, layer, angles, bias)
        hidden = graph.norm(hidden, "model.norm.weight", float(config["rms_norm_eps"]))
        _head(graph, source, quant, hidden, table)
    heads, width = source.kv_heads, source.head_dim
    tokens, kept = ["batch", "tokens"], ["batch", "all_tokens"]
    values = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, tokens),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, kept),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, tokens),
    ]
    rows = int(source.pieces()[EMBEDDING].shape[0])
    outs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*tokens, rows])]
    for layer in range(layers):
        for part in ("key", "value"):
            shape: list[Any] = ["batch", heads, "past_tokens", width]
            values.append(
                helper.make_tensor_value_info(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, shape)
            )
            shape = ["batch", heads, "all_tokens", width]
            outs.append(helper.make_tensor_value_info(f"present.{layer}.{part}", TensorProto.FLOAT, shape))
    made = helper.make_graph(graph.nodes, "decoder", values, outs, graph.tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, producer_name="hpcdl", ir_version=10)
    (folder / file).write_bytes(model.SerializeToString())


def _embedded(graph: Graph, source: Source, quant: str) -> tuple[str, tuple[str, ...]]:
    """Hidden states of the tokens, and the names of the table."""
    width = int(source.config["hidden_size"])
    if quant == "f32":
        name = graph.weight(EMBEDDING, graph.read(EMBEDDING))
        return graph.node("Gather", name, "input_ids"), (name,)
    # in 8 bits whatever the layers have: the rows of few tokens are made whole
    levels, scales = graph.packed(EMBEDDING, 8)
    found = graph.node("Cast", graph.node("Gather", levels, "input_ids"), to=TensorProto.FLOAT)
    around = graph.node("Sub", found, graph.constant(128.0, np.float32))
    each = graph.node("Unsqueeze", graph.node("Gather", scales, "input_ids"), graph.constant([-1]))
    flat = graph.reshape(graph.node("Mul", around, each), [0, 0, -1])
    if width % BLOCK:
        ends = [graph.constant([number]) for number in (0, width, 2)]
        flat = graph.node("Slice", flat, *ends)
    return flat, (levels, scales)


def _head(graph: Graph, source: Source, quant: str, hidden: str, table: tuple[str, ...]) -> None:
    rows, columns = source.pieces()[EMBEDDING].shape
    if not source.tied:
        out = graph.product(hidden, HEAD, "f32" if quant == "f32" else "int8")
    elif quant == "f32":
        flat = graph.node("Gemm", graph.reshape(hidden, [-1, columns]), table[0], transB=1)
        like = graph.node("Concat", graph.node("Shape", "input_ids"), graph.constant([rows]), axis=0)
        out = graph.node("Reshape", flat, like)
    else:
        out = graph.in_bits(hidden, table[0], table[1], rows, columns, 8)
    graph.node("Identity", out, name="logits")


def _angles(graph: Graph, source: Source) -> tuple[str, str]:
    """Cosine and sine of each position, `(batch, 1, tokens, head_dim)`."""
    frequencies = np.array(source.inverse_frequencies()[0], np.float32)
    table = graph.constant(np.concatenate([frequencies, frequencies]), np.float32)
    places = graph.node("Cast", "position_ids", to=TensorProto.FLOAT)
    angles = graph.node("Mul", graph.node("Unsqueeze", places, graph.constant([1, 3])), table)
    return graph.node("Cos", angles), graph.node("Sin", angles)


def _bias(graph: Graph) -> str:
    """0 where a token may look, `(batch, 1, 1, tokens, all tokens)`; the lowest number where it may not."""
    past = graph.node("Squeeze", graph.node("Shape", "past_key_values.0.key", start=2, end=3))
    whole_length = graph.node("Squeeze", graph.node("Shape", "attention_mask", start=1, end=2))
    one, zero = graph.constant(1), graph.constant(0)
    own = graph.node("Unsqueeze", graph.node("Range", past, whole_length, one), graph.constant([1]))
    others = graph.node("Unsqueeze", graph.node("Range", zero, whole_length, one), graph.constant([0]))
    there = graph.node(
        "Unsqueeze", graph.node("Cast", "attention_mask", to=TensorProto.BOOL), graph.constant([1, 2, 3])
    )
    allowed = graph.node("And", graph.node("LessOrEqual", others, own), there)
    lowest = graph.constant(float(np.finfo(np.float32).min), np.float32)
    return graph.node("Where", allowed, graph.constant(0.0, np.float32), lowest)


def _block(graph: Graph, source: Source, hidden: str, layer: int, angles: tuple[str, str], bias: str) -> str:
    config, at = source.config, f"model.layers.{layer}"
    eps = float(config["rms_norm_eps"])
    normed = graph.norm(hidden, f"{at}.input_layernorm.weight", eps)
    hidden = graph.node("Add", hidden, _attention(graph, source, normed, layer, angles, bias))
    normed = graph.norm(hidden, f"{at}.post_attention_layernorm.weight", eps)
    gate = graph.linear(normed, f"{at}.mlp.gate_proj")
    gate = graph.node("Mul", gate, graph.node("Sigmoid", gate))
    inner = graph.node("Mul", gate, graph.linear(normed, f"{at}.mlp.up_proj"))
    return graph.node("Add", hidden, graph.linear(inner, f"{at}.mlp.down_proj"))


def _attention(
    graph: Graph, source: Source, normed: str, layer: int, angles: tuple[str, str], bias: str
) -> str:
    """Grouped: the queries that share a key are an axis of their own."""
    heads, shared, width = int(source.config["num_attention_heads"]), source.kv_heads, source.head_dim
    at = f"model.layers.{layer}.self_attn"
    query = _turned(graph, source, _heads(graph, source, normed, f"{at}.q_proj", heads), angles)
    key = _turned(graph, source, _heads(graph, source, normed, f"{at}.k_proj", shared), angles)
    value = _heads(graph, source, normed, f"{at}.v_proj", shared)
    past = f"past_key_values.{layer}"
    key = graph.node("Concat", f"{past}.key", key, axis=2, name=f"present.{layer}.key")
    value = graph.node("Concat", f"{past}.value", value, axis=2, name=f"present.{layer}.value")
    like = graph.node("Shape", normed, start=0, end=2)
    parts = [graph.node("Shape", normed, start=0, end=1), graph.constant([shared, heads // shared])]
    tail = [graph.node("Shape", normed, start=1, end=2), graph.constant([width])]
    grouped = graph.node("Reshape", query, graph.node("Concat", *parts, *tail, axis=0))
    turned = graph.node("Unsqueeze", graph.node("Transpose", key, perm=[0, 1, 3, 2]), graph.constant([2]))
    scale = graph.constant(width**-0.5, np.float32)
    scores = graph.node("Mul", graph.node("MatMul", grouped, turned), scale)
    chances = graph.node("Softmax", graph.node("Add", scores, bias), axis=-1)
    seen = graph.node("MatMul", chances, graph.node("Unsqueeze", value, graph.constant([2])))
    again = graph.node("Transpose", seen, perm=[0, 3, 1, 2, 4])
    flat = graph.node("Reshape", again, graph.node("Concat", like, graph.constant([heads * width]), axis=0))
    return graph.linear(flat, f"{at}.o_proj")


def _heads(graph: Graph, source: Source, normed: str, module: str, count: int) -> str:
    """`(batch, heads, tokens, head_dim)`; Qwen 3 norms each head."""
    split = graph.reshape(graph.linear(normed, module), [0, 0, count, source.head_dim])
    own = module.replace("_proj", "_norm") + ".weight"
    if own in source.pieces():
        split = graph.norm(split, own, float(source.config["rms_norm_eps"]))
    return graph.node("Transpose", split, perm=[0, 2, 1, 3])


def _turned(graph: Graph, source: Source, given: str, angles: tuple[str, str]) -> str:
    """RoPE over the two halves of each head, as transformers has it."""
    first, second = graph.split(given, source.head_dim // 2)
    rotated = graph.node("Concat", graph.node("Neg", second), first, axis=-1)
    cos, sin = angles
    return graph.node("Add", graph.node("Mul", given, cos), graph.node("Mul", rotated, sin))
