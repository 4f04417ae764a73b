"""`hpcdl export`: a model as a file for another runtime, which has proved it before it gets its name."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from hpcdl import __version__
from hpcdl.distributed import shards
from hpcdl.distributed.losses import IGNORE
from hpcdl.errors import HpcdlError, RunFailedError
from hpcdl.export import CARD, bytewise, card, compact, formats, gate, runtimes
from hpcdl.export.source import Source, read_json
from hpcdl.foreign import ONLY_WEIGHTS
from hpcdl.runs.files import write_atomic, write_json
from hpcdl.runs.store import now
from hpcdl.spec import ExperimentSpec
from hpcdl.worker import adapters, merging, model, process, quantized
from hpcdl.worker.cache import make_readable
from hpcdl.worker.data.batches import Order, batch
from hpcdl.worker.data.prepare import open_dataset
from hpcdl.worker.tokenizer import ByteTokenizer, Tokenizer
from hpcdl.worker.tools import Request
from hpcdl.worker.tools.merge import base_folder, put_in_place, tokenizer_of

MOST_TARGETS = 16384
"""Target tokens that the gate asks about at most: both sides compute them."""
MOST_LINES = 400
"""Lines of held-out text that are cut into tokens."""
BENCH: dict[str, Any] = {"prompt_tokens": 64, "tokens": 32, "repeats": 2, "context": 256}
"""What the card's speed and memory are measured on."""


def run(request: Request) -> dict[str, Any]:
    """Writes the export beside its name, has its runtime prove it, and renames it.

    Raises:
        HpcdlError: it can't be written, or the gate refuses it: then it is left under the name with `.rejected`.
    """
    spec, asked, out = request.spec, request.options, request.out
    assert out is not None, "the command finds one"
    form, quant = formats.chosen(asked["to"], asked["quant"])
    needed = (*form.NEEDS, *runtimes.PACKAGES[form.RUNTIME])
    formats.refuse_missing(
        tuple(dict.fromkeys(needed)), f"--to {asked['to']} (written, then proved in its runtime)"
    )
    process.set_threads(spec, who := process.from_environment(), process.choose_device(spec, who))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.tmp-", dir=out.parent) as room:
        source, tokenizer, record = whole(request, Path(room) / "source")
        made = Path(asked["check"]) if asked.get("check") else Path(room) / "made"
        details: dict[str, Any] = {}
        if not asked.get("check"):
            made.mkdir()
            print(f"writing {asked['to']} {quant}", file=sys.stderr)
            details = dict(form.write(source, quant, made, asked))
        print(f"proving it in {form.RUNTIME}", file=sys.stderr)
        verdict = gate.judge(
            form, source, made, quant, heldout(spec, source, tokenizer, Path(room)), torch.get_num_threads()
        )
        found = {
            "name": source.name, "format": asked["to"], "quant": quant, "file": form.FILE, "runtime": form.RUNTIME,
            "bytes": weights_bytes(made), "source_bytes": 2 * record.pop("source_parameters"), "details": details,
            **record,
            "licence": licence(source, spec), "data": spec.data.kind, "hpcdl": __version__, "made": now(),
            "gate": {"faults": list(verdict.faults), "accepted_loss": bool(verdict.faults), **verdict.measured},
        }  # fmt: skip
        if asked.get("check"):
            return judged(found, verdict)
        refused = bool(verdict.faults) and not asked["accept_loss"]
        if not refused:
            found["speed"] = speed(form, made)
        found["gate"]["accepted_loss"] = bool(verdict.faults) and not refused
        write_json(made / CARD, found)
        write_atomic(made / "card.md", card.markdown(found))
        make_readable(made)
        if refused:
            rejected = out.with_name(f"{out.name}.rejected")
            shutil.rmtree(rejected, ignore_errors=True)
            made.rename(rejected)
            raise RunFailedError(refusal(verdict, rejected))
        put_in_place(made, out)
    return {"out": str(out / form.FILE), **flat(found)}


def judged(found: dict[str, Any], verdict: gate.Verdict) -> dict[str, Any]:
    """What `--check` says of an export that was there.

    Raises:
        RunFailedError: it is not its source.
    """
    if verdict.faults:
        raise RunFailedError(
            "\n".join(["it is not its source:", *(f"  {fault}" for fault in verdict.faults)])
        )
    return flat(found)


def refusal(verdict: gate.Verdict, rejected: Path) -> str:
    """The gate's words."""
    return "\n".join(
        [
            "the exported file is not good enough for its source, and was refused:",
            *(f"  {fault}" for fault in verdict.faults),
            f"It is left in {rejected} to be looked at. A kind of numbers with more bits, or --accept-loss (its card"
            " will say so).",
        ]
    )


def flat(found: dict[str, Any]) -> dict[str, Any]:
    """What is shown of the card."""
    judged, timed = found["gate"], found.get("speed") or {}
    shown = {
        key: judged.get(key) for key in ("perplexity_before", "perplexity_after", "logits_difference", "kl")
    }
    return {
        "format": found["format"], "quant": found["quant"], "file_bytes": found["bytes"],
        "source_bytes": found["source_bytes"], **shown, "runtime": judged.get("runtime"),
        "peak_rss_bytes": timed.get("peak_rss_bytes"), "tokens_per_s": timed.get("tokens_per_s"),
        "accepted_loss": judged["accepted_loss"], "faults": "; ".join(judged["faults"]) or None,
    }  # fmt: skip


# --- the source -------------------------------------------------------------------------------------------


def whole(request: Request, folder: Path) -> tuple[Source, Tokenizer, dict[str, Any]]:
    """The model in 16 or 32 bits with its adapters merged, and its tokenizer's files, below `folder`.

    Raises:
        HpcdlError: it is quantized, or adapters and base don't fit.
    """
    spec = request.spec
    weights, words = folder / "weights", folder / "tokenizer"
    words.mkdir(parents=True)
    record: dict[str, Any] = {"adapters": {str(path): weight for path, weight in request.adapters}}
    if request.adapters:
        base = base_folder(spec)
        chosen = adapters.named(request.adapters)
        tokenizer = tokenizer_of(spec, chosen, base)
        weights.mkdir()
        print("merging the adapters into their base", file=sys.stderr)
        merging.merge(base, [adapters.Update(each) for each in chosen], weights)
    else:
        place = model.weights_place(spec.model)
        tokenizer = model.tokenizer_for(spec.model, place)
        if place is None:
            whole_model = model.load(replace(spec, quant=_plain(spec)), None)
            whole_model.save_pretrained(weights)
            base = weights
            record["source"] = f"{spec.model.name} (random weights of seed {spec.seed})"
        else:
            weights = base = base_folder(spec)
            if (held := quantized.scheme_of(base)) is not None:
                raise HpcdlError(
                    f"{base} is quantized ({held.scheme}): export the 16-bit model that it was made from"
                )
    record.setdefault("source", str(base))
    record["source_parameters"] = parameters(weights)
    narrow = folder / "narrow"
    narrow.mkdir()
    if (width := compact.narrower(weights, narrow)) is not None:
        print(f"{width[0]} of {width[1]} neurons a block stay: the others give nothing", file=sys.stderr)
        record["neurons"], weights = list(width), narrow
    if isinstance(tokenizer, ByteTokenizer):
        bytewise.write(words)
    else:
        tokenizer.save(words)
    source = Source(
        folder=weights, tokenizer=words, name=spec.model.name, eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id,
        prefix=tokenizer.prefix,
    )  # fmt: skip
    return source, tokenizer, record


def _plain(spec: ExperimentSpec) -> Any:
    from hpcdl.compress.quant import none

    return spec.quant if spec.quant.scheme == "none" else none.Config(scheme="none")


def parameters(folder: Path) -> int:
    """Numbers of a folder's weights."""
    return sum(math.prod(piece.shape) for piece in shards.pieces(folder).values())


def weights_bytes(folder: Path) -> int:
    """Bytes of the files that a device must hold."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.name not in (CARD, "card.md"))


def licence(source: Source, spec: ExperimentSpec) -> str | None:
    """What the weights' own files say: a model card's front matter, or the package's GGUF file."""
    readme = source.folder / "README.md"
    if readme.is_file():
        for line in readme.read_text(encoding="utf-8", errors="replace").splitlines()[:60]:
            if line.startswith("license:"):
                return line.partition(":")[2].strip()
    if spec.model.source == "package":
        from gguf import GGUFReader

        from hpcdl.worker.convert import find_gguf

        field = GGUFReader(find_gguf(str(spec.model.package))).get_field("general.license")
        return None if field is None else str(field.contents())
    told = read_json(source.folder / "config.json").get("license")
    return None if told is None else str(told)


# --- what both sides are asked ----------------------------------------------------------------------------


def heldout(spec: ExperimentSpec, source: Source, tokenizer: Tokenizer, room: Path) -> gate.Heldout:
    """Held-out text, and what the source says about it, in fp32 (bf16 where memory is short)."""
    rows = open_dataset(spec, tokenizer).heldout
    chosen = Order(len(rows), spec.seed).rows(0, min(spec.trainer.eval_samples, len(rows)))
    net = load(source)
    total, targets = 0.0, 0
    sequences: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    kept: list[NDArray[np.float32]] = []
    for row in chosen:
        made = batch(rows, np.array([row]), torch.device("cpu"))
        for tokens, labels in documents(made):
            scores = log_probabilities(net, tokens)
            picked = np.flatnonzero(labels != IGNORE)
            total -= float(scores[picked, labels[picked]].astype(np.float64).sum())
            targets += len(picked)
            sequences.append((tokens, labels))
            want = gate.KEPT - sum(map(len, kept))
            if want:
                kept.append(scores[:want].copy())
        if targets >= MOST_TARGETS:
            break
    gate.write_text(room, sequences)
    np.save(room / gate.SOURCE, np.concatenate(kept))
    texts = [
        line
        for tokens, _ in sequences
        for line in tokenizer.decode(tokens.tolist()).splitlines()
        if line.strip()
    ]
    return gate.Heldout(
        arrays=room, loss=total / targets, kept=sum(map(len, kept)), encode=tokenizer.encode,
        longest=max(len(tokens) for tokens, _ in sequences), texts=tuple(texts[:MOST_LINES]),
    )  # fmt: skip


def documents(made: dict[str, torch.Tensor]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The documents of a row: tokens and targets of each; padding and what has no target left out."""
    tokens, positions, labels = (made[name][0].numpy() for name in ("input_ids", "position_ids", "labels"))
    begins = [*np.flatnonzero(positions == 0).tolist(), len(tokens)]
    for first, last in itertools.pairwise(begins):
        wanted = np.flatnonzero(labels[first:last] != IGNORE)
        if len(wanted):
            end = first + int(wanted[-1]) + 1
            yield tokens[first:end], labels[first:end]


def load(source: Source) -> Any:
    """The source in torch, whole.

    Raises:
        HpcdlError: there is no room for it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    free, numbers = psutil.virtual_memory().available, parameters(source.folder)
    fits = [dtype for dtype in (torch.float32, torch.bfloat16) if numbers * dtype.itemsize * 1.2 < free]
    if not fits:
        raise HpcdlError(
            f"the source takes {numbers * 2.4 / 2**30:.1f} GiB in 16 bits, and {free / 2**30:.1f} are free: the gate"
            " compares with it"
        )
    made: Any = AutoModelForCausalLM.from_pretrained(str(source.folder), dtype=fits[0], **ONLY_WEIGHTS)
    return made.eval()


def log_probabilities(net: Any, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """`(tokens, vocabulary)`"""
    with torch.no_grad():
        logits = net(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].float()
    found: NDArray[np.float32] = torch.log_softmax(logits, dim=-1).numpy()
    return found


def speed(form: formats.Format, folder: Path) -> dict[str, Any]:
    """Peak memory and tokens a second, in a process of its own."""
    threads = torch.get_num_threads()
    found = runtimes.ask(form.RUNTIME, "bench", folder / form.FILE, threads=threads, **BENCH)
    return {**found, "threads": threads, "context": BENCH["context"]}
