"""QLoRA: the frozen base in 4-bit NormalFloat, a low-rank update trained beside it.

16 levels at the quantiles of a normal distribution; 64 weights share a scale, and the scales are held in 8
bits themselves (double quantization): 4.13 bits a weight, or a little more. Each product makes its matrix whole
again.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, sections 3 and 4;
torchao's NF4Tensor, the one that FSDP2 can shard (bitsandbytes' loses its scales there).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpcdl import compress
from hpcdl.errors import Fault, HpcdlError
from hpcdl.spec import ExperimentSpec, ModelShape, QuantSpec
from hpcdl.spec.parallel import ParallelDims

if TYPE_CHECKING:
    from torch import nn

NEEDS = ("torchao",)
BLOCKS = (64, 32, 16)
"""Weights that share a scale: 64 as in the paper, fewer where a row of the matrix doesn't divide by it."""
SCALES = 256
"""Scales that share a scale of their own, at most: as in the paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(QuantSpec):
    """Nothing to configure."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """The base must be frozen, its matrices must divide into blocks, and nobody may split one by columns."""
    if not getattr(compress.get(spec.peft.name), "FREEZES_BASE", False):
        yield _fault(
            "holds weights in 4 bits, which can't take updates, and peft=none trains them", "peft=lora"
        )
    try:
        dims = ParallelDims.fill(spec.parallel, spec.cluster.world_size)
    except ValueError:
        return  # another rule says so
    if dims.tp > 1:
        yield _fault("a matrix in 4-bit blocks can't be split for tensor parallel", "parallel.tp=1")
    if spec.model.shape is not None:
        yield from _sizes(spec.model.shape, dims)


def _fault(problem: str, fix: str) -> Fault:
    return Fault(
        key="quant.scheme", value="nf4", problem=problem, allowed="none, or as the fix says", fix=fix
    )


def _sizes(shape: ModelShape, dims: ParallelDims) -> Iterator[Fault]:
    """Columns of a matrix make whole blocks; rows are shared out evenly where they are sharded."""
    width = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    heads, kv_heads = shape.num_attention_heads * width, shape.num_key_value_heads * width
    columns = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size, "heads": heads}
    for name, have in columns.items():
        if have % BLOCKS[-1]:
            yield _fault(f"the model's {name} {have} is no multiple of {BLOCKS[-1]}", "quant=none")
    ranks = dims.dp_shard * dims.cp if dims.dp_shard > 1 else 1
    rows = {**columns, "key and value heads": kv_heads}
    uneven = next((f"{name} {have}" for name, have in rows.items() if have % ranks), None)
    if uneven:
        yield _fault(
            f"dp_shard × cp = {ranks} ranks can't share the model's {uneven} evenly, as 4-bit tensors must be",
            "parallel=ddp",
        )


def apply(config: Config, model: nn.Module) -> nn.Module:
    """Holds the linear layers of every block in NF4; embedding, norms and head stay as they are.

    Raises:
        HpcdlError: torchao isn't installed, or a matrix doesn't divide into blocks.
    """
    from torch import nn

    from hpcdl.distributed.decoder import blocks

    try:
        from torchao.quantization import to_nf4
    except ImportError as error:
        raise HpcdlError("quant=nf4 needs torchao: pip install 'hpcdl[quant]'") from error
    for name, module in blocks(model).named_modules():
        if isinstance(module, nn.Linear):
            block, scales = block_sizes(name, module.in_features)
            held: Any = to_nf4(module.weight.detach(), block, scales)
            module.weight = nn.Parameter(held, requires_grad=False)
    return model


def block_sizes(name: str, columns: int) -> tuple[int, int]:
    """Weights of a block, and blocks whose scales share one.

    Both divide a row, so that any number of whole rows is a tensor of its own: FSDP shards by rows.

    Raises:
        HpcdlError: no block divides a row.
    """
    block = next((size for size in BLOCKS if columns % size == 0), None)
    if block is None:
        raise HpcdlError(f"quant=nf4: {name} has {columns} columns, no multiple of {BLOCKS[-1]}; quant=none")
    a_row = columns // block
    return block, max(size for size in range(1, SCALES + 1) if a_row % size == 0)
