"""What nf4 and fp4 share: their keys, what they refuse, and which of two holders has the bits.

`bitsandbytes`: its kernels under layers of our own (`_blocks4.py`), where every rank holds whole matrices.
`torchao`: its NF4Tensor, the one that FSDP2 can shard (bitsandbytes' loses its scales there).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hpcdl import compress
from hpcdl.errors import Fault, HpcdlError
from hpcdl.spec import ExperimentSpec, ModelShape, QuantSpec
from hpcdl.spec.layout import Held, Matrix, head_dim
from hpcdl.spec.parallel import ParallelDims

if TYPE_CHECKING:
    from torch import Tensor, nn

Edge = Literal["none", "int8", "nf4", "fp4"]
"""How an embedding or a head is held."""

MULTIPLE = {"bitsandbytes": 32, "torchao": 16}
"""What the columns of a matrix must be a multiple of: a row makes whole blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(QuantSpec):
    """Keys of both."""

    backend: Literal["auto", "bitsandbytes", "torchao"] = "auto"
    """Who has the bits; auto: torchao where matrices are sharded (FSDP), else bitsandbytes."""
    embedding: Edge = "none"
    """How the embedding is held; none: in 16 bits, on a CPU mmapped from disk, so that only rows that are used
    come into memory. A tied one is held as `head` says."""
    head: Edge = "none"
    """How the output head is held; none: in 16 bits."""
    resident: Literal["all", "layer"] = "all"
    """What stays in memory of weights that are mapped from disk, on a CPU: `all` once it was used, or the `layer`
    at work only: others' pages are given back to the kernel, which has them in its cache while there is room."""


def fill(config: Config, spec: ExperimentSpec) -> dict[str, Any]:
    """`backend: auto` by the strategy."""
    return {"backend": _backend(config, spec)}


def needs(config: Config) -> tuple[str, ...]:
    """The package underneath; the embedding and the head are bitsandbytes' alone."""
    edges = {"nf4", "fp4"} & {config.embedding, config.head}
    other = ("bitsandbytes",) if edges and config.backend == "torchao" else ()
    return (config.backend, *other)


def why_whole(config: Config) -> str | None:
    """Torchao's tensors are made in memory."""
    return "torchao's tensors are made from a whole model" if config.backend == "torchao" else None


def _sharded(spec: ExperimentSpec) -> bool:
    """Whether FSDP takes matrices apart, on however many ranks."""
    return spec.parallel.dp_shard != 1 or getattr(spec.parallel, "cpu_offload", False)


def _backend(config: Config, spec: ExperimentSpec) -> str:
    if config.backend != "auto":
        return config.backend
    return "torchao" if _sharded(spec) else "bitsandbytes"


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """The base must be frozen, its matrices must divide into blocks, and nobody may split one by columns."""
    if not compress.freezes_base(spec):
        yield _fault(
            config,
            "holds weights in 4 bits, which can't take updates, and peft=none trains them",
            "peft=lora",
        )
    dims = ParallelDims.possible(spec.parallel, spec.cluster.world_size)
    if dims is None:
        return
    if dims.tp > 1:
        yield _fault(config, "a matrix in 4-bit blocks can't be split for tensor parallel", "parallel.tp=1")
    backend = _backend(config, spec)
    if _sharded(spec) and backend == "bitsandbytes":
        yield Fault(
            key="quant.backend",
            value="bitsandbytes",
            problem="FSDP can't shard bitsandbytes' 4-bit tensors: their scales are lost",
            allowed="auto, torchao",
            fix="quant.backend=auto",
        )
    if backend == "torchao" and config.scheme != "nf4":
        why = "FSDP can shard torchao's tensors only, and " if _sharded(spec) else ""
        fix = "quant=nf4, or parallel=ddp" if _sharded(spec) else "quant=nf4, or quant.backend=auto"
        yield _fault(config, f"{why}torchao has no {config.scheme}", fix)
    if _sharded(spec):
        yield from _edges_whole(config)
    if spec.model.shape is not None:
        yield from _sizes(config, spec.model.shape, dims, MULTIPLE[backend])
        yield from _tied(config, spec.model.shape)


def _fault(config: Config, problem: str, fix: str) -> Fault:
    return Fault(
        key="quant.scheme", value=config.scheme, problem=problem, allowed="none, or as the fix says", fix=fix
    )


def _edges_whole(config: Config) -> Iterator[Fault]:
    for key in ("embedding", "head"):
        if getattr(config, key) != "none":
            yield Fault(
                key=f"quant.{key}",
                value=getattr(config, key),
                problem="is a tensor that FSDP can't shard",
                allowed="none under FSDP",
                fix=f"quant.{key}=none",
            )


def _tied(config: Config, shape: ModelShape) -> Iterator[Fault]:
    if shape.tie_word_embeddings and config.embedding not in ("none", config.head):
        yield Fault(
            key="quant.embedding",
            value=config.embedding,
            problem=f"this model's head is its embedding, one matrix, and quant.head is {config.head}",
            allowed="none (then quant.head says it), or the same as quant.head",
            fix=f"quant.head={config.embedding}",
        )


def _sizes(config: Config, shape: ModelShape, dims: ParallelDims, multiple: int) -> Iterator[Fault]:
    """Columns of a matrix make whole blocks; rows are shared out evenly where they are sharded."""
    heads, kv_heads = (
        shape.num_attention_heads * head_dim(shape),
        shape.num_key_value_heads * head_dim(shape),
    )
    columns = {"hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size, "heads": heads}
    for name, have in columns.items():
        if have % multiple:
            yield _fault(config, f"the model's {name} {have} is no multiple of {multiple}", "quant=none")
    ranks = dims.dp_shard * dims.cp if dims.dp_shard > 1 else 1
    rows = {**columns, "key and value heads": kv_heads}
    uneven = next((f"{name} {have}" for name, have in rows.items() if have % ranks), None)
    if uneven:
        yield _fault(
            config,
            f"dp_shard × cp = {ranks} ranks can't share the model's {uneven} evenly, as 4-bit tensors must be",
            "parallel=ddp",
        )


def memory(config: Config, matrix: Matrix, plain: int, compute: int) -> Held:
    """4 bits a weight, 8 a block of 64, 32 for 256 blocks; made whole in the compute dtype while it is used."""
    kind = config.scheme
    if matrix.role in ("embedding", "head"):
        kind = config.head if matrix.role == "head" or config.embedding == "none" else config.embedding
        if matrix.role == "embedding" and config.embedding == "none":
            kind = "none"
    if kind == "none" or matrix.role == "norm":
        return Held(bytes=plain * matrix.numel)
    if kind == "int8":
        return Held(bytes=matrix.numel + 4 * matrix.rows, whole=compute * min(matrix.numel, 2**26))
    block = next((size for size in (64, 32, 16) if matrix.columns % size == 0), 64)
    blocks = matrix.numel / block
    held = matrix.numel / 2 + blocks + 4 * blocks / 256
    return Held(bytes=held, whole=compute * min(matrix.numel, 2**26) + 4 * blocks)


def pack(config: Config, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of `_blocks4.Blocks4`; on the CPU bytes are bitsandbytes' own."""
    from hpcdl.compress.quant import _blocks4

    return _blocks4.pack(weight, config.scheme)


def layer(config: Config, linear: nn.Linear, packed: Mapping[str, Tensor]) -> nn.Linear:
    """A linear layer over the packed matrix."""
    from hpcdl.compress.quant._hold import from_tensors
    from hpcdl.distributed.held import HeldLinear

    shape = (linear.out_features, linear.in_features)
    return HeldLinear(from_tensors(config.scheme, shape, packed), linear.bias)


def apply(config: Config, model: nn.Module, scheme: Any) -> nn.Module:
    """Holds the linear layers of every block in 4 bits, and the embedding and the head as their keys say.

    `backend: auto` is bitsandbytes here: `hpcdl.compress.quant.hold` fills it in by the strategy.

    Raises:
        HpcdlError: the package underneath isn't installed, or a matrix doesn't divide into blocks.
    """
    from hpcdl.compress.quant._hold import hold_edges, hold_linears

    if config.backend == "torchao":
        if config.scheme != "nf4":
            raise HpcdlError(f"quant={config.scheme}: torchao has none; quant.backend=bitsandbytes")
        from hpcdl.compress.quant import _torchao

        model = _torchao.apply(model)
    else:
        model = hold_linears(scheme, config, model)
    return hold_edges(config, model)  # type: ignore[no-any-return]
