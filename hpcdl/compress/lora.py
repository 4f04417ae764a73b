"""LoRA: train a low-rank update B·A·(alpha/rank) beside each frozen matrix.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1.

The variants `rslora` and `dora` are this with another scale and another form; what they share is here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Interval

from hpcdl.errors import Fault, HpcdlError
from hpcdl.spec import ExperimentSpec, PeftSpec
from hpcdl.spec.layout import Beside, Matrix

if TYPE_CHECKING:
    from torch import nn


FREEZES_BASE = True
"""The base takes no updates: the worker may hold it in bf16."""

PLACES = {"init_from": "adapter"}
"""What names an adapter, to be made absolute (hpcdl.experiment.places)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(PeftSpec):
    """LoRA's keys, as in the paper."""

    rank: Annotated[int, Ge(1)] = 16
    """Rank r of the update."""
    alpha: Annotated[float, Gt(0)] = 32
    """Scale: the update counts alpha/rank."""
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Dropout before A."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the matrices (`q_proj`, `v_proj`, …), or `all-linear`."""
    init_from: str | None = None
    """An adapter to begin from: a run that trained one, or its folder; recorded as an absolute path."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """The rank must be below the model's width, there must be a target, and an adapter to begin from must fit."""
    yield from sizes(config, spec)
    yield from begins_alike(config, use_rslora=False, use_dora=False)


def sizes(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """Faults of rank and targets."""
    if not config.targets:
        yield Fault(
            key="peft.targets",
            value="[]",
            problem="LoRA needs at least one target",
            allowed="names of linear layers, or all-linear",
            fix="peft.targets=[all-linear]",
        )
    shape = spec.model.shape
    if shape is not None and config.rank > shape.hidden_size:
        yield Fault(
            key="peft.rank",
            value=str(config.rank),
            problem=f"the rank is above the model's width {shape.hidden_size}: no low-rank update any more",
            allowed=f"1 to {shape.hidden_size}",
            fix="peft.rank=16",
        )


def begins_alike(config: Config, **variant: bool) -> Iterator[Fault]:
    """The adapter of `init_from` has this rank, scale, form and these targets.

    Args:
        config: what is to be trained.
        variant: `use_rslora` and `use_dora`, as peft calls them.
    """
    if config.init_from is None:
        return
    try:
        path = Path(config.init_from) / "adapter_config.json"
        theirs: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        yield _other(config.init_from, "its adapter_config.json can't be read", "peft.init_from=null")
        return
    if theirs.get("peft_type") != "LORA":
        yield _other(config.init_from, f"is no LoRA but {theirs.get('peft_type')}", "peft.init_from=null")
        return
    if any(bool(theirs.get(name)) != wanted for name, wanted in variant.items()):
        form = "dora" if theirs.get("use_dora") else "rslora" if theirs.get("use_rslora") else "lora"
        yield _other(config.init_from, f"was trained with peft={form}", f"peft={form}")
    for key, mine, other in (
        ("rank", config.rank, theirs.get("r")), ("alpha", config.alpha, theirs.get("lora_alpha")),
    ):  # fmt: skip
        if isinstance(other, int | float) and not math.isclose(mine, other):
            yield _other(
                config.init_from, f"has {key} {other:g}, and peft.{key} is {mine:g}", f"peft.{key}={other:g}"
            )
    targets = theirs.get("target_modules")
    if isinstance(targets, list) and config.targets != ("all-linear",):
        asked, there = ({name.rpartition(".")[2] for name in each} for each in (config.targets, targets))
        if asked != there:
            wanted = f"peft.targets=[{','.join(sorted(there))}]"
            yield _other(config.init_from, f"is of {', '.join(sorted(there))}", wanted)


def _other(adapter: str, problem: str, fix: str) -> Fault:
    return Fault(
        key="peft.init_from",
        value=adapter,
        problem=problem,
        allowed="an adapter of the same method, rank, alpha and targets",
        fix=fix,
    )


def memory(config: Config, matrix: Matrix) -> Beside:
    """A and B beside a target; B's input, A's result, is kept for the backward pass."""
    linear = matrix.role == "block"
    if not linear or not (config.targets == ("all-linear",) or matrix.name in config.targets):
        return Beside()
    dropped = matrix.columns if config.dropout else 0
    return Beside(
        parameters=config.rank * (matrix.rows + matrix.columns),
        kept=config.rank + dropped,
        rank=config.rank,
        dropped=config.dropout > 0,
    )


def apply(config: Config, model: nn.Module) -> nn.Module:
    """The model as peft's PeftModel: base frozen, adapters trainable."""
    return inject(config, model)


def inject(
    config: Config, model: nn.Module, *, use_rslora: bool = False, use_dora: bool = False
) -> nn.Module:
    """The model under a variant of LoRA.

    Args:
        config: its keys.
        model: whole; its linear layers are replaced in place.
        use_rslora: the update counts alpha/√rank.
        use_dora: it is one of the direction, beside trained lengths.

    Raises:
        HpcdlError: the adapter to begin from is of another model, or torn.
    """
    import warnings

    from peft import LoraConfig, get_peft_model

    from hpcdl.distributed.held import refuse_merging

    targets = config.targets[0] if config.targets == ("all-linear",) else list(config.targets)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft divides by the rank: a float is fine
        lora_dropout=config.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
        use_rslora=use_rslora,
        use_dora=use_dora,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5 by an old name
        made: nn.Module = get_peft_model(model, lora)
    refuse_merging(made)
    if config.init_from is not None:
        begin_from(made, Path(config.init_from))
    return made


def begin_from(model: nn.Module, folder: Path) -> None:
    """Sets the adapter's weights to another adapter's.

    Raises:
        HpcdlError: a tensor is missing, too many or of another shape, or the file is torn.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    from hpcdl.distributed.shards import header

    pieces = header(folder / "adapter_model.safetensors")
    mine = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in mine.items()}
    theirs = {name: piece.shape for name, piece in pieces.items()}
    for name in [*shapes, *theirs]:
        if shapes.get(name) != theirs.get(name):
            raise HpcdlError(
                f"peft.init_from={folder}: {name} is {theirs.get(name, 'not')} there, and"
                f" {shapes.get(name, 'not')} here: it is of another model, or other peft.targets"
            )
    set_peft_model_state_dict(model, {name: piece.read() for name, piece in pieces.items()})
