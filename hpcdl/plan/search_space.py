"""What the search may choose: settings of one way to train, and all the ways that a number of ranks leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from hpcdl import compress, parallel
from hpcdl.compress import quant
from hpcdl.distributed.stages import SCHEDULES
from hpcdl.errors import Fault
from hpcdl.experiment import rules
from hpcdl.parallel._mesh import MeshConfig
from hpcdl.parallel.auto import ALLOWED, OFF_THE_MESH
from hpcdl.spec import ExperimentSpec, QuantSpec
from hpcdl.spec.parallel import DIMENSIONS

CHECKPOINTING = ("none", "selective", "full")
"""From the quickest to the leanest."""
PIPELINES = tuple(name for name in SCHEDULES if name not in ("gpipe", "dualpipev"))
"""Without gpipe, which is as quick as 1f1b and holds more, and dualpipev, which is zbv with more micro-batches."""
LARGEST_MICRO_BATCH = 64
"""Sequences: a pass of more is no quicker a token."""
TRAINER = {
    "micro_batch_size": "micro_batch_size",
    "activation_checkpointing": "checkpointing",
    "activation_offload": "activation_offload",
}
"""Keys of the trainer that are searched, and a choice's field for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to train: what the search sets, the rest of the experiment stays."""

    strategy: str
    """The name of a file in hpcdl/parallel/."""
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    """The degrees; their product is the world size."""
    micro_batch_size: int
    """Sequences a pass of one rank."""
    checkpointing: str = "none"
    """trainer.activation_checkpointing."""
    reshard: bool = True
    """parallel.reshard_after_forward."""
    schedule: str = "1f1b"
    """parallel.schedule."""
    cpu_offload: bool = False
    """parallel.cpu_offload."""
    activation_offload: str = "none"
    """trainer.activation_offload."""
    quant: str = "none"
    """quant.scheme."""

    @property
    def data_ranks(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def degrees(self) -> dict[str, int]:
        """Those that are above 1, outermost first."""
        return {name: getattr(self, name) for name in DIMENSIONS if getattr(self, name) > 1}

    @property
    def mesh(self) -> tuple[Any, ...]:
        """What stays the same while batches, schedules and recomputation change."""
        return (self.strategy, self.pp, self.dp_replicate, self.dp_shard, self.cp, self.tp, self.quant)

    @property
    def effort(self) -> tuple[int, ...]:
        """How much there is to understand: of two that are equally quick the simpler one is better."""
        shared = sum(getattr(self, name) > 1 for name in ("dp_shard", "cp", "tp", "pp"))
        return (
            shared + (self.dp_shard > 1 and self.dp_replicate > 1),
            self.cpu_offload + (self.activation_offload != "none"),
            self.quant != "none",
            CHECKPOINTING.index(self.checkpointing),
            self.schedule != "1f1b",
        )


@dataclass(frozen=True, kw_only=True)
class Space:
    """All choices that there are for an experiment, before anybody asks what they cost."""

    spec: ExperimentSpec
    """What is trained; of `parallel` only what isn't searched counts."""
    ranks_per_node: int
    """Beyond which tensor parallel would talk over the network."""
    gpus: bool
    """Whether ranks have a memory of their own beside the host's."""
    allow: frozenset[str]
    """What may be searched besides degrees: of hpcdl.parallel.auto.ALLOWED."""
    fixed: dict[str, int]
    """Degrees that are given."""

    # --- what varies ------------------------------------------------------------------------------------------

    @cached_property
    def base(self) -> MeshConfig:
        """Keys of the mesh that aren't searched."""
        given = self.spec.parallel
        return given if isinstance(given, MeshConfig) else MeshConfig(name="ddp")

    def meshes(self, *, wide: bool = False) -> Iterator[Choice]:
        """Every mesh that shares the batch evenly, with the experiment's other settings.

        Args:
            wide: those whose tensor-parallel groups go over several nodes, instead of those that don't.
        """
        world = self.spec.cluster.world_size
        shape = self.spec.model.shape
        deepest = shape.num_hidden_layers if shape else world
        heads = shape.num_key_value_heads if shape else world
        for tp in self._degrees("tp", world, heads):
            if (self.ranks_per_node % tp != 0) != wide:
                continue
            for pp in self._degrees("pp", world // tp, deepest):
                for cp in self._degrees("cp", world // (tp * pp), self.spec.data.seq_len):
                    yield from self._data(pp, cp, tp, world // (tp * pp * cp))

    def _data(self, pp: int, cp: int, tp: int, ranks: int) -> Iterator[Choice]:
        if self.spec.trainer.global_batch_size % ranks:
            return
        for shard in reversed(self._degrees("dp_shard", ranks, ranks)):  # what holds least first
            replicate = ranks // shard
            if self.fixed.get("dp_replicate", replicate) != replicate:
                continue
            yield Choice(
                strategy=strategy(pp, replicate, shard, cp, tp),
                pp=pp,
                dp_replicate=replicate,
                dp_shard=shard,
                cp=cp,
                tp=tp,
                **self._given(ranks),
                cpu_offload="offload" not in self.allow and self.base.cpu_offload,
            )

    def _given(self, data_ranks: int) -> dict[str, Any]:
        """What the experiment itself says, with the smallest micro-batch."""
        trainer = self.spec.trainer
        return {
            "micro_batch_size": min(self.micro_batches(data_ranks)),
            "checkpointing": trainer.activation_checkpointing,
            "activation_offload": "none" if "offload" in self.allow else trainer.activation_offload,
            "quant": self.spec.quant.scheme,
        }

    def off_the_mesh(self) -> Iterator[Choice]:
        """Strategies that change the mathematics, where they are allowed by name."""
        world = self.spec.cluster.world_size
        if any(self.fixed.get(name, 1) != 1 for name in ("pp", "dp_shard", "cp", "tp")):
            return
        if self.spec.trainer.global_batch_size % world:
            return
        for name in OFF_THE_MESH:
            if name in self.allow:
                yield Choice(strategy=name, dp_replicate=world, **self._given(world))

    def _degrees(self, name: str, ranks: int, most: int) -> list[int]:
        given = self.fixed.get(name)
        return [d for d in divisors(ranks) if d <= most and given in (None, d)]

    def micro_batches(self, data_ranks: int) -> list[int]:
        """Sizes that divide a rank's share of the batch."""
        if "micro_batch_size" not in self.allow:
            return [self.spec.trainer.micro_batch_size]
        share = self.spec.trainer.global_batch_size // data_ranks
        sizes = [size for size in divisors(share) if size <= LARGEST_MICRO_BATCH]
        powers = [size for size in sizes if size & (size - 1) == 0 or size == share]
        return sorted({*powers, *(size for size in sizes if size == self.spec.trainer.micro_batch_size)})

    def checkpointings(self) -> tuple[str, ...]:
        """From the quickest to the leanest."""
        if "checkpointing" not in self.allow:
            return (self.spec.trainer.activation_checkpointing,)
        if "offload" not in self.allow and self.spec.trainer.activation_offload != "none":
            return ("full",)  # a rule
        return CHECKPOINTING

    def schedules(self, choice: Choice) -> tuple[str, ...]:
        """Pipelines' orders; without a pipeline there is none."""
        return PIPELINES if choice.pp > 1 else ("1f1b",)

    def reshards(self, choice: Choice) -> tuple[bool, ...]:
        """Whether FSDP lets parameters go after the forward pass: first the quick way."""
        return (False, True) if choice.dp_shard > 1 else (self.base.reshard_after_forward,)

    def schemes(self) -> list[str]:
        """Ways to hold frozen weights: the experiment's own, and where it is allowed those in fewer bits."""
        own = self.spec.quant.scheme
        if "quantization" not in self.allow or own != "none" or not compress.freezes_base(self.spec):
            return [own]
        return [own, *(name for name in quant.names() if name != own)]

    def count(self, mesh: Choice) -> int:
        """How many choices a mesh has."""
        ways = (
            self.checkpointings(),
            self.reshards(mesh),
            self.micro_batches(mesh.data_ranks),
            self.schedules(mesh),
        )
        return math.prod(map(len, ways))

    def offloads(self, choice: Choice) -> Iterator[Choice]:
        """The same with more of it in the host's memory: recomputed activations, then shards too."""
        if "offload" not in self.allow or not self.gpus or choice.strategy in OFF_THE_MESH:
            return
        if "checkpointing" in self.allow or choice.checkpointing == "full":
            recomputed = dataclasses.replace(choice, checkpointing="full", activation_offload="host")
            yield recomputed
            yield dataclasses.replace(recomputed, cpu_offload=True)
        else:
            yield dataclasses.replace(choice, cpu_offload=True)

    # --- as an experiment -------------------------------------------------------------------------------------

    def applied(self, choice: Choice) -> ExperimentSpec:
        """The experiment with this choice."""
        trainer = dataclasses.replace(
            self.spec.trainer, **{key: getattr(choice, name) for key, name in TRAINER.items()}
        )
        return dataclasses.replace(
            self.spec, parallel=self._config(choice), trainer=trainer, quant=self._quant(choice)
        )

    def _config(self, choice: Choice) -> Any:
        degrees = {name: getattr(choice, name) for name in DIMENSIONS}
        if self.spec.cluster.min_nodes is not None:  # whatever is left when a node was lost
            degrees["dp_shard" if choice.dp_shard > 1 and choice.dp_replicate == 1 else "dp_replicate"] = -1
        make: Any = parallel.get(choice.strategy).Config
        if choice.strategy in OFF_THE_MESH:
            return make(name=choice.strategy, **degrees)
        base = self.base
        return make(
            name=choice.strategy,
            **degrees,
            bucket_cap_mb=base.bucket_cap_mb,
            reshard_after_forward=choice.reshard,
            cpu_offload=choice.cpu_offload,
            sequence_parallel=base.sequence_parallel,
            loss_parallel=base.loss_parallel,
            schedule=choice.schedule,
            cp_method=base.cp_method,
        )

    def _quant(self, choice: Choice) -> QuantSpec:
        own = self.spec.quant
        return own if choice.quant == own.scheme else _scheme(choice.quant)

    def refusals(self, choice: Choice) -> list[Fault]:
        """Why launch would not take this choice; empty where it does."""
        return rules.sharing(self.applied(choice))

    def pipeline_refuses(self, choice: Choice) -> bool:
        """Whether the strategy alone says no: what a mesh that is right may still lack with other micro-batches."""
        spec = self.applied(choice)
        return any(True for _ in parallel.get(choice.strategy).check(spec.parallel, spec))


def space(
    spec: ExperimentSpec,
    ranks_per_node: int,
    *,
    gpus: bool,
    allow: Collection[str],
    keep: Collection[str] = (),
) -> Space:
    """The choices for an experiment.

    Args:
        spec: the experiment. Under parallel=auto, degrees that are given stay.
        ranks_per_node: processes on a node.
        gpus: whether ranks compute on GPUs.
        allow: of ALLOWED.
        keep: dotted keys that stay as they are, whatever is allowed.
    """
    kept = {
        name
        for name, keys in ALLOWED.items()
        if any(key == one or key.startswith(f"{one}.") for key in keep for one in keys)
    }
    auto = getattr(spec.parallel, "OPEN", False)
    given = {name: int(getattr(spec.parallel, name)) for name in DIMENSIONS} if auto else {}
    return Space(
        spec=spec,
        ranks_per_node=ranks_per_node,
        gpus=gpus,
        allow=frozenset(allow) - kept,
        fixed={name: degree for name, degree in given.items() if degree > 0},
    )


def strategy(pp: int, replicate: int, shard: int, cp: int, tp: int) -> str:
    """What a mesh is called: after the dimension that a reader would name first."""
    if pp > 1:
        return "pp"
    if shard > 1:
        return "hsdp" if replicate > 1 else "fsdp"
    if tp > 1:
        return "tp"
    return "cp" if cp > 1 else "ddp"


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """All of them, in order."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)


@lru_cache
def _scheme(name: str) -> QuantSpec:
    return quant.get(name).Config(scheme=name)
