"""Export as a run: hpcdl.worker.tools.export's file in the run's folder, and its figures as the result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import HpcdlError
from hpcdl.runs.files import write_atomic, write_json
from hpcdl.spec import ExperimentSpec, ModelSpec
from hpcdl.spec.model import BYTE_TOKENIZER
from hpcdl.worker.tasks import pretrain

if TYPE_CHECKING:
    import torch

    from hpcdl.runs.store import RunDir
    from hpcdl.worker.heartbeat import Progress
    from hpcdl.worker.process import Process
    from hpcdl.worker.signals import Stop

CUTS_DOCUMENTS = pretrain.CUTS_DOCUMENTS
example = pretrain.example
prompt = pretrain.prompt
FOLDER = "export"


def train(
    spec: ExperimentSpec, run: RunDir, who: Process, device: torch.device, stop: Stop, progress: Progress
) -> None:
    """In the place of hpcdl.worker.training.train.

    Raises:
        HpcdlError: the run that is exported has left no model, or the quality gate refuses the file.
    """
    from hpcdl.worker import training
    from hpcdl.worker.metrics import resident_peak_bytes
    from hpcdl.worker.tools import Request, export

    config: Any = spec.task
    model, adapters = (spec.model, ()) if config.run is None else left_by(Path(config.run))
    options = {
        "to": config.to, "quant": config.quant, "embedding_quant": config.embedding_quant,
        "accept_loss": config.accept_loss, "check": None,
    }  # fmt: skip
    progress.begin(0)
    with progress.during("evaluation"):
        out = run.path / FOLDER
        export.run(Request(spec=replace(spec, model=model), adapters=adapters, options=options, out=out))
    progress.end()
    card = json.loads((out / "export.json").read_text(encoding="utf-8"))
    gate = card["gate"]
    write_atomic(run.path / "card.md", (out / "card.md").read_text(encoding="utf-8"))
    result = {
        "export": str(out / card["file"]), "bytes": card["bytes"], "source_bytes": card["source_bytes"],
        "eval_perplexity_before": gate.get("perplexity_before"), "eval_perplexity_after": gate.get("perplexity_after"),
        "eval_tokens": gate.get("targets"), "accepted_loss": gate["accepted_loss"], "faults": gate["faults"],
        "export_peak_rss_bytes": card["speed"]["peak_rss_bytes"], "tokens_per_s": card["speed"]["tokens_per_s"],
        "peak_memory_bytes": resident_peak_bytes(), "world_size": who.world_size, "nodes": spec.cluster.nodes,
    }  # fmt: skip
    write_json(run.result_file, result)
    training.write_outcome(run, who, 0, None)


def left_by(run: Path) -> tuple[ModelSpec, tuple[tuple[Path, float], ...]]:
    """The model that a run has left, and the adapter that goes on it.

    Raises:
        HpcdlError: it has left none.
    """
    folder = next((run / name for name in ("model", "adapter") if (run / name).is_dir()), None)
    if folder is None:
        raise HpcdlError(f"task.run={run} has left no model and no adapter (hpcdl status says why)")
    adapters: tuple[tuple[Path, float], ...] = ()
    base = folder
    if folder.name == "adapter":
        told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, adapters = Path(told["base_model_name_or_path"]), ((folder, 1.0),)
        if not base.is_dir():
            raise HpcdlError(f"{folder}: its base {base} is no folder here")
    byte = (folder / BYTE_TOKENIZER).is_file()
    return ModelSpec(name=base.name, path=str(base), tokenizer="byte" if byte else "auto"), adapters
