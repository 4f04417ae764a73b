"""Distillation: all text, as in pretraining, with a frozen teacher looking at the same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpcdl import foreign
from hpcdl.distributed.decoder import PLAIN_HEADS, Stage, inner, trunk
from hpcdl.distributed.distillation import Mix, linear_distillation
from hpcdl.distributed.engine import Engine
from hpcdl.distributed.held import Matrix
from hpcdl.distributed.losses import linear_cross_entropy
from hpcdl.errors import HpcdlError
from hpcdl.spec import ExperimentSpec, ModelSpec
from hpcdl.tasks.distill import PACKAGE, Config
from hpcdl.worker import model
from hpcdl.worker.tasks import pretrain

CUTS_DOCUMENTS = pretrain.CUTS_DOCUMENTS
example = pretrain.example
prompt = pretrain.prompt


def attach(spec: ExperimentSpec, engine: Engine) -> Lesson:
    """Loads the teacher onto this rank's device and has the student's stage learn from it.

    Raises:
        HpcdlError: the teacher can't be loaded, or hasn't the student's vocabulary.
    """
    config = cast(Config, spec.task)
    assert config.teacher is not None, "checked before submission"
    stages = [module for module in engine.stages.modules() if isinstance(module, Stage)]
    assert len(stages) == 1, "no pipeline: checked before submission"
    place, adapter = place_of(config.teacher)
    refuse_other_vocabulary(spec, stages[0].model, place)
    teacher = load(spec, config, place, adapter).to(engine.device)
    for role, whole in (("student", stages[0].model), ("teacher", teacher)):
        if not Stage(whole).has_plain_head():
            raise HpcdlError(
                f"task=distill: the {role}'s logits are not its head's matrix times the hidden states"
                f" ({inner(whole).config.model_type}); it takes the plain heads of {', '.join(sorted(PLAIN_HEADS))}"
            )
    lesson = Lesson(teacher, Mix(config.temperature, config.alpha, config.kl == "reverse"), engine.device)
    stages[0].register_forward_pre_hook(lesson.listen, with_kwargs=True)
    stages[0].loss = lesson
    lesson.student = stages[0]
    return lesson


class Lesson:
    """The student's loss while it trains; plain cross-entropy while it is evaluated."""

    names = ("ce_loss", "kl_loss")
    """What it measures, for metrics.jsonl: the loss is (1 - alpha) · ce_loss + alpha · kl_loss."""

    def __init__(self, teacher: Any, mix: Mix, device: torch.device) -> None:
        """Takes the frozen teacher.

        Args:
            teacher: transformers' model, or peft's around it.
            mix: what the loss is made of.
            device: where both models are.
        """
        self.student: nn.Module
        self._trunk: Any = trunk(teacher)
        self._head: Tensor = inner(teacher).get_output_embeddings().weight
        self._mix = mix
        self._taught: Tensor | None = None
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def listen(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the student's forward pass: the teacher's, on the same tokens."""
        if not student.training:
            return
        tokens = args[0] if args else kwargs["inputs"]
        with torch.no_grad():
            out = self._trunk(input_ids=tokens, position_ids=kwargs["position_ids"], use_cache=False)
        self._taught = out[0]

    def __call__(self, hidden: Tensor, weight: Tensor | Matrix, labels: Tensor) -> Tensor:
        """Summed loss from the student's hidden states, its head's weight (or its held matrix) and labels."""
        if not self.student.training:
            return linear_cross_entropy(hidden, weight, labels)
        if isinstance(weight, Matrix):
            weight = weight.whole(hidden.dtype)  # as the teacher's is: both make logits of the same tokens
        taught, self._taught = self._taught, None
        assert taught is not None, "the teacher listens before each forward pass"
        total, entropy, divergence = linear_distillation(
            hidden, weight, taught, self._head, labels, self._mix
        )
        self._sums += torch.stack([entropy, divergence])
        return total

    def measured(self) -> Tensor:
        """This rank's sums over the target tokens since the last call, fp64 in the order of `names`."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        return sums


# --- the teacher ------------------------------------------------------------------------------------------


def place_of(teacher: str) -> tuple[str, Path | None]:
    """What `from_pretrained` is given, and the folder of an adapter that goes on it.

    Raises:
        HpcdlError: the folder isn't there on this node.
    """
    if teacher.startswith(PACKAGE):
        name = teacher.removeprefix(PACKAGE)
        return str(model.weights_place(ModelSpec(name=name, package=name))), None
    folder = Path(teacher)
    if not folder.is_absolute():
        return teacher, None
    if (folder / "config.json").is_file():
        return teacher, None
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise HpcdlError(f"task.teacher={teacher}: there is no model on this node: {error}") from error
    return str(config["base_model_name_or_path"]), folder


def load(spec: ExperimentSpec, config: Config, place: str, adapter: Path | None) -> Any:
    """The frozen teacher, on the CPU.

    Raises:
        HpcdlError: it can't be loaded.
    """
    from transformers import AutoModelForCausalLM

    precision = spec.trainer.precision if config.teacher_precision == "auto" else config.teacher_precision
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        teacher: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, attn_implementation=spec.model.attention, **foreign.ONLY_WEIGHTS
        )
        if adapter is not None:
            from peft import PeftModel

            foreign.refuse_imports(adapter)
            teacher = PeftModel.from_pretrained(teacher, str(adapter))
    except (OSError, ValueError, RuntimeError) as error:
        raise HpcdlError(f"task.teacher={config.teacher} can't be loaded: {error}") from error
    return teacher.requires_grad_(False).eval()


def refuse_other_vocabulary(spec: ExperimentSpec, student: Any, place: str) -> None:
    """Raises where the teacher's tokens mean something else than the student's, or are not as many."""
    from transformers import AutoConfig

    try:
        rows = AutoConfig.from_pretrained(place, **foreign.NO_CODE).vocab_size
    except (OSError, ValueError) as error:
        raise HpcdlError(f"task.teacher={place} can't be loaded: {error}") from error
    mine = inner(student).config.vocab_size
    if rows != mine:
        raise HpcdlError(
            f"task.teacher={place}: its vocabulary has {rows} entries, and the student's has {mine}"
        )
    own = model.weights_place(spec.model)
    if own == place or spec.model.tokenizer == "byte":
        return  # the same files; or bytes, whose teacher was looked at before submission
    vocabulary = [_vocabulary(each) for each in (own, place)]
    if vocabulary[0] != vocabulary[1]:
        raise HpcdlError(
            f"task.teacher={place}: its tokenizer has other tokens than the student's ({own}): a teacher must"
            " read what the student reads"
        )


def _vocabulary(place: str | None) -> dict[str, int]:
    from transformers import AutoTokenizer

    try:
        return dict(AutoTokenizer.from_pretrained(place, **foreign.NO_CODE).get_vocab())
    except (OSError, ValueError) as error:
        raise HpcdlError(f"task.teacher: no tokenizer could be loaded from {place}: {error}") from error
