"""Held matrices in files that others read too: names and shapes of tensors, and what config.json says of them.

int8, int8_dynamic and int4 as compressed-tensors has them (github.com/vllm-project/compressed-tensors:
«int-quantized» and «pack-quantized»), nf4 and fp4 as bitsandbytes' own tensors in transformers' checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcdl.compress.quant import _affine, _blocks4
from hpcdl.compress.quant._hold import KINDS
from hpcdl.compress.quant._integer import Int4
from hpcdl.distributed.held import Matrix

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of a module's tensors in a file, by their names below the module's."""


@dataclass(frozen=True, slots=True)
class Form:
    """One kind of matrix in a file."""

    shapes: Callable[[int, int, Any], Shapes]
    """Of a matrix of so many rows and columns, under a scheme's config."""
    write: Callable[[Matrix], dict[str, Tensor]]
    """The tensors of a matrix, by those names."""
    read: Callable[[Mapping[str, Tensor], int, int], dict[str, Tensor]]
    """What they were made of: the tensors that the Matrix's class names."""


# --- int8 ------------------------------------------------------------------------------------------------


def _shapes8(rows: int, columns: int, config: Any) -> Shapes:
    return {"weight": ((rows, columns), torch.int8), "weight_scale": ((rows, 1), torch.float32)}


def _write8(matrix: Any) -> dict[str, Tensor]:
    return {"weight": matrix.weight, "weight_scale": matrix.scale[:, None]}


def _read8(tensors: Mapping[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    return {"weight": tensors["weight"], "scale": tensors["weight_scale"].flatten()}


# --- int4: eight levels an int32, zero points packed along the rows ----------------------------------------


def _shapes_int4(rows: int, columns: int, config: Any) -> Shapes:
    groups = columns // config.group_size
    return {
        "weight_packed": ((rows, columns // 8), torch.int32),
        "weight_scale": ((rows, groups), torch.bfloat16),
        "weight_zero_point": ((-(-rows // 8), groups), torch.int32),
        "weight_shape": ((2,), torch.int64),
    }


def _write_int4(matrix: Any) -> dict[str, Tensor]:
    padded = torch.nn.functional.pad(matrix.zero, (0, 0, 0, -matrix.out_features % 8))
    zeros = _affine.pack4(padded.T).contiguous()
    return {
        "weight_packed": matrix.weight.view(torch.int32),  # little-endian: the first of two is the low half
        "weight_scale": matrix.scale,
        "weight_zero_point": zeros.flatten().view(torch.int32).view(len(zeros), -1).T,
        "weight_shape": torch.tensor(matrix.shape),
    }


def _read_int4(tensors: Mapping[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    packed = tensors["weight_zero_point"].T.contiguous()
    zeros = _affine.unpack4(packed.flatten().view(torch.uint8).view(len(packed), -1)).T
    return {
        "weight": tensors["weight_packed"].view(torch.uint8),
        "scale": tensors["weight_scale"],
        "zero": zeros[:rows].contiguous(),
    }


# --- nf4 and fp4: bitsandbytes ------------------------------------------------------------------------------


def _state_name(kind: str) -> str:
    return f"weight.quant_state.bitsandbytes__{kind}"


def _state(matrix: Any) -> Tensor:
    """What bitsandbytes can't tell from the tensors, as JSON in bytes."""
    told = {
        "quant_type": matrix.kind,
        "blocksize": matrix.block,
        "shape": list(matrix.shape),
        "dtype": "bfloat16",
        "nested_blocksize": _blocks4.SCALES,
        "nested_dtype": "float32",
        "nested_offset": float(matrix.offset),
    }
    return torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)


def _shapes_blocks4(kind: str) -> Callable[[int, int, Any], Shapes]:
    def shapes(rows: int, columns: int, config: Any) -> Shapes:
        packed = _blocks4.packed_shapes(rows, columns)
        return {
            "weight": ((rows * columns // 2, 1), torch.uint8),
            "weight.absmax": packed["absmax"],
            "weight.quant_map": ((16,), torch.float32),
            "weight.nested_absmax": packed["scales"],
            "weight.nested_quant_map": ((256,), torch.float32),
            _state_name(kind): ((-1,), torch.uint8),
        }

    return shapes


def _write_blocks4(matrix: Any) -> dict[str, Tensor]:
    from bitsandbytes.functional import get_4bit_type

    levels: Any = get_4bit_type(matrix.kind, device="cpu")  # type: ignore[no-untyped-call]
    return {
        "weight": matrix.weight.reshape(-1, 1),
        "weight.absmax": matrix.absmax,
        "weight.quant_map": levels.float(),
        "weight.nested_absmax": matrix.scales,
        "weight.nested_quant_map": _blocks4.dynamic_map(torch.device("cpu")).float(),
        _state_name(matrix.kind): _state(matrix),
    }


def _read_blocks4(kind: str) -> Callable[[Mapping[str, Tensor], int, int], dict[str, Tensor]]:
    def read(tensors: Mapping[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
        told = json.loads(bytes(tensors[_state_name(kind)].tolist()))
        return {
            "weight": tensors["weight"].view(rows, columns // 2),
            "absmax": tensors["weight.absmax"],
            "scales": tensors["weight.nested_absmax"],
            "offset": torch.tensor(float(told["nested_offset"])),
        }

    return read


FORMS: dict[str, Form] = {
    "int8": Form(_shapes8, _write8, _read8),
    "int4": Form(_shapes_int4, _write_int4, _read_int4),
    **{kind: Form(_shapes_blocks4(kind), _write_blocks4, _read_blocks4(kind)) for kind in ("nf4", "fp4")},
}
"""By a Matrix's kind."""
MATRICES: dict[str, type[Matrix]] = {**KINDS, "int4": Int4}
"""The class of each kind."""
KIND_OF = {"int8": "int8", "int8_dynamic": "int8", "int4": "int4", "nf4": "nf4", "fp4": "fp4"}
"""What a scheme's blocks hold."""


def told_to_transformers(config: Any, *, edges: bool) -> dict[str, Any]:
    """`quantization_config` for config.json.

    Args:
        config: the scheme's.
        edges: whether the embedding or the head is held too, which transformers has no words for: then it is
            told that only hpcdl reads this.
    """
    if edges:
        return {"quant_method": "hpcdl"}
    if config.scheme in ("nf4", "fp4"):
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": config.scheme,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        }
    weights: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = None
    if config.scheme == "int4":
        weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group"}
        weights |= {"group_size": config.group_size}
    if config.scheme == "int8_dynamic":
        inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    form = "pack-quantized" if config.scheme == "int4" else "int-quantized"
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
