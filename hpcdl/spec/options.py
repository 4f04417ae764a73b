"""hpcdl's own config files: where they lie, and the models among them as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hpcdl.spec.plain import load_yaml


@cache
def config_folder() -> Path | None:
    """The checkout's `conf/`, or the copy inside the installed package; None where neither is there."""
    package = Path(__file__).resolve().parent.parent
    folders = (package.parent / "conf", package / "conf")
    return next((folder for folder in folders if (folder / "config.yaml").is_file()), None)


@cache
def model_options() -> Mapping[str, Mapping[str, Any]]:
    """The files of conf/model by name, as they are written: no interpolation is resolved."""
    folder = config_folder()
    return {} if folder is None else {p.stem: load_yaml(p) for p in sorted(folder.glob("model/*.yaml"))}
