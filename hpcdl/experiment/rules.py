"""Rules between sections: each a small function that yields faults, run where its sections are right."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from hpcdl import compress, parallel, tasks
from hpcdl.compress import offload, prune, quant
from hpcdl.errors import Fault
from hpcdl.experiment import containers, elastic, kubernetes, login, ranks, resources, resuming, rules_of_data
from hpcdl.parallel._mesh import MeshConfig
from hpcdl.spec import (
    ClusterSpec,
    ExperimentSpec,
    OptimSpec,
    ParallelSpec,
    PeftSpec,
    TrainerSpec,
)
from hpcdl.spec.parallel import ParallelDims


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


def of_form(parts: dict[str, Any]) -> list[Fault]:
    """Faults of the rules of form: the value is wrong whatever stands beside it."""
    return [
        fault
        for needs, rule in RULES
        if rule in OF_FORM and all(need in parts for need in needs)
        for fault in rule(*(parts[need] for need in needs))
    ]


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


RULES: tuple[tuple[tuple[str, ...], Callable[..., Iterator[Fault]]], ...] = (
    (("name",), name_is_a_folder),
    (("runs_dir",), runs_dir_is_a_folder),
    (("model",), rules_of_data.model_has_a_source),
    (("model",), rules_of_data.shape_is_a_transformer),
    (("model",), rules_of_data.scaling_says_how),
    (("model",), rules_of_data.bytes_fit_the_vocabulary),
    (("model",), rules_of_data.random_weights_have_a_tokenizer),
    (("data", "model"), rules_of_data.sequence_fits_the_model),
    (("data",), rules_of_data.data_has_a_source),
    (("task", "data", "model"), rules_of_data.task_has_what_it_takes),
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
    *((("cluster",), rule) for rule in (*kubernetes.RULES, *login.RULES, *containers.RULES)),
    (("runs_dir", "cluster"), containers.runs_can_be_shown),
)
"""Which sections each rule needs, in the order in which faults are shown."""

OF_FORM: frozenset[Callable[..., Iterator[Fault]]] = frozenset(
    {
        name_is_a_folder,
        runs_dir_is_a_folder,
        rules_of_data.model_has_a_source,
        rules_of_data.data_has_a_source,
        rules_of_data.scaling_says_how,
        ranks.degrees_count_ranks,
        resources.partition_is_known,
        resources.slurm_understands,
        resources.output_has_a_name,
        resources.extra_is_extra,
        resources.lines_are_lines,
        *kubernetes.RULES,
        *login.RULES,
        *containers.RULES,
        containers.runs_can_be_shown,
    }
)
"""Rules that a value breaks by itself, like a slip of the pen. What breaks another rule only doesn't go with the
rest of the experiment: in a sweep such a point is refused and the others go on."""
