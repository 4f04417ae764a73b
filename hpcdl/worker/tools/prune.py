"""`hpcdl prune`: a model with zeros in it, as a folder that from_pretrained reads."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hpcdl.compress import none, prune
from hpcdl.compress.prune import _masks
from hpcdl.errors import HpcdlError
from hpcdl.runs.files import write_json
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import to_plain
from hpcdl.worker import model, process, pruning
from hpcdl.worker.cache import make_readable
from hpcdl.worker.data.prepare import open_dataset
from hpcdl.worker.metrics import resident_peak_bytes
from hpcdl.worker.tools import Request
from hpcdl.worker.tools.merge import put_in_place


def run(request: Request) -> dict[str, Any]:
    """Prunes the model in fp32, and writes it in the dtype that its weights lie in.

    Raises:
        HpcdlError: no method was named, the model can't be had or pruned, or there is too little text.
    """
    spec, out = request.spec, request.out
    assert out is not None, "the command asks for it"
    names = ", ".join(name for name in prune.names() if name not in ("none", "keep"))
    if spec.prune.name in ("none", "keep"):
        raise HpcdlError(f"prune={spec.prune.name} takes nothing out: prune=METHOD, one of {names}")
    if getattr(spec.prune, "schedule", "once") != "once":
        raise HpcdlError("prune.schedule=cubic goes on while a model is trained: prune.schedule=once here")
    if request.adapters:
        raise HpcdlError("an adapter doesn't fit its base any more once that is pruned: hpcdl merge first")
    if spec.quant.scheme != "none":
        raise HpcdlError(f"quant={spec.quant.scheme}: prune first, quantize what comes out (hpcdl quantize)")
    who = process.from_environment()
    device = process.choose_device(spec, who)
    process.set_threads(spec, who, device)
    place = model.weights_place(spec.model)
    tokenizer = model.tokenizer_for(spec.model, place)
    whole = model.load(replace(spec, peft=none.Config(name="none")), place)  # in fp32
    started = time.perf_counter()
    method = prune.get(spec.prune.name)
    text = open_dataset(spec, tokenizer).train if method.CALIBRATED else None
    pruning.apply(spec, whole, device, text)
    found: dict[str, Any] = {
        **to_plain(spec.prune),
        **pruning.sparsity(whole),
        "matrices": len(_masks.linears(whole)),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": resident_peak_bytes(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
    try:
        whole.to(stored_dtype(place)).save_pretrained(made)
        tokenizer.save(made)
        write_json(made / "prune.json", {"base": _base(spec, place), **found})
        make_readable(made)
        put_in_place(made, out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return {"out": str(out), "base": _base(spec, place), **found}


def _base(spec: ExperimentSpec, place: str | None) -> str:
    return place or f"{spec.model.name} (random weights of seed {spec.seed})"


def stored_dtype(place: str | None) -> torch.dtype:
    """What a folder's config.json says that its weights are in; fp32 where it, or there, is none."""
    config = Path(place or "") / "config.json"
    if place is None or not config.is_file():
        return torch.float32
    told = json.loads(config.read_text(encoding="utf-8"))
    dtype = getattr(torch, str(told.get("dtype") or told.get("torch_dtype") or "float32"), None)
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
