"""`hpcdl merge`: adapters into their base, as a folder that from_pretrained reads without peft."""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from hpcdl.distributed import shards
from hpcdl.distributed.losses import IGNORE
from hpcdl.errors import HpcdlError
from hpcdl.foreign import ONLY_WEIGHTS
from hpcdl.runs.files import write_json
from hpcdl.spec import ExperimentSpec
from hpcdl.worker import adapters, merging, model, process
from hpcdl.worker.cache import make_readable
from hpcdl.worker.data.batches import batch
from hpcdl.worker.data.prepare import open_dataset
from hpcdl.worker.metrics import resident_peak_bytes
from hpcdl.worker.tokenizer import Tokenizer
from hpcdl.worker.tools import Request

TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest root mean square of the logits' differences, relative to theirs: merged matrices are rounded to the
base's dtype, 2⁻⁹ of each weight at most in bf16, which adds up over the blocks to some 0.5 %."""
ROWS, LENGTH = 2, 128
"""Held-out sequences, and their tokens, that the logits are compared on."""
ROOM = 1.3
"""Memory that a model is given to run in, in sizes of its weights."""


def run(request: Request) -> dict[str, Any]:
    """Writes the merged model, and compares its logits with those of the base under its adapters.

    Raises:
        HpcdlError: something can't be merged, or the logits differ: then nothing is left.
    """
    spec, out = request.spec, request.out
    assert out is not None, "the command asks for it"
    if not request.adapters:
        raise HpcdlError(
            f"there is no adapter to merge into {spec.model.name}: give an adapter's folder, a run that trained one,"
            " or --adapter RUN|DIR"
        )
    process.set_threads(spec, who := process.from_environment(), process.choose_device(spec, who))
    started = time.perf_counter()
    base = base_folder(spec)
    chosen = adapters.named(request.adapters)
    tokenizer = tokenizer_of(spec, chosen, base)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    try:
        found = merging.merge(base, [adapters.Update(each) for each in chosen], made)
        tokenizer.save(made)
        peak, took = resident_peak_bytes(), time.perf_counter() - started
        found |= {"seconds": round(took, 2), "peak_rss_bytes": peak}
        found |= check(spec, base, chosen, made, tokenizer)
        record = {"base": str(base), "adapters": {str(each.path): each.weight for each in chosen}}
        write_json(made / "merge.json", {**record, **found})
        make_readable(made)
        put_in_place(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return {"out": str(out), **record, **found}


def base_folder(spec: ExperimentSpec) -> Path:
    """The folder with the base's weights, fetched from the hub where they lie there.

    Raises:
        HpcdlError: there are none.
    """
    place = model.weights_place(spec.model)
    if place is None:
        raise HpcdlError(f"{spec.model.name} has random weights: there is no base to merge into")
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
        return Path(snapshot_download(place, revision=spec.model.revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise HpcdlError(f"{place} can't be fetched from the hub: {error}") from error


def tokenizer_of(spec: ExperimentSpec, chosen: Sequence[adapters.Adapter], base: Path) -> Tokenizer:
    """The one that the first adapter was trained with, chat template included; the base's where it has none."""
    folders = [chosen[0].path, base]
    beside = next((folder for folder in folders if any(folder.glob("tokenizer*"))), base)
    return model.tokenizer_for(spec.model, str(beside))


def put_in_place(made: Path, out: Path) -> None:
    """Renames the folder; what was there before goes once it is whole (`--force`)."""
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
        out.rename(old / out.name)
        made.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        made.rename(out)


# --- equal logits -----------------------------------------------------------------------------------------


def check(
    spec: ExperimentSpec, base: Path, chosen: Sequence[adapters.Adapter], merged: Path, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Compares the logits of base + adapters and of the merged model, one after the other in memory.

    Returns:
        `logits_difference` (root mean square, relative), `adapters_effect` (the same between the base alone and
        base + adapters), `tolerance`; or `checked` with the reason why not.

    Raises:
        HpcdlError: they differ by more than rounding explains.
    """
    pieces = shards.pieces(base).values()
    numbers = sum(piece.size // piece.dtype.itemsize for piece in pieces)
    free, need = psutil.virtual_memory().available, int(numbers * 4 * ROOM)
    if need > free:
        return {"checked": f"no: in fp32 the model takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"}
    tokens, positions = held_out(spec, tokenizer)
    print("comparing logits of base + adapters and of the merged model", file=sys.stderr)
    plain = load(base)
    alone = logits(plain, tokens, positions)
    together = logits(adapters.put_on(plain, chosen), tokens, positions)
    del plain
    gc.collect()
    after = logits(load(merged), tokens, positions)
    effect, difference = (_relative(other, together) for other in (alone, after))
    allowed = max(TOLERANCE.get(piece.dtype, 0.0) for piece in pieces)
    # An effect that is larger than rounding must be there after the merge: it is nearer to one than to the other.
    if not difference <= allowed or (effect > allowed and difference > effect / 2):
        raise HpcdlError(
            f"the merged model's logits differ by {difference:.2e} from those of the base under its adapters"
            f" (allowed: {allowed:.0e}; the adapters' own effect: {effect:.2e}): nothing was written"
        )
    return {
        "logits_difference": difference,
        "adapters_effect": effect,
        "tolerance": allowed,
        "checked": "yes",
    }


def held_out(spec: ExperimentSpec, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Tokens and positions of a few held-out sequences, each `(rows, length)`."""
    import numpy as np

    heldout = open_dataset(spec, tokenizer).heldout
    made = batch(heldout, np.arange(min(ROWS, len(heldout))), torch.device("cpu"))
    assert (made["labels"] != IGNORE).any()
    return made["input_ids"][:, :LENGTH], made["position_ids"][:, :LENGTH]


def load(folder: Path) -> Any:
    """A model in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **ONLY_WEIGHTS)
    return made.eval()


def logits(net: Any, tokens: Tensor, positions: Tensor) -> Tensor:
    """`(rows × length, vocabulary)` fp32."""
    with torch.no_grad():
        out: Tensor = net(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return out.flatten(0, 1)


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())
