"""Reading spec.yaml on a compute node: standard library and yaml only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcdl import compress, parallel, tasks
from hpcdl.compress import offload, prune, quant
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import from_plain, load_yaml


def read_spec(path: Path) -> ExperimentSpec:
    """The experiment that `path` holds; it was validated before it was written."""
    return spec_of(load_yaml(path))


def spec_of(plain: Mapping[str, Any]) -> ExperimentSpec:
    """The experiment that spec.yaml's content says."""
    return from_plain(
        ExperimentSpec,
        plain,
        {
            "parallel": parallel.get(plain["parallel"]["name"]).Config,
            "peft": compress.get(plain["peft"]["name"]).Config,
            "quant": quant.get(plain["quant"]["scheme"]).Config,
            "prune": prune.get(plain["prune"]["name"]).Config,
            "offload": offload.get(plain["offload"]["name"]).Config,
            "task": tasks.get(plain["task"]["name"]).Config,
        },
    )
