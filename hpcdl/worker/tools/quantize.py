"""`hpcdl quantize`: a model in few bits, in a folder that hpcdl, and where it can be transformers, loads again."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hpcdl.errors import HpcdlError
from hpcdl.worker import model, network, process, quantized
from hpcdl.worker.cache import anew
from hpcdl.worker.data.prepare import open_dataset
from hpcdl.worker.metrics import resident_peak_bytes
from hpcdl.worker.tools import Request
from hpcdl.worker.tools.eval import disk_bytes, load


def run(request: Request) -> dict[str, Any]:
    """Writes the model; text is looked at only where the scheme (or pruning) is calibrated on it.

    Raises:
        HpcdlError: there is nothing to quantize, an adapter is not merged yet, or something can't be held so.
    """
    spec, out = request.spec, request.out
    assert out is not None, "the command asks for it"
    if spec.quant.scheme == "none":
        raise HpcdlError("how? quant=int4, quant=int8, quant=nf4, … says it")
    if request.adapters:
        raise HpcdlError(
            "an adapter is merged into plain weights first: hpcdl merge, then hpcdl quantize its folder"
        )
    started = time.perf_counter()
    who = process.from_environment()
    device = process.choose_device(spec, who)
    process.set_threads(spec, who, device)
    place = model.weights_place(spec.model)
    tokenizer = model.tokenizer_for(spec.model, place)
    looks = any(getattr(part, "calibration_samples", 0) for part in (spec.quant, spec.prune))
    text = open_dataset(spec, tokenizer).train if looks else None
    net = load(request, place, device, text)

    def build(folder: Path) -> None:
        quantized.write(net.model, spec.quant, folder)
        tokenizer.save(folder)

    anew(out, build)
    return {
        "out": str(out),
        "model": spec.model.name,
        "quant": spec.quant.scheme,
        "parameters": network.size_of(net.model).parameters,
        "disk_bytes": disk_bytes(str(out), ()),
        "disk_bytes_before": disk_bytes(place, ()),
        "read_by": quantized.readers(out),
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": resident_peak_bytes(),
    }
