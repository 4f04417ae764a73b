"""`hpcdl export`, and what is done with its files: `hpcdl generate EXPORT`, `hpcdl bench-edge EXPORT`.

An export is opened by its own runtime, in a process that knows nothing of torch or configs (hpcdl.export.runtimes).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcdl.errors import UsageError
from hpcdl.experiment.resolve import absolute
from hpcdl.export import CARD, formats, runtimes
from hpcdl.launch import tools
from hpcdl.runs import query
from hpcdl.spec.plain import load_yaml

EPILOG = """MODEL is a run, a folder that from_pretrained reads, an adapter's folder, or a file of conf/model
(smollm2_135m). Overrides are those of hpcdl launch; without any, a run's export is judged on the run's own
held-out text. Exit codes: 0 written; 1 refused by the quality gate; 2 called wrongly."""
CONTEXT = 1024
"""Tokens that an export is opened for, where its user says nothing."""


def main(argv: Sequence[str]) -> int:
    """Writes an export, or judges one that is there; returns the exit code.

    Raises:
        UsageError: it was called wrongly.
        ConfigError: the overrides have faults.
    """
    options = _parser().parse_intermixed_args(argv)
    form, quant = formats.chosen(options.to, options.quant)
    if options.check is not None and (options.out or options.accept_loss or options.embedding_quant):
        raise UsageError(
            "--check judges an export that is there: --out, --accept-loss, --embedding-quant write one"
        )
    model = tools.find_model(options.model)
    run = run_of(options.model)
    overrides = [
        *tools.UNTRAINED,
        *model.overrides,
        *(() if run is None else own_text(run)),
        *options.overrides,
    ]
    asked: dict[str, Any] = {
        "to": options.to, "quant": quant, "accept_loss": options.accept_loss, "check": None,
        "embedding_quant": options.embedding_quant,
    }  # fmt: skip
    if options.check is not None:
        folder = Path(absolute(options.check))
        folder = folder.parent if folder.is_file() else folder
        if not (folder / form.FILE).is_file():
            raise UsageError(f"--check {options.check}: there is no {form.FILE} in {folder}")
        asked["check"], out = str(folder), folder
    else:
        out = _out(options, run, f"{options.to}-{quant}")
    chosen = tools.chosen_adapters(model, options.adapter)
    return tools.start("export", overrides, options=asked, adapters=chosen, out=out, as_json=options.json)


def _parser() -> argparse.ArgumentParser:
    kinds = "; ".join(f"{name}: {', '.join(formats.get(name).QUANTS)}" for name in formats.names())
    parser = argparse.ArgumentParser(
        prog="hpcdl export",
        description="A model as a file for another runtime, which proves it on held-out text before it gets its name.",
        epilog=EPILOG,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("overrides", nargs="*", metavar="GROUP=OPTION|KEY=VALUE")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(formats.names()))
    parser.add_argument(
        "--quant", metavar="KIND", help=f"of its numbers; the first is the usual one. {kinds}"
    )
    parser.add_argument(
        "--embedding-quant",
        metavar="KIND",
        help="of a GGUF file's embedding and head (q8_0 where the rest has fewer)",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write (of a run: its exports/FORMAT-KIND)")
    parser.add_argument("--force", action="store_true", help="write over what is there")
    parser.add_argument(
        "--accept-loss", action="store_true", help="keep it though the gate refuses it; its card says so"
    )
    parser.add_argument("--check", metavar="EXPORT", help="judge an export that is there, and write nothing")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="RUN|DIR[=WEIGHT]",
        help="merged into the model first",
    )
    parser.add_argument("--json", action="store_true", help="for scripts")
    return parser


def _out(options: argparse.Namespace, run: Path | None, name: str) -> Path:
    if options.out is None and run is None:
        raise UsageError(f"--out DIR: {options.model} is no run, in whose folder the export could lie")
    out = Path(absolute(options.out)) if options.out else run / "exports" / name  # type: ignore[operator]
    if out.exists() and not options.force:
        raise UsageError(f"{out} is there already: another --out, or --force to write over it")
    return out


def run_of(given: str) -> Path | None:
    """The directory of the run that MODEL names, or whose model or adapter it is; None where there is none."""
    folder = Path(absolute(given))
    if (folder.parent / "spec.yaml").is_file() and folder.name in ("model", "adapter"):
        return folder.parent
    if folder.is_dir() and not (folder / "spec.yaml").is_file():
        return None
    try:
        return query.find_one(given, query.runs_dir()).path
    except UsageError:
        return None


def own_text(run: Path) -> tuple[str, ...]:
    """Overrides that have the run's own held-out rows."""
    plain = load_yaml(run / "spec.yaml")
    data, trainer = plain["data"], plain["trainer"]
    keys = {f"data.{key}": value for key, value in data.items() if key not in ("kind", "workers", "prefetch")}
    keys |= {"seed": plain["seed"], "trainer.eval_samples": trainer["eval_samples"]}
    task = plain["task"]["name"] if plain["task"]["name"] in ("pretrain", "sft") else "pretrain"
    return (
        f"data={data['kind']}",
        f"task={task}",
        *(f"{key}={tools.literal(value)}" for key, value in keys.items()),
    )


# --- exports that are there -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A file and what opens it."""

    file: Path
    runtime: str
    card: Mapping[str, Any]
    """export.json; empty where none lies beside it."""


def find(given: str) -> Export | None:
    """The export that a user means: its folder, or the file in it; None where it is none."""
    path = Path(absolute(given))
    for name in formats.names():
        form = formats.get(name)
        suffix = Path(form.FILE).suffix
        if path.is_file() and path.suffix == suffix:
            return Export(file=path, runtime=form.RUNTIME, card=_card(path.parent))
        if (path / CARD).is_file() and (path / form.FILE).is_file() and _card(path)["format"] == name:
            return Export(file=path / form.FILE, runtime=form.RUNTIME, card=_card(path))
    return None


def _card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def generate(export: Export, options: argparse.Namespace) -> int:
    """How an export goes on from a text, in its own runtime."""
    from hpcdl.runs.words import size

    if options.overrides or options.adapter:
        raise UsageError("an export is as it is: no overrides, no --adapter")
    found = runtimes.ask(
        export.runtime, "generate", export.file, threads=len(os.sched_getaffinity(0)),
        context=max(CONTEXT, options.tokens * 2), prompt=options.prompt, chat=options.chat, tokens=options.tokens,
        temperature=options.temperature, top_p=options.top_p, seed=options.seed,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"prompt": options.prompt, **found}, indent=1, ensure_ascii=False))
        return 0
    speed = found["tokens_per_s"]
    facts = [
        f"{found['tokens']} tokens",
        *([f"{speed:.1f} tokens/s"] if speed else []),
        f"the first after {found['first_token_s']:.2f} s",
        f"loaded in {found['load_s']:.1f} s",
        f"peak memory {size(found['peak_rss_bytes'])}",
        found["about"],
    ]
    print(f"{options.prompt}▸{found['text']}\n\n{', '.join(facts)}")
    return 0


def bench(given: str, threads: str, *, prompt: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Speed and peak memory of an export on each number of threads, each in a process of its own.

    A process may run on as many cores as it has threads, and on no other: what stands for a small device.

    Raises:
        UsageError: it is no export, or there are too few cores.
        HpcdlError: its runtime isn't installed, or can't run it.
    """
    export = find(given)
    if export is None:
        raise UsageError(
            f"{given} is no export: a folder that hpcdl export wrote, or a file model.gguf, model.onnx, …"
        )
    cores = sorted(os.sched_getaffinity(0))
    rows, about = [], ""
    for count in _counts(threads, len(cores)):
        found = runtimes.ask(
            export.runtime, "bench", export.file, threads=count, cores=cores[:count], context=prompt + tokens + 8,
            prompt_tokens=prompt, tokens=tokens, repeats=repeats,
        )  # fmt: skip
        about = found.pop("about")
        rows.append({"threads": count, "cores": cores[:count], **found})
    size = sum(path.stat().st_size for path in _files(export))
    told = {key: export.card.get(key) for key in ("name", "format", "quant")}
    return {
        "file": str(export.file), "bytes": size, "about": about, **told,
        "prompt_tokens": prompt, "tokens": tokens, "repeats": repeats, "rows": rows,
    }  # fmt: skip


def _counts(text: str, most: int) -> list[int]:
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = [0]
    if not all(1 <= count <= most for count in counts):
        raise UsageError(
            f"--threads {text}: numbers from 1 to {most}, with commas (this process may use {most} cores)"
        )
    return counts


def _files(export: Export) -> list[Path]:
    """What a device must hold: of a folder with a card all but the card, else the file alone."""
    if not export.card:
        return [export.file]
    return [path for path in export.file.parent.iterdir() if path.name not in (CARD, "card.md")]
