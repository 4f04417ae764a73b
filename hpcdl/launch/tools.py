"""Commands that work on a model, not on a run: `hpcdl eval MODEL …`, and others of hpcdl/worker/tools.

They are configured as experiments are, composed and validated here, and done by a process of the compute side:
what it needs of torch is not this process's business.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl.errors import Fault, UsageError, nearest_name
from hpcdl.experiment import places
from hpcdl.experiment.resolve import absolute
from hpcdl.launch import secret_file, sweep
from hpcdl.launch.compose import Composer, config_folder
from hpcdl.runs import query
from hpcdl.runs.files import write_atomic
from hpcdl.spec.model import BYTE_TOKENIZER
from hpcdl.spec.plain import dump_yaml, load_yaml, to_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of one tool only: `--name VALUE`, handed to it under its name."""

    name: str
    """Without the dashes, underscores between words."""
    help: str
    """For `--help`."""
    kind: type = str
    """Of its value; bool: it has none, and is True where it is given."""
    default: Any = None
    """None: the tool is told that it wasn't given."""
    least: float | None = None
    """Lowest value that makes sense, for numbers."""
    most: float | None = None
    """Highest."""
    required: bool = False
    """Whether the tool can't do without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One such command."""

    summary: str
    """What it does, for `--help`."""
    base: tuple[str, ...] = ()
    """Overrides that come before the user's."""
    writes: bool = False
    """Whether it makes a folder: `--out` is needed."""
    as_trained: bool = False
    """Whether a run's adapter goes on its base held as the run held it; else as the overrides say."""
    options: tuple[Option, ...] = ()
    """What it is asked besides."""


UNTRAINED = ("data=pydoc", "peft=lora")
"""A frozen base, which may be held in few bits; these tools make no adapter of their own."""
TOOLS = {
    "eval": Tool(summary="held-out perplexity, size, peak memory and tokens/s of a model", base=UNTRAINED),
    "generate": Tool(
        summary="how a model goes on from a text; a run's adapter on its base, held as the run held it",
        base=UNTRAINED,
        as_trained=True,
        options=(
            Option(name="prompt", help="the text that it goes on from", required=True),
            Option(
                name="chat",
                help="the text is a question: put it into the model's chat template",
                kind=bool,
                default=False,
            ),
            Option(
                name="tokens", help="how many tokens it writes at most (40)", kind=int, default=40, least=1
            ),
            Option(
                name="temperature",
                help="0: the likeliest token each time (the default); above, it draws",
                kind=float,
                default=0.0,
                least=0.0,
            ),
            Option(
                name="top_p",
                help="draw among the likeliest tokens that make up so much of the probability (1)",
                kind=float,
                default=1.0,
                least=0.0,
                most=1.0,
            ),
            Option(name="seed", help="of what is drawn (0)", kind=int, default=0, least=0),
        ),
    ),
    "quantize": Tool(
        summary="a model in few bits (quant=int4, nf4, …), in a folder that is loaded again",
        base=(*UNTRAINED, "trainer.precision=bf16"),
        writes=True,
    ),
    "merge": Tool(
        summary="adapters into their 16-bit base, a tensor at a time; checked by equal logits",
        base=UNTRAINED,
        writes=True,
    ),
    "prune": Tool(
        summary="a model with weights taken out: prune=magnitude, wanda, sparsegpt or obd",
        base=("data=pydoc",),
        writes=True,
    ),
}
"""By name: a file of hpcdl/worker/tools each."""


def main(verb: str, argv: Sequence[str]) -> int:
    """Runs the tool; returns its exit code.

    Raises:
        UsageError: it was called wrongly.
        ConfigError: the config has faults.
    """
    if verb == "export":
        from hpcdl.launch import exporting

        return exporting.main(argv)
    tool = TOOLS[verb]
    options = _parser(verb, tool).parse_intermixed_args(argv)
    if verb == "generate":
        from hpcdl.launch import exporting

        if (export := exporting.find(options.model)) is not None:
            return exporting.generate(export, options)
    model = find_model(options.model)
    trained = held_as_trained(model.adapter) if tool.as_trained and model.adapter else ()
    overrides = (*tool.base, *model.overrides, *trained, *options.overrides)
    out = None
    if tool.writes:
        out = Path(absolute(options.out))
        if out.exists() and not options.force:
            raise UsageError(f"--out {out} is there already: another folder, or --force to write over it")
    own = {each.name: getattr(options, each.name) for each in tool.options}
    chosen = chosen_adapters(model, options.adapter)
    return start(verb, overrides, options=own, adapters=chosen, out=out, as_json=options.json)


def start(
    verb: str,
    overrides: Sequence[str],
    *,
    options: Mapping[str, Any],
    adapters: Sequence[tuple[Path, float]],
    out: Path | None,
    as_json: bool,
) -> int:
    """Composes and validates, and has a process of the compute side do it; returns its exit code.

    Raises:
        ConfigError: the config has faults.
    """
    asked = sweep.read(Composer(), overrides, multirun=False)
    flags = ["--json"] * as_json
    if options:
        flags += ["--options", json.dumps(options)]
    for path, weight in adapters:
        flags += ["--adapter", f"{path}={weight!r}"]
    if out is not None:
        flags += ["--out", str(out)]
    secret_file.load(os.environ)  # as a job's agent does: a gated model wants a token
    with tempfile.TemporaryDirectory(prefix="hpcdl-") as folder:
        spec = Path(folder) / "spec.yaml"
        write_atomic(spec, dump_yaml(to_plain(asked.points[0].spec)))
        command = [sys.executable, "-m", "hpcdl.worker.tools", verb, str(spec), *flags]
        return subprocess.run(command, check=False).returncode


def _parser(verb: str, tool: Tool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"hpcdl {verb}",
        description=tool.summary,
        epilog="MODEL is a folder that from_pretrained reads, an adapter's folder, a run, or a file of"
        " conf/model (smollm2_135m). Overrides are those of hpcdl launch: data=pydoc, quant=nf4, …",
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("overrides", nargs="*", metavar="GROUP=OPTION|KEY=VALUE")
    parser.add_argument("--json", action="store_true", help="for scripts")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="RUN|DIR[=WEIGHT]",
        help="an adapter that goes on the model; several act together, each update times its weight (1)",
    )
    for each in tool.options:
        if each.kind is bool:
            parser.add_argument(f"--{each.name}", action="store_true", help=each.help)
            continue
        parser.add_argument(
            f"--{each.name.replace('_', '-')}", dest=each.name, required=each.required, default=each.default,
            type=_checked(each), metavar=each.kind.__name__.upper(), help=each.help,
        )  # fmt: skip
    if tool.writes:
        parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
        parser.add_argument("--force", action="store_true", help="write over what is there")
    return parser


def _checked(option: Option) -> Callable[[str], Any]:
    """Reads a value of the option; argparse says what is wrong with it."""

    def read(text: str) -> Any:
        try:
            value = option.kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {option.kind.__name__}") from None
        low, high = option.least, option.most
        if (low is not None and value < low) or (high is not None and value > high):
            allowed = f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {allowed}")
        return value

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What MODEL stands for."""

    overrides: tuple[str, ...]
    adapter: Path | None = None
    """Folder of an adapter that goes on top."""


def chosen_adapters(model: Model, given: Sequence[str]) -> list[tuple[Path, float]]:
    """Folders of the adapters and how much each counts: the model's own first.

    Raises:
        UsageError: one isn't there, or its weight is no number.
    """
    found = [] if model.adapter is None else [(model.adapter, 1.0)]
    for each in given:
        name, separator, number = each.rpartition("=")
        try:
            weight = float(number) if separator else 1.0
        except ValueError:
            name, weight = each, 1.0  # a folder may have such a name
        place = places.adapter("--adapter", name if separator else each, query.runs_dir())
        if isinstance(place, Fault):
            near = f"; nearest: {place.nearest}" if place.nearest else ""
            raise UsageError(f"--adapter {each}: {place.problem}{near} ({place.allowed})")
        found.append((Path(place), weight))
    return found


def find_model(given: str) -> Model:
    """A model from what a user calls it.

    Raises:
        UsageError: nothing is called so.
    """
    names = sorted(path.stem for path in (config_folder() / "model").glob("*.yaml"))
    if given in names:
        return Model(overrides=(f"model={given}",))
    folder = Path(absolute(given))
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        folder = _of_run(given, names)
    if not (folder / "adapter_config.json").is_file():
        return Model(overrides=_at(folder))
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    name = str(config["base_model_name_or_path"])
    if name.count("/") == 1 and not Path(name).is_absolute():  # organisation/name of the hub
        hub = ("model=custom", f"model.hub_id={name}", f"model.name={name.partition('/')[2]}")
        return Model(overrides=hub, adapter=folder)
    base = Path(name)
    if not base.is_dir():
        raise UsageError(f"{folder}: its base {base} is no folder here")
    return Model(overrides=_at(base, folder), adapter=folder)


def held_as_trained(adapter: Path) -> tuple[str, ...]:
    """Overrides that hold the base as the run did that made this adapter; none where no run's spec lies beside."""
    spec = adapter.parent / "spec.yaml"
    if not spec.is_file():
        return ()
    plain = load_yaml(spec)
    keys = {f"quant.{key}": value for key, value in plain["quant"].items() if key != "scheme"}
    keys["trainer.precision"] = plain["trainer"]["precision"]
    return (f"quant={plain['quant']['scheme']}", *(f"{key}={literal(value)}" for key, value in keys.items()))


def literal(value: Any) -> str:
    """As Hydra reads it."""
    if isinstance(value, list):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, str):
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{quoted}'"
    return json.dumps(value)


def _at(folder: Path, adapter: Path | None = None) -> tuple[str, ...]:
    byte = any((beside / BYTE_TOKENIZER).is_file() for beside in (folder, adapter) if beside)
    tokenizer = ("model.tokenizer=byte",) * byte
    return ("model=custom", f"model.path='{folder}'", f"model.name='{folder.name}'", *tokenizer)


def _of_run(given: str, names: Sequence[str]) -> Path:
    """The model or adapter that a run has left."""
    try:
        run = query.find_one(given, query.runs_dir())
    except UsageError as error:
        near = nearest_name(given, names)
        hint = f"; nearest name: {near}" if near else ""
        raise UsageError(
            f"no model is called {given}{hint}\na folder with config.json, a run, or one of {', '.join(names)}"
        ) from error
    for name in ("model", "adapter"):
        if (run.path / name).is_dir():
            return run.path / name
    raise UsageError(f"{run.path} has left no model and no adapter (hpcdl status says why)")
