"""Rules between sections: each a small function that yields faults, run where its sections are right."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from hpcdl import compress, parallel, tasks
from hpcdl.compress import offload, prune, quant
from hpcdl.errors import Fault
from hpcdl.experiment import elastic, ranks, resources, resuming
from hpcdl.parallel._mesh import MeshConfig
from hpcdl.spec import (
    ClusterSpec,
    DataSpec,
    ExperimentSpec,
    ModelSpec,
    OptimSpec,
    ParallelSpec,
    PeftSpec,
    TaskSpec,
    TrainerSpec,
)
from hpcdl.spec.parallel import ParallelDims

BYTE_VOCABULARY = 260
"""256 bytes and the tokenizer's four special tokens."""


def broken(parts: dict[str, Any]) -> list[Fault]:
    """Faults of every rule whose sections are in `parts`.

    Of a strategy that is still to be chosen nothing is asked but its form.
    """
    waits = is_open(parts.get("parallel"))
    return [
        fault
        for needs, rule in RULES
        if all(need in parts for need in needs)
        and not (waits and "parallel" in needs and rule not in OF_FORM)
        for fault in rule(*(parts[need] for need in needs))
    ]


def malformed(parts: dict[str, Any]) -> bool:
    """Whether a rule of form is broken: then the value is wrong whatever stands beside it."""
    return any(
        True
        for needs, rule in RULES
        if rule in OF_FORM and all(need in parts for need in needs)
        for _ in rule(*(parts[need] for need in needs))
    )


def is_open(parallel: ParallelSpec | None) -> bool:
    """Whether the strategy is still to be chosen (parallel=auto): what others say of it would be of no strategy."""
    return bool(getattr(parallel, "OPEN", False))


def refused(spec: ExperimentSpec) -> Iterator[Fault]:
    """What the strategy, the methods, the scheme and the task say of the experiment, at all sizes that it may have."""
    if is_open(spec.parallel):
        yield from parallel.get(spec.parallel.name).check(spec.parallel, spec)
        return
    yield from _refused(spec)
    yield from elastic.sizes(spec, _judged)


def sharing(spec: ExperimentSpec) -> list[Fault]:
    """All that any rule says of how an experiment that is right otherwise is shared out, and trained step by step."""
    told = [
        fault
        for needs, rule in RULES
        if "parallel" in needs or "trainer" in needs
        for fault in rule(*(getattr(spec, need) for need in needs))
    ]
    return [*told, *refused(spec)]


def _judged(spec: ExperimentSpec) -> Iterator[Fault]:
    parts = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    yield from broken(parts)
    yield from _refused(spec)


def _refused(spec: ExperimentSpec) -> Iterator[Fault]:
    yield from parallel.get(spec.parallel.name).check(spec.parallel, spec)
    yield from compress.get(spec.peft.name).check(spec.peft, spec)
    yield from quant.get(spec.quant.scheme).check(spec.quant, spec)
    yield from prune.get(spec.prune.name).check(spec.prune, spec)
    yield from offload.get(spec.offload.name).check(spec.offload, spec)
    yield from tasks.get(spec.task.name).check(spec.task, spec)


def name_is_a_folder(name: str) -> Iterator[Fault]:
    """The experiment's name is a folder's, a job's and an argument's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == "latest":
        near = re.sub(r"[^A-Za-z0-9._-]+", "_", name).lstrip("._-")[:100]
        near = near if near and near != "latest" else "my_run"
        yield Fault(
            key="name",
            value=name or '""',
            problem="is not safe as the name of a folder",
            allowed="at most 100 letters, digits, dots, dashes, underscores, the first no mark; not 'latest'",
            nearest=near,
            fix=f"name={near}",
        )


def runs_dir_is_a_folder(runs_dir: str) -> Iterator[Fault]:
    """Run directories stand in scripts, one a line, and their code in PYTHONPATH."""
    if not runs_dir.strip() or re.search(r"[\x00-\x1f:]", runs_dir):
        yield Fault(
            key="runs_dir",
            value=repr(runs_dir),
            problem="is no folder's name",
            allowed="a path without line breaks and colons",
            fix="runs_dir=runs",
        )


def model_has_a_source(model: ModelSpec) -> Iterator[Fault]:
    """Random weights need a shape; everything else brings its own."""
    if model.source == "random" and model.shape is None and model.mlp is None:
        yield Fault(
            key="model",
            value=model.name,
            problem="has no weights: none of path, hub_id and package is set, and no shape for random ones",
            allowed="model.path, model.hub_id, model.package or model.shape",
            fix="model.path=/path/of/the/model",
        )


def shape_is_a_transformer(model: ModelSpec) -> Iterator[Fault]:
    """Heads share the width evenly, and query heads share key and value heads evenly."""
    shape = model.shape
    if shape is None:
        return
    heads, kv_heads = shape.num_attention_heads, shape.num_key_value_heads
    if shape.head_dim is None and shape.hidden_size % heads:
        near = _nearest_divisor(shape.hidden_size, heads)
        yield Fault(
            key="model.shape.num_attention_heads",
            value=str(heads),
            problem=f"does not divide hidden_size {shape.hidden_size}",
            allowed="a divisor of hidden_size, or set model.shape.head_dim",
            nearest=str(near),
            fix=f"model.shape.num_attention_heads={near}",
        )
    if heads % kv_heads:
        near = _nearest_divisor(heads, kv_heads)
        yield Fault(
            key="model.shape.num_key_value_heads",
            value=str(kv_heads),
            problem=f"does not divide num_attention_heads {heads}",
            allowed="a divisor of num_attention_heads",
            nearest=str(near),
            fix=f"model.shape.num_key_value_heads={near}",
        )
    width = shape.head_dim or shape.hidden_size // heads
    if width % 2 and not (shape.head_dim is None and shape.hidden_size % heads):
        yield Fault(
            key="model.shape.head_dim",
            value=str(width),
            problem="the rotary embedding turns pairs of numbers, so a head's width must be even",
            allowed="an even number; hidden_size / num_attention_heads where null",
            fix=f"model.shape.head_dim={width + 1}",
        )


def scaling_says_how(model: ModelSpec) -> Iterator[Fault]:
    """Transformers wants to know the kind of a rotary scaling."""
    scaling = model.shape.rope_scaling if model.shape else None
    if scaling is not None and not isinstance(scaling.get("rope_type"), str):
        yield Fault(
            key="model.shape.rope_scaling",
            value=", ".join(scaling),
            problem="does not say which scaling: rope_type is missing",
            allowed="rope_type (linear, dynamic, yarn, llama3, …) with its own keys, or null",
            fix="+model.shape.rope_scaling.rope_type=linear",
        )


def bytes_fit_the_vocabulary(model: ModelSpec) -> Iterator[Fault]:
    """The byte tokenizer gives numbers up to 259."""
    if model.tokenizer == "byte" and model.shape is not None and model.shape.vocab_size < BYTE_VOCABULARY:
        yield Fault(
            key="model.shape.vocab_size",
            value=str(model.shape.vocab_size),
            problem="is too small for the byte tokenizer: 256 bytes and 4 special tokens",
            allowed=f"at least {BYTE_VOCABULARY}",
            fix=f"model.shape.vocab_size={BYTE_VOCABULARY}",
        )


def random_weights_have_a_tokenizer(model: ModelSpec) -> Iterator[Fault]:
    """Random weights come without a tokenizer of their own."""
    if model.source == "random" and model.shape is not None and model.tokenizer == "auto":
        yield Fault(
            key="model.tokenizer",
            value="auto",
            problem="there are no weights that a tokenizer could lie beside: this model is random",
            allowed="byte",
            fix="model.tokenizer=byte",
        )


def sequence_fits_the_model(data: DataSpec, model: ModelSpec) -> Iterator[Fault]:
    """No position beyond those the model was made for."""
    limit = model.shape.max_position_embeddings if model.shape else None
    if limit is not None and data.seq_len > limit:
        yield Fault(
            key="data.seq_len",
            value=str(data.seq_len),
            problem=f"is longer than the model's max_position_embeddings {limit}",
            allowed=f"8 to {limit}",
            nearest=str(limit),
            fix=f"data.seq_len={limit}",
        )


def data_has_a_source(data: DataSpec) -> Iterator[Fault]:
    """Files for text and jsonl, a dataset for hf."""
    if data.kind in ("text", "jsonl") and not data.paths:
        yield Fault(
            key="data.paths",
            value="[]",
            problem=f"data={data.kind} needs at least one file",
            allowed="files or globs",
            fix="'data.paths=[/path/of/the/files/*.txt]'",
        )
    if data.kind == "hf" and not data.dataset:
        yield Fault(
            key="data.dataset",
            value="null",
            problem="data=hf needs a dataset",
            allowed="a datasets name or a local folder",
            fix="data.dataset=wikitext",
        )


def task_has_what_it_takes(task: TaskSpec, data: DataSpec, model: ModelSpec) -> Iterator[Fault]:
    """Text for all tasks that read some, and for them no network that plays."""
    if not getattr(tasks.get(task.name), "READS_TEXT", True):
        return  # says itself what it needs
    if data.kind == "none":
        yield Fault(
            key="data",
            value="none",
            problem=f"task={task.name} reads text",
            allowed="pydoc, text, jsonl, hf, synthetic",
            fix="data=pydoc",
        )
    if model.mlp is not None:
        yield Fault(
            key="model",
            value=model.name,
            problem=f"task={task.name} is for language models, and this network plays an environment",
            allowed="another model; or task=policy_gradient",
            fix="task=policy_gradient",
        )


def full_trains_all(train: str, peft: PeftSpec) -> Iterator[Fault]:
    """`train=full` leaves nothing frozen."""
    if train == "full" and peft.name != "none":
        yield Fault(
            key="train",
            value="full",
            problem=f"trains every weight, and peft={peft.name} freezes the model's own",
            allowed="auto, or full with peft=none",
            fix="peft=none",
        )


def warm_up_ends(optim: OptimSpec, trainer: TrainerSpec) -> Iterator[Fault]:
    """The learning rate must reach its peak."""
    if optim.warmup_steps > trainer.max_steps:
        near = max(1, trainer.max_steps // 10)
        yield Fault(
            key="optim.warmup_steps",
            value=str(optim.warmup_steps),
            problem=f"the warm-up would not end within trainer.max_steps {trainer.max_steps}",
            allowed=f"0 to {trainer.max_steps}",
            fix=f"optim.warmup_steps={near}",
        )


def moments_stay_where_they_are(
    optim: OptimSpec, parallel: ParallelSpec, cluster: ClusterSpec
) -> Iterator[Fault]:
    """8-bit moments are digits with scales for 256 of them: nobody may split them, or average them over ranks."""
    if optim.name != "adamw8bit":
        return
    dims = ParallelDims.possible(parallel, cluster.world_size)
    if dims is None:
        return
    problem = None
    if not isinstance(parallel, MeshConfig):
        problem = (
            f"parallel={parallel.name} averages optimizer states or sends them, and 8-bit ones are no numbers"
        )
    elif dims.dp_shard > 1 or parallel.cpu_offload or dims.tp > 1:
        problem = (
            "its 8-bit moments have a scale for 256 of them in a row, and this strategy splits parameters"
        )
    if problem:
        yield Fault(
            key="optim.name",
            value="adamw8bit",
            problem=problem,
            allowed="parallel=ddp, cp or pp with whole parameters on each rank; or optim=adamw, sgd",
            nearest="adamw",
            fix="optim=adamw",
        )


def what_is_recomputed_is_offloaded(trainer: TrainerSpec, cluster: ClusterSpec) -> Iterator[Fault]:
    """Only inputs of blocks that recompute everything are few enough to be worth the way."""
    where = trainer.activation_offload
    if where == "none":
        return
    if trainer.activation_checkpointing != "full":
        yield Fault(
            key="trainer.activation_offload",
            value=where,
            problem="takes what blocks keep that recompute their activations, and not all of them do",
            allowed="none, or with trainer.activation_checkpointing=full",
            fix="trainer.activation_checkpointing=full",
        )
    if where == "host" and not cluster.gpus_per_node and not (cluster.gres or "").startswith("gpu"):
        yield Fault(
            key="trainer.activation_offload",
            value=where,
            problem="without a GPU everything is in the host's memory already",
            allowed="none, disk",
            nearest="disk",
            fix="trainer.activation_offload=disk",
        )


def best_is_known(trainer: TrainerSpec) -> Iterator[Fault]:
    """Only a checkpoint whose step is evaluated can be among the best."""
    every, saved = trainer.eval_every, trainer.checkpoint_every
    if not trainer.keep_best or (every and saved and not saved % every):
        return
    at = saved or every
    yield Fault(
        key="trainer.keep_best",
        value=str(trainer.keep_best),
        problem=f"the held-out loss at checkpoints isn't known: eval_every={every}, checkpoint_every={saved}",
        allowed="0; or checkpoint_every a multiple of eval_every, both above 0",
        fix=f"trainer.eval_every={at} trainer.checkpoint_every={at}" if at else "trainer.keep_best=0",
    )


def _nearest_divisor(number: int, near: int) -> int:
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: (abs(d - near), d))


RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Fault]]], ...] = (
    (("name",), name_is_a_folder),
    (("runs_dir",), runs_dir_is_a_folder),
    (("model",), model_has_a_source),
    (("model",), shape_is_a_transformer),
    (("model",), scaling_says_how),
    (("model",), bytes_fit_the_vocabulary),
    (("model",), random_weights_have_a_tokenizer),
    (("data", "model"), sequence_fits_the_model),
    (("data",), data_has_a_source),
    (("task", "data", "model"), task_has_what_it_takes),
    (("train", "peft"), full_trains_all),
    (("optim", "trainer"), warm_up_ends),
    (("trainer", "seed"), resuming.goes_on),
    (("optim", "parallel", "cluster"), moments_stay_where_they_are),
    (("parallel",), ranks.degrees_count_ranks),
    (("parallel", "cluster"), ranks.degrees_make_the_world),
    (("trainer", "parallel", "cluster"), ranks.batch_divides),
    (("trainer", "cluster"), what_is_recomputed_is_offloaded),
    (("trainer",), best_is_known),
    (("cluster",), resources.one_machine_is_one_node),
    (("cluster",), elastic.bounds),
    (("cluster",), resources.a_process_a_gpu),
    (("cluster",), resources.partition_is_known),
    (("cluster",), resources.fits_the_partition),
    (("cluster",), resources.slurm_understands),
    (("runs_dir", "cluster"), resources.output_has_a_name),
    (("cluster",), resources.extra_is_extra),
    (("cluster",), resources.lines_are_lines),
)
"""Which sections each rule needs, in the order in which faults are shown."""

OF_FORM: frozenset[Callable[..., Iterator[Fault]]] = frozenset(
    {
        name_is_a_folder,
        runs_dir_is_a_folder,
        model_has_a_source,
        data_has_a_source,
        scaling_says_how,
        ranks.degrees_count_ranks,
        resources.partition_is_known,
        resources.slurm_understands,
        resources.output_has_a_name,
        resources.extra_is_extra,
        resources.lines_are_lines,
    }
)
"""Rules that a value breaks by itself, like a slip of the pen. What breaks another rule only doesn't go with the
rest of the experiment: in a sweep such a point is refused and the others go on."""
