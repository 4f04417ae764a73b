"""What a config leaves to be looked up on the login node: absolute paths, a model's shape, a checkpoint.

Paths are made absolute, so that the run id and the job don't depend on where it was launched from.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from pathlib import Path
from typing import Any

from hpcdl import compress, tasks
from hpcdl.errors import Fault, nearest_name
from hpcdl.experiment import containers, holding, places, resuming
from hpcdl.spec import DataSpec, ModelShape, ModelSpec


def resolve(parts: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """The sections with everything looked up, and the faults of what isn't there."""
    parts, faults = dict(parts), []
    if "model" in parts:
        parts["model"], found = _model(parts["model"])
        faults += found
    if "model" in parts and "quant" in parts:
        parts["quant"], found = holding.adopt(parts["model"], parts["quant"])
        faults += found
    if "data" in parts:
        parts["data"], found = _data(parts["data"])
        faults += found
    if "cluster" in parts:
        parts["cluster"], found = containers.resolve(parts["cluster"])
        faults += found
    if "trainer" in parts and "runs_dir" in parts:
        folder = Path(absolute(parts["runs_dir"]))
        parts["trainer"], found = resuming.resolve(parts["trainer"], folder)
        faults += found
        for section, folder_of_files in (("peft", compress), ("task", tasks)):
            if section in parts:
                module = folder_of_files.get(parts[section].name)
                parts[section], found = places.resolve(section, parts[section], module, folder)
                faults += found
    return parts, faults


def absolute(path: str) -> str:
    """`path` as seen from anywhere; `~` is the home directory."""
    # Not resolve(): a link may be there so that its target can change. abspath takes `..` away, too.
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111


def _model(model: ModelSpec) -> tuple[ModelSpec, list[Fault]]:
    if model.path is None:
        # The shape in a model's file is that of its package; weights from the hub may be anything else.
        other = model.hub_id is not None and model.package is not None
        return (dataclasses.replace(model, shape=None) if other else model), []
    folder = Path(absolute(model.path))
    config = folder / "config.json"
    try:
        plain = json.loads(config.read_text(encoding="utf-8"))
    except OSError:
        return model, [_no_model(model.path, folder)]
    except ValueError:
        problem = f"{config} is not JSON"
        return model, [Fault(key="model.path", value=model.path, problem=problem, fix="copy the model anew")]
    shape = shape_of(plain) if isinstance(plain, dict) else None
    return dataclasses.replace(model, path=str(folder), shape=shape), []


def _no_model(given: str, folder: Path) -> Fault:
    problem = "this folder holds no config.json" if folder.is_dir() else "there is no such folder"
    return Fault(
        key="model.path",
        value=given,
        problem=problem,
        allowed="a folder that transformers' from_pretrained reads",
        nearest=_near_path(folder),
        fix=f"model.path={_near_path(folder) or '/path/of/the/model'}",
    )


def shape_of(config: dict[str, Any]) -> ModelShape | None:
    """The dimensions in a config.json of transformers; None where the model is not Llama-like."""
    rope = config.get("rope_parameters") or {}
    known = {
        "num_key_value_heads": config.get("num_attention_heads"),
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
        **config,
    }
    try:
        values = {f.name: known[f.name] for f in dataclasses.fields(ModelShape) if f.name in known}
        scaling = values.get("rope_scaling")
        if scaling:
            values["rope_scaling"] = {k: v for k, v in scaling.items() if isinstance(v, float | int | str)}
        return ModelShape(**values)
    except (TypeError, AttributeError):
        return None


def _data(data: DataSpec) -> tuple[DataSpec, list[Fault]]:
    if not data.paths and data.dataset is None:
        return data, []
    faults: list[Fault] = []
    for index, given in enumerate(data.paths):
        if not glob.glob(absolute(given), recursive=True):  # noqa: PTH207 (Path.glob takes no absolute ones)
            faults.append(_no_file(f"data.paths.{index}", given))
    dataset = data.dataset
    if dataset is not None and Path(absolute(dataset)).is_dir():
        dataset = absolute(dataset)
    paths = tuple(absolute(path) for path in data.paths)
    return dataclasses.replace(data, paths=paths, dataset=dataset), faults


def _no_file(key: str, given: str) -> Fault:
    near = _near_path(Path(absolute(given)))
    return Fault(
        key=key,
        value=given,
        problem="no file is called so, or matches it",
        allowed="files or globs; relative ones count from the folder you launch in",
        nearest=near,
        fix=f"'data.paths=[{near or '/path/of/the/file'}]'",
    )


def _near_path(path: Path) -> str:
    """What lies beside the missing path and is spelled nearly so."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    near = nearest_name(path.name, names)
    return str(path.parent / near) if near else ""
