"""ExecuTorch: a program for phones and other small devices, its products by XNNPACK, with the tokenizer beside it.

The decoder goes through torch.export with keys and values as buffers (_pte_decoder.py), so that a call takes tokens
and their positions and nothing else. int8 and int4 are torchao's: inputs of products in 8 bits a token, weights in 8
bits with a scale a row, or in 4 with a scale for 32 of them. XNNPACK names what it holds by its SHA-256; where in the
file each tensor lies is noted beside it, so that the gate can read the file itself.

Source: https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import HpcdlError
from hpcdl.export import Bound
from hpcdl.export.formats.safetensors import copy_tokenizer
from hpcdl.export.source import EMBEDDING, HEAD, Source

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

SUMMARY = "a program for ExecuTorch, on phones and boards"
FILE = "model.pte"
RUNTIME = "executorch"
NEEDS = ("executorch", "torchao")
QUANTS = {
    "int8": Bound(perplexity=1.05, logits=0.15, weights=0.03),
    "f32": Bound(perplexity=1.001, logits=2e-3, weights=1e-6),
    "int4": Bound(perplexity=1.30, logits=0.50, weights=0.14),
}
CONTEXT = 1024
"""Tokens that its buffers hold, where the model knows so many positions: they are part of the program."""
CHUNK = 64
"""Tokens of one call at most. The program has room for the logits of so many."""
GROUP = 32
"""Weights that share a scale in 4 bits."""
PLACES = "weights.json"
"""Where each of the source's tensors lies in the file."""


def write(source: Source, quant: str, folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The program, its tokenizer, and where its weights are."""
    import torch

    from hpcdl.export.formats._pte_decoder import Decoder

    context = min(source.context, CONTEXT)
    with torch.no_grad():
        decoder = Decoder(source, context, in_bits=quant != "f32").eval()
        held = _in_bits(decoder, source, quant)
        buffer = _lowered(decoder, source, context)
    (folder / FILE).write_bytes(buffer)
    del buffer, decoder
    places = _places(folder / FILE, held)
    (folder / PLACES).write_text(json.dumps(places, indent=1) + "\n", encoding="utf-8")
    copy_tokenizer(source, folder)
    (folder / "config.json").write_bytes((source.folder / "config.json").read_bytes())
    about: dict[str, Any] = {"context": context}
    return about if quant == "f32" else {**about, "embedding": "int8"}


def weights(source: Source, folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """What lies in the file at the noted places; of a tied matrix both the embedding's copy and the head's."""
    import numpy as np

    stored = _Stored(folder / FILE)
    pieces = source.pieces()
    for told in json.loads((folder / PLACES).read_text(encoding="utf-8")):
        name, bits = told["name"], told["bits"]
        shape = pieces[name].shape
        kind = {32: np.float32, 8: np.int8, 4: np.uint8}[bits]
        found: NDArray[Any] = np.frombuffer(stored.at(told["place"]), kind)
        if bits == 32:
            yield name, found.reshape(shape)
            continue
        given = stored.at(told["scales"])
        if bits == 4:
            found = np.stack([found & 15, found >> 4], axis=-1).reshape(-1, GROUP).astype(np.int8) - 8
            # bfloat16 is the upper half of fp32
            scales = (np.frombuffer(given, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            found, scales = found.reshape(shape), np.frombuffer(given, np.float32)
        yield name, (found.astype(np.float32) * scales[:, None]).reshape(shape)


def _in_bits(decoder: torch.nn.Module, source: Source, quant: str) -> list[dict[str, Any]]:
    """Quantizes the decoder's products; returns for each of the source's tensors the bytes that the file will hold."""
    import torch
    from torch import nn
    from torchao.utils import unwrap_tensor_subclass

    pieces = source.pieces()
    held: list[dict[str, Any]] = []

    def hold(name: str, bits: int, value: torch.Tensor, **more: Any) -> None:
        held.append({"name": name, "bits": bits, "digest": _digest(value), **more})

    table: Any = decoder.embed_tokens
    more = {"scales": _digest(table.scales)} if table.in_bits else {}
    hold(EMBEDDING, 8 if table.in_bits else 32, table.rows, **more)
    linears = {
        HEAD if name == "lm_head" else f"model.{name}.weight": module
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear)
    }
    if quant != "f32":
        _quantize(decoder, quant)
    for name, module in linears.items():
        own = EMBEDDING if name == HEAD and source.tied else name
        weight: Any = module.weight
        if quant == "f32":
            hold(own, 32, weight)
        elif quant == "int4" and name != HEAD:
            scales = _digest(weight.scale.to(torch.bfloat16))
            hold(own, 4, _packed(weight.qdata), scales=scales)
        else:
            hold(own, 8, weight.qdata, scales=_digest(weight.scale.float()))
    for name, parameter in decoder.named_parameters():
        own = f"model.{name}"
        if own in pieces and own not in linears:
            hold(own, 32, parameter)
    if quant != "f32":
        unwrap_tensor_subclass(decoder)
    return held


def _quantize(decoder: torch.nn.Module, quant: str) -> None:
    """The head in 8 bits, whatever the layers have."""
    import torch
    from torch import nn
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    eight = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    own: Any = torch  # its types of few bits are not in its own hints
    four = Int8DynamicActivationIntxWeightConfig(weight_dtype=own.int4, weight_granularity=PerGroup(GROUP))
    layers = eight if quant == "int8" else four

    def of_a_layer(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    if quant == "int4":
        odd = [
            n for n, m in decoder.named_modules() if isinstance(m, nn.Linear) and m.weight.shape[1] % GROUP
        ]
        if odd:
            raise HpcdlError(
                f"--to executorch --quant int4: rows of {odd[0]} make no whole blocks of {GROUP}; --quant int8 can"
            )
    quantize_(decoder, eight, lambda module, name: name == "lm_head")
    quantize_(decoder, layers, of_a_layer)


def _packed(levels: torch.Tensor) -> torch.Tensor:
    """As XNNPACK lays out 4 bits: pairs of a row in a byte, the earlier in its lower half, around 8."""
    import torch

    around = levels.to(torch.uint8) + 8
    flat = around.contiguous().view(-1)
    return (flat[1::2] << 4 | flat[::2]).view(levels.shape[0], levels.shape[1] // 2)


def _digest(value: torch.Tensor) -> str:
    import torch

    flat = value.detach().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _lowered(decoder: torch.nn.Module, source: Source, context: int) -> bytes:
    """Through torch.export and XNNPACK's partitioner.

    Raises:
        HpcdlError: one of them can't; holds its words.
    """
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    given = torch.zeros(1, 8, dtype=torch.long), torch.arange(8)
    count = torch.export.Dim("tokens", min=1, max=min(CHUNK, context))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names to come, and of buffers that begin empty: these may
            program = torch.export.export(
                decoder, given, dynamic_shapes=({1: count}, {0: count}), strict=False
            )
            edge = to_edge_transform_and_lower(
                program,
                partitioner=[XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner()],
                # what ExecuTorch's own runners of language models ask (extension/llm/runner/constants.h)
                constant_methods={
                    "get_max_seq_len": min(CHUNK, context),
                    "get_max_context_len": context,
                    "use_kv_cache": True,
                    "enable_dynamic_shape": True,
                    "get_vocab_size": source.pieces()[EMBEDDING].shape[0],
                    "get_eos_ids": [source.eos_id],
                },
                # dim order is how tensors lie: here always as they are written
                compile_config=EdgeCompileConfig(_skip_dim_order=True),
            )
            # written in place: without it every call would copy all keys and values
            made = edge.to_executorch(ExecutorchBackendConfig(run_reinplace_pass=True))
    except Exception as error:  # of torch's or ExecuTorch's many own kinds
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HpcdlError(f"this model can't be made an ExecuTorch program: {said}") from error
    return bytes(made.buffer)


class _Stored:
    """Constants of a program by where they lie: `named:KEY`, `constant:INDEX`."""

    def __init__(self, path: Path) -> None:
        from executorch.exir._serialize._program import deserialize_pte_binary

        try:
            found = deserialize_pte_binary(path.read_bytes())
        except Exception as error:
            raise HpcdlError(f"{path.name} can't be read as a program: {error}") from error
        self._named = found.named_data
        self._constants = found.program.constant_buffer

    def at(self, place: str) -> bytes:
        """What lies there.

        Raises:
            KeyError: there is no such place.
        """
        kind, _, key = place.partition(":")
        if kind == "named" and self._named is not None:
            return bytes(self._named.buffers[self._named.pte_data[key].buffer_index])
        return bytes(self._constants[int(key)].storage)

    def places(self) -> dict[str, str]:
        """Places by the SHA-256 of what lies there."""
        keys = self._named.pte_data if self._named is not None else {}
        found = {f"constant:{index}" for index in range(len(self._constants))} | {
            f"named:{key}" for key in keys
        }
        return {hashlib.sha256(self.at(place)).hexdigest(): place for place in sorted(found)}


def _places(path: Path, held: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where each tensor lies.

    Raises:
        HpcdlError: one isn't in the file: this ExecuTorch lays them out in another way than is known here.
    """
    lie = _Stored(path).places()
    found = []
    for each in held:
        for key in ("digest", "scales"):
            if key in each and each[key] not in lie:
                raise HpcdlError(
                    f"{path.name}: {each['name']} isn't in the program as it was given: this ExecuTorch changes"
                    " weights in a way that is not known here"
                )
        told = {"name": each["name"], "bits": each["bits"], "place": lie[each["digest"]]}
        if "scales" in each:
            told |= {"scales": lie[each["scales"]]}
        found.append(told)
    return found
