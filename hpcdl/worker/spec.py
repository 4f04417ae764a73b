"""Reading spec.yaml on a compute node: standard library and yaml only."""

from __future__ import annotations

from pathlib import Path

from hpcdl import compress, parallel, tasks
from hpcdl.compress import offload, prune, quant
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import from_plain, load_yaml


def read_spec(path: Path) -> ExperimentSpec:
    """The experiment that `path` holds; it was validated before it was written."""
    plain = load_yaml(path)
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
