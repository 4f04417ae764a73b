"""ONNX: a graph and its weights for ONNX Runtime, with the tokenizer's files beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.export import Bound
from hpcdl.export.formats.safetensors import copy_tokenizer
from hpcdl.export.source import EMBEDDING, HEAD, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMMARY = "a graph for ONNX Runtime, on servers, phones and in browsers"
FILE = "model.onnx"
RUNTIME = "onnxruntime"
NEEDS = ("onnx",)
QUANTS = {
    "int8": Bound(perplexity=1.02, logits=0.06, weights=0.01),
    "f32": Bound(perplexity=1.001, logits=2e-3, weights=1e-6),
    "int4": Bound(perplexity=1.25, logits=0.45, weights=0.12),
}


def write(source: Source, quant: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The graph, its weights, the tokenizer, and config.json for tools that ask."""
    import onnx

    from hpcdl.export.formats import _onnx_graph

    _onnx_graph.build(source, quant, folder, FILE)
    onnx.checker.check_model(str(folder / FILE))
    copy_tokenizer(source, folder)
    (folder / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    return {} if quant == "f32" else {"embedding": "int8"}


def weights(source: Source, folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The graph's initializers under the source's names, in its order."""
    import numpy as np
    import onnx

    from hpcdl.export.formats import _onnx_graph

    pieces = source.pieces()
    graph = onnx.load(folder / FILE, load_external_data=False).graph
    stored = {
        each.name: each for each in graph.initializer if each.name in pieces or each.name.endswith(".scales")
    }

    def read(name: str) -> NDArray[Any]:
        told = {entry.key: entry.value for entry in stored[name].external_data}
        kind = np.uint8 if stored[name].data_type == onnx.TensorProto.UINT8 else np.float32
        shape = tuple(stored[name].dims)
        where = folder / Path(told["location"]).name
        return np.fromfile(where, kind, int(np.prod(shape)), offset=int(told["offset"])).reshape(shape)

    for name in stored:
        if name.endswith(".scales"):
            continue
        found, shape = read(name), pieces[name].shape
        if found.dtype == np.uint8:
            columns = shape[-1]
            bits = 8 * found.shape[2] // _onnx_graph.BLOCK
            yield name, _onnx_graph.whole(found, read(f"{name}.scales"), bits, columns)
        else:
            turned = found.ndim == 2 and name != EMBEDDING and (name != HEAD or not source.tied)
            yield name, found.T if turned else found
