"""Distillation: a student learns a teacher's distribution over the next token, besides the text's own.

Sources and the loss: hpcdl/distributed/distillation.py. The teacher is frozen, whole on every rank, and sees
the same batches as the student: packed documents stay apart in it too. Evaluations are plain cross-entropy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Interval

from hpcdl.errors import Fault
from hpcdl.spec import ExperimentSpec, ModelShape, TaskSpec
from hpcdl.spec.options import model_options
from hpcdl.spec.parallel import ParallelDims

PLACES = {"teacher": "model"}
"""What names a model, to be made absolute (hpcdl.experiment.places)."""

PACKAGE = "package:"
"""Before the name of an installed package that carries the teacher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(TaskSpec):
    """Who teaches, and what the loss is made of."""

    teacher: str | None = None
    """The teacher: a folder, a run, an id of the hub, or a file of conf/model; recorded as an absolute place."""
    temperature: Annotated[float, Gt(0)] = 2.0
    """Both distributions are taken of the logits divided by this."""
    kl: Literal["forward", "reverse"] = "forward"
    """`forward`: KL(teacher ‖ student); `reverse`: KL(student ‖ teacher)."""
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Weight of the divergence (times temperature²); the cross-entropy's is 1 - alpha."""
    teacher_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What the teacher's weights are held in; `auto`: the training's precision."""


SPLIT = {
    "tp": "the teacher's head is whole, and a tensor parallel student has some rows of its own",
    "pp": "the teacher's hidden states are needed with the student's last ones, on the last stage only",
    "cp": "the teacher's attention would have to look beyond its part of the sequence, as the student's does",
}
"""Dimensions that distillation doesn't go with, and why."""


def check(config: Config, spec: ExperimentSpec) -> Iterator[Fault]:
    """A teacher of the student's vocabulary, and no rank with a part of a model or a sequence only."""
    if config.teacher is None:
        yield _fault("null", "distillation needs a teacher", "task.teacher=smollm2_135m")
    else:
        yield from _other_vocabulary(config.teacher, spec)
    dims = ParallelDims.possible(spec.parallel, spec.cluster.world_size)
    if dims is None:
        return
    for name, reason in SPLIT.items():
        degree = getattr(dims, name)
        if degree > 1:
            yield Fault(
                key=f"parallel.{name}",
                value=str(degree),
                problem=f"task=distill: {reason}",
                allowed="1; parallel=ddp, fsdp and hsdp distil",
                nearest="1",
                fix="parallel=fsdp",
            )


def _fault(value: str, problem: str, fix: str) -> Fault:
    return Fault(
        key="task.teacher",
        value=value,
        problem=problem,
        allowed="a model with the student's tokenizer and vocabulary: a folder, a run, an id of the hub, or"
        f" one of {', '.join(model_options())}",
        fix=fix,
    )


def _other_vocabulary(teacher: str, spec: ExperimentSpec) -> Iterator[Fault]:
    """What can be known of both without opening weights: sizes, and the tokenizers' files."""
    model, folder = spec.model, base_folder(teacher)
    mine, theirs = model.shape and model.shape.vocab_size, _rows(teacher, folder)
    fix = f"task.teacher=… with the tokenizer of {model.name}, or model=… with the teacher's"
    if mine and theirs and mine != theirs:
        yield _fault(
            teacher, f"its vocabulary has {theirs} entries, and the student {model.name}'s has {mine}", fix
        )
        return
    byte = model.tokenizer == "byte"
    if folder is not None and byte and not (folder / "byte_tokenizer.json").exists():
        if _words(folder) or not _beside_adapter(teacher):
            yield _fault(teacher, "the student's tokens are bytes, and the teacher's are not", fix)
        return
    if folder is None or byte or model.path is None:
        return
    own, others = _words(Path(model.path)), _words(folder)
    if own and others and own != others:
        differ = len(own.items() ^ others.items())
        yield _fault(teacher, f"its tokenizer differs from the student's in {differ} entries", fix)


def _beside_adapter(teacher: str) -> bool:
    return (Path(teacher) / "byte_tokenizer.json").exists()


def base_folder(teacher: str) -> Path | None:
    """The folder with the teacher's config and weights; None where it is no folder.

    Args:
        teacher: a resolved place; of an adapter's folder it is its base that counts.
    """
    folder = Path(teacher)
    if not folder.is_absolute():
        return None
    adapter = folder / "adapter_config.json"
    if not (folder / "config.json").exists() and adapter.exists():
        base = Path(str(json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")))
        return base if base.is_absolute() else None
    return folder


def _rows(teacher: str, folder: Path | None) -> int | None:
    """Rows of the teacher's embedding, where they are told somewhere."""
    if teacher.startswith(PACKAGE):
        package = teacher.removeprefix(PACKAGE)
        shapes = [m["shape"] for m in model_options().values() if m.get("package") == package]
        return int(shapes[0]["vocab_size"]) if shapes and shapes[0] else None
    config = _json(folder / "config.json") if folder else {}
    rows = config.get("vocab_size")
    return rows if isinstance(rows, int) else None


SHAPE = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings", "head_dim", "tie_word_embeddings",
)  # fmt: skip
"""Keys of a Llama-like model's config.json that ModelShape has under the same names."""


def teacher_shape(config: Config) -> ModelShape | None:
    """The teacher's dimensions, for the plan of memory; None where they aren't known here, or are no Llama's."""
    teacher = config.teacher or ""
    folder = base_folder(teacher)
    if teacher.startswith(PACKAGE):
        package = teacher.removeprefix(PACKAGE)
        told = [m["shape"] for m in model_options().values() if m.get("package") == package]
        found = dict(told[0] or {}) if told else {}
    else:
        found = _json(folder / "config.json") if folder else {}
    found.setdefault("num_key_value_heads", found.get("num_attention_heads"))
    known = {key: found[key] for key in SHAPE if found.get(key) is not None}
    try:
        return ModelShape(**{"tie_word_embeddings": False, **known})
    except TypeError:
        return None


def _words(folder: Path) -> dict[str, int]:
    """The vocabulary in a folder's tokenizer.json; empty where there is none."""
    found = _json(folder / "tokenizer.json")
    vocabulary = (found.get("model") or {}).get("vocab")
    added = {token["content"]: token["id"] for token in found.get("added_tokens") or ()}
    return {**vocabulary, **added} if isinstance(vocabulary, dict) else added


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
