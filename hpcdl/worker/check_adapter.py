"""Does plain peft read the adapter and find the same loss?

    python -m hpcdl.worker.check_adapter RUN_DIR

Loads the base with transformers, in the run's precision, and the adapter with
`peft.PeftModel.from_pretrained`; takes the loss from their own forward pass over the run's held-out rows.
A base that was held in fewer bits is so here too: the one thing of hpcdl. Prints both losses; exits 1 where
they differ by more than the run's precision explains.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hpcdl.compress import quant
from hpcdl.foreign import ONLY_WEIGHTS, refuse_imports
from hpcdl.runs.spec import read_spec
from hpcdl.runs.store import RunDir
from hpcdl.spec import ExperimentSpec

TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative: bf16 has 8 bits of mantissa, and autocast rounds elsewhere than a bf16 model."""


def plain_loss(spec: ExperimentSpec, adapter: Path) -> float:
    """Held-out loss of base + adapter, without packing tricks of ours: transformers' and peft's own code."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from hpcdl.distributed.losses import IGNORE
    from hpcdl.worker import model, quantized
    from hpcdl.worker.data.batches import Order, batch
    from hpcdl.worker.data.prepare import open_dataset

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = json.loads((adapter / "adapter_config.json").read_text())
    dtype = torch.bfloat16 if spec.trainer.precision == "bf16" else torch.float32
    place = Path(config["base_model_name_or_path"])
    if place.is_dir() and (held := quantized.scheme_of(place)) is not None:
        base: Any = quantized.load(place, held, spec.model.attention, dtype)
    else:
        base = quant.hold(spec, AutoModelForCausalLM.from_pretrained(str(place), dtype=dtype, **ONLY_WEIGHTS))
    refuse_imports(adapter)
    tuned = PeftModel.from_pretrained(base, str(adapter)).eval()
    tokenizer = model.tokenizer_for(spec.model, model.weights_place(spec.model))
    heldout = open_dataset(spec, tokenizer).heldout
    rows = Order(len(heldout), spec.seed).rows(0, min(spec.trainer.eval_samples, len(heldout)))
    total, targets = 0.0, 0
    with torch.no_grad():
        for at in range(len(rows)):
            inputs = batch(heldout, rows[at : at + 1], torch.device("cpu"))
            labels = inputs.pop("labels")
            logits = tuned(**inputs, use_cache=False).logits
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
                )
            )
            targets += int((labels != IGNORE).sum())
    return total / targets


def main(run: RunDir) -> int:
    """Compares, prints, and returns the exit code."""
    spec = read_spec(run.spec_file)
    result = json.loads(run.result_file.read_text(encoding="utf-8"))
    if result["adapter"] is None:
        print(f"{run.path}: this run trained the whole model, there is no adapter", file=sys.stderr)
        return 2
    loss, expected = plain_loss(spec, run.path / "adapter"), result["eval_loss_after"]
    off = abs(loss - expected) / expected
    same = off <= TOLERANCE[spec.trainer.precision]
    print(f"held-out loss: {expected:.6f} in the run ({spec.trainer.precision}), {loss:.6f} in plain peft:")
    print(f"{'the same' if same else 'NOT the same'}, {off:.2e} relative")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main(RunDir(Path(sys.argv[1]).absolute())))
