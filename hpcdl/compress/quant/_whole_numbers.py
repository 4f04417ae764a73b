"""What int8, int8_dynamic and int4 share: keys, which experiments they can't serve and why, bytes. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hpcdl import compress
from hpcdl.compress.quant import _four
from hpcdl.compress.quant._four import Edge
from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, QuantSpec
from hpcdl.spec.layout import Held, Matrix, matrices
from hpcdl.spec.parallel import ParallelDims


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(QuantSpec):
    """Keys of all of them."""

    qat: bool = False
    """Quantization-aware training: weights stay as they are, and are trained through their rounding."""
    embedding: Edge = "none"
    """How the embedding is held; none: as it is. A tied one is held as `head` says."""
    head: Edge = "none"
    """How the output head is held; none: as it is."""


def needs(config: Config) -> tuple[str, ...]:
    """Nothing, but for an embedding or a head in 4 bits."""
    return ("bitsandbytes",) if {"nf4", "fp4"} & {config.embedding, config.head} else ()


def why_whole(config: Config) -> str | None:
    """Why a model can't be read matrix by matrix; None where it can."""
    if config.qat:
        return "quant.qat=true trains whole matrices"
    if getattr(config, "calibration_samples", 0):
        return "calibration runs text through the whole model"
    return None


def faults(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Frozen, or trained through the rounding; matrices stay whole."""
    yield from frozen_or_qat(spec, qat=config.qat)
    yield from strategies(spec, qat=config.qat)
    if spec.model.shape is not None:
        edges: Any = config  # has the keys that it looks at
        yield from _four._tied(edges, spec.model.shape)
    for key in ("embedding", "head"):
        if config.qat and getattr(config, key) != "none":
            yield Fault(
                key=f"quant.{key}",
                value=getattr(config, key),
                problem="is frozen so, and quant.qat=true trains it",
                allowed="none with quant.qat=true",
                fix=f"quant.{key}=none",
            )


def frozen_or_qat(spec: ExperimentSpec, *, qat: bool) -> Iterator[Fault]:
    """Whole numbers take no updates; and training through the rounding needs weights that do."""
    frozen = compress.freezes_base(spec)
    scheme = spec.quant.scheme
    if not frozen and not qat:
        problem = (
            f"holds weights as whole numbers, which can't take updates, and peft={spec.peft.name} trains them"
        )
        yield fault(spec, problem, "peft=lora, or quant.qat=true to train through the rounding", "peft=lora")
    if frozen and qat:
        yield Fault(
            key="quant.qat",
            value="true",
            problem=f"trains weights through their rounding, and peft={spec.peft.name} freezes them: beside a"
            f" frozen matrix, quant={scheme} without it holds the very same numbers in less memory",
            allowed="peft=none, or quant.qat=false",
            fix="peft=none",
        )


def strategies(spec: ExperimentSpec, *, qat: bool) -> Iterator[Fault]:
    """No matrix in parts: neither for tensor parallel nor, as whole numbers, for FSDP."""
    dims = ParallelDims.possible(spec.parallel, spec.cluster.world_size)
    if dims is None:
        return
    if dims.tp > 1:
        problem = "a matrix and the scales of its rows and groups can't be split for tensor parallel"
        yield fault(spec, problem, "parallel.tp=1", "parallel.tp=1")
    if qat:
        return
    if dims.dp_shard > 1 or getattr(spec.parallel, "cpu_offload", False):
        problem = (
            "FSDP can't shard whole-number matrices (torchao's Int8Tensor fails there in aten.split): every rank"
            " would hold all of them"
        )
        yield fault(spec, problem, "parallel=ddp, or quant=nf4, which FSDP shards", "parallel=ddp")


def columns(spec: ExperimentSpec, multiple: int, why: str) -> Iterator[Fault]:
    """Every block's matrix has a whole number of groups in a row."""
    if spec.model.shape is None:
        return
    wrong = sorted(
        {m.columns for m in matrices(spec.model.shape) if m.role == "block" and m.columns % multiple}
    )
    if wrong:
        yield fault(spec, f"the model has matrices of {wrong[0]} columns, no multiple of {multiple}: {why}")


def fault(spec: ExperimentSpec, problem: str, allowed: str = "none", fix: str = "quant=none") -> Fault:
    """Of the scheme as a whole."""
    return Fault(key="quant.scheme", value=spec.quant.scheme, problem=problem, allowed=allowed, fix=fix)


def memory(config: Config, matrix: Matrix, plain: int, compute: int, *, held: float) -> Held:
    """What a matrix takes: of a block `held` bytes, and on top its copy that is whole; others as their keys say."""
    if matrix.role != "block":
        edges: Any = config  # has the keys that it looks at
        return _four.memory(edges, matrix, plain, compute)
    return Held(bytes=plain * matrix.numel if config.qat else held, whole=compute * matrix.numel)
