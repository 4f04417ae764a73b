"""Keys that name a model, an adapter or a run: from what a user types to one absolute place.

A method's or a task's file says which of its keys do, in `PLACES`: `{"teacher": "model"}`. What is recorded

- for an `adapter`: the absolute path of a folder with adapter_config.json;
- for a `model`: such a folder, one with config.json, `package:NAME`, or an id of the hub;
- for a `run`: the absolute path of its directory;
- for `code`: the name of a file of hpcdl's, or the absolute path of a .py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcdl.errors import Fault, nearest_name
from hpcdl.spec.options import model_options

ADAPTER, MODEL = "adapter_config.json", "config.json"
ALLOWED = {
    "adapter": "a folder with adapter_config.json, or a run that trained an adapter",
    "model": "a folder that from_pretrained reads, an adapter's folder, a run, a file of conf/model, an id of the hub",
}


def resolve(section: str, spec: Any, module: Any, runs_dir: Path) -> tuple[Any, list[Fault]]:
    """The section with every place absolute.

    Args:
        section: its key in the config.
        spec: the section.
        module: the file of the method or task, which may have `PLACES`.
        runs_dir: the folder of all runs, absolute.
    """
    faults: list[Fault] = []
    for name, kind in getattr(module, "PLACES", {}).items():
        given = getattr(spec, name)
        if given is None:
            continue
        place = PLACE[kind](f"{section}.{name}", given, runs_dir)
        if isinstance(place, Fault):
            faults.append(place)
        else:
            spec = dataclasses.replace(spec, **{name: place})
    return spec, faults


def adapter(key: str, given: str, runs_dir: Path) -> str | Fault:
    """An adapter's folder: itself, or what a run has left."""
    allowed = ALLOWED["adapter"]
    folder = run_folder(key, given, runs_dir, allowed)
    if isinstance(folder, Fault):
        return folder
    for place in (folder, folder / "adapter"):
        if (place / ADAPTER).is_file():
            return str(place)
    return _nothing_in(key, given, folder, "adapter", allowed)


def model(key: str, given: str, runs_dir: Path) -> str | Fault:
    """A model's or an adapter's folder, a package or an id of the hub."""
    allowed, options = ALLOWED["model"], model_options()
    if given in options:
        return _option(key, given, allowed)
    if given.startswith("package:"):
        return given
    folder = run_folder(key, given, runs_dir, allowed)
    if isinstance(folder, Fault):
        first, _, rest = given.partition("/")
        # organisation/name; where the first is a folder here, the path below it is misspelt
        if rest and "/" not in rest and first not in ("", ".", "..", "~") and not os.path.isdir(first):  # noqa: PTH112
            return given
        return dataclasses.replace(folder, nearest=folder.nearest or nearest_name(given, options))
    for place in (folder, folder / "model", folder / "adapter"):
        if (place / MODEL).is_file() or (place / ADAPTER).is_file():
            return str(place)
    return _nothing_in(key, given, folder, "model", allowed)


def code(key: str, given: str, runs_dir: Path) -> str | Fault:
    """A file of yours, where it is a path; else a name, which the task looks up."""
    if not given.endswith(".py"):
        return given
    path = Path(os.path.abspath(os.path.expanduser(given)))  # noqa: PTH100, PTH111
    if path.is_file():
        return str(path)
    return _no_folder(key, given, path, "a name, or the path of a .py", "file")


def run(key: str, given: str, runs_dir: Path) -> str | Fault:
    """A run's directory; the run itself may be still to come."""
    allowed = "a run's directory, its id or the beginning of it, an experiment's name with one run, latest"
    folder = run_folder(key, given, runs_dir, allowed)
    if isinstance(folder, Fault) or (folder / "spec.yaml").is_file():
        return folder if isinstance(folder, Fault) else str(folder)
    return _nothing_in(key, given, folder, "run", allowed)


PLACE: dict[str, Callable[[str, str, Path], str | Fault]] = {
    "adapter": adapter,
    "code": code,
    "model": model,
    "run": run,
}


def _option(key: str, given: str, allowed: str) -> str | Fault:
    option = model_options()[given]
    for name, prefix in (("path", ""), ("hub_id", ""), ("package", "package:")):
        value = option.get(name)
        if value and "${" not in str(value):
            return f"{prefix}{value}"
    problem = "this file of conf/model has no weights of its own: they are random, or left to you"
    return Fault(key=key, value=given, problem=problem, allowed=allowed, fix=f"{key}=smollm2_135m")


def _nothing_in(key: str, given: str, folder: Path, kind: str, allowed: str) -> Fault:
    problem = f"{folder} holds no {kind}"
    if (folder / "spec.yaml").is_file():
        problem += " (hpcdl status says how the run ended)"
    return Fault(key=key, value=given, problem=problem, allowed=allowed, fix=f"{key}=/path/of/the/{kind}")


def run_folder(key: str, given: str, runs_dir: Path, allowed: str) -> Path | Fault:
    """An existing folder, or the run that is called so.

    Args:
        key: the dotted key that it was given to.
        given: a folder, a run id or its beginning, an experiment's name with one run, `latest`.
        runs_dir: the folder of all runs, absolute.
        allowed: what the key takes, in words.
    """
    path = Path(os.path.abspath(os.path.expanduser(given)))  # noqa: PTH100, PTH111
    if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises where the name is too long to be one)
        return path.resolve()  # a link like runs/latest will be this very run's in a moment
    if os.sep in given:
        return _no_folder(key, given, path, allowed)
    if given == "latest":
        latest = (runs_dir / "latest").resolve()
        return latest if latest.is_dir() else _not_found(key, given, runs_dir, [], allowed)
    runs = sorted(path.parent for path in runs_dir.glob("[!.]*/*/spec.yaml"))
    exact = [run for run in runs if run.name == given] or [run for run in runs if run.parent.name == given]
    fitting = exact or [run for run in runs if given and run.name.startswith(given)]
    if len(fitting) == 1:
        return fitting[0]
    return _several(key, given, fitting) if fitting else _not_found(key, given, runs_dir, runs, allowed)


def _no_folder(key: str, given: str, path: Path, allowed: str, kind: str = "folder") -> Fault:
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        beside = []
    near = nearest_name(path.name, beside)
    fix = f"{key}={path.parent / near}" if near else f"{key}=null"
    return Fault(
        key=key, value=given, problem=f"there is no such {kind}", allowed=allowed, nearest=near, fix=fix
    )


def _not_found(key: str, given: str, runs_dir: Path, runs: list[Path], allowed: str) -> Fault:
    near = nearest_name(given, {run.name for run in runs} | {run.parent.name for run in runs})
    return Fault(
        key=key,
        value=given,
        problem=f"no run in {runs_dir} is called so",
        allowed=allowed,
        nearest=near,
        fix=f"{key}={near}" if near else f"{key}=null (hpcdl status lists the runs)",
    )


def _several(key: str, given: str, fitting: list[Path]) -> Fault:
    shown = ", ".join(run.name for run in fitting[:5]) + (", …" if len(fitting) > 5 else "")
    return Fault(
        key=key,
        value=given,
        problem=f"{len(fitting)} runs are called so, or begin so",
        allowed=shown,
        fix=f"{key}={fitting[-1].name}",
    )
