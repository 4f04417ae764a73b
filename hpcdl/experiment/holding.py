"""A model whose files hold it in few bits already: `quant` is what they say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hpcdl.compress import quant
from hpcdl.errors import Fault
from hpcdl.spec import ModelSpec, QuantSpec
from hpcdl.spec.model import QUANTIZED


def adopt(model: ModelSpec, chosen: QuantSpec) -> tuple[QuantSpec, list[Fault]]:
    """The scheme that a model's folder was written under (`hpcdl quantize`); what was chosen where it says nothing.

    Args:
        model: with its path looked up.
        chosen: the section `quant`; `none` takes what the folder says.
    """
    if model.path is None:
        return chosen, []
    file = Path(model.path) / "config.json"
    try:
        told: Any = json.loads(file.read_text(encoding="utf-8")).get(QUANTIZED)
    except (OSError, ValueError, AttributeError):
        return chosen, []  # another rule says so
    if told is None:
        return chosen, []
    try:
        config = quant.get(told["scheme"]).Config(**told)
    except (KeyError, TypeError):
        problem = f"{QUANTIZED} in its config.json is none that this version of hpcdl knows"
        return chosen, [
            Fault(key="model.path", value=model.path, problem=problem, fix="hpcdl quantize it anew")
        ]
    if chosen.scheme == "none" or _the_same(chosen, config):
        return config, []
    fault = Fault(
        key="quant.scheme",
        value=chosen.scheme,
        problem=f"{model.path} holds its weights as {config.scheme} already, and what was rounded once is not"
        " there to be rounded otherwise",
        allowed="quant=none (then the folder says it), or the unquantized model",
        nearest="none",
        fix="quant=none",
    )
    return chosen, [fault]


def _the_same(chosen: QuantSpec, config: QuantSpec) -> bool:
    if getattr(chosen, "backend", None) == "auto":
        chosen = dataclasses.replace(chosen, backend=config.backend)  # type: ignore[call-arg,attr-defined]
    return chosen == config
