"""Spec → run id: the same experiment has the same id, wherever and however often it is launched."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import to_plain

LEFT_OUT = {
    "cluster": (
        *(
            "partition",
            "account",
            "qos",
            "constraint",
            "exclude",
            "reservation",
            "time_min",
            "mem_gb",
            "gpu",
            "gpu_mem_gb",
            "signal",
        ),
        *("setup", "teardown", "extra", "srun_args", "python", "partitions"),
        *("login_host", "login_dir", "login_python"),
        *("max_restarts", "max_requeues", "requeue", "array_parallelism", "max_array_size"),
        *("min_nodes", "exclude_failed_nodes", "lost_after_s", "kubernetes"),
        *("container", "container_image", "container_mounts", "container_python", "container_args"),
    ),
    "offload": ("folder",),
    "trainer": ("keep_best",),
}
"""What changes neither the result nor what is measured. kind, nodes and processes stay in, so that a sweep
over them makes different runs."""

SECTIONS_LEFT_OUT = ("code", "tracker", "monitor", "preflight")


def digest(spec: ExperimentSpec) -> str:
    """The run id: 12 hexadecimal digits of the SHA-256 of the experiment as canonical JSON."""
    plain = identifying(to_plain(spec))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def identifying(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What tells an experiment from another one: its plain spec less what changes no result."""
    kept = {name: value for name, value in plain.items() if name not in SECTIONS_LEFT_OUT}
    for section, keys in LEFT_OUT.items():
        if section in kept:
            kept[section] = {key: value for key, value in kept[section].items() if key not in keys}
    return kept
