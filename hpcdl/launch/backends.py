"""Backends by name: the module hpcdl/launch/<kind>.py with a module-level BACKEND."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from hpcdl.launch.base import Backend


def get(kind: str) -> Backend:
    """The backend for a cluster's `kind`."""
    return cast(Backend, import_module(f"hpcdl.launch.{kind}").BACKEND)
