"""From a decoder to what each rank of a pipeline stage holds: weights, state, and the highest moment of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from hpcdl import parallel
from hpcdl.distributed import stages as layout
from hpcdl.plan import beside, pieces, teacher
from hpcdl.plan.crowd import Crowd, alone, crowds
from hpcdl.plan.decoder import Decoder
from hpcdl.plan.loss import Head
from hpcdl.plan.outside import Outside
from hpcdl.plan.records import RankMemory
from hpcdl.plan.stage import Instant, Stage, of
from hpcdl.plan.tape import ACTIVATIONS, BUFFERS, GRADIENTS, KINDS, TEMPORARY, Bytes, add
from hpcdl.spec.held import Around, Trained

RUNTIME_BYTES = beside.PROCESS
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "sgd": 4.0}
"""Of optimizer state a trained number, fp32; without momentum SGD has none."""


def of_stages(model: Decoder) -> tuple[RankMemory, ...]:
    """One record a pipeline rank, and more where a stage's ranks hold different things."""
    return tuple(
        record for rank in range(model.dims.pp) for record in Shares(model=model, rank=rank).records()
    )


@lru_cache(maxsize=256)
def _partition(layers: int, count: int, cost: float, head: float) -> list[range]:
    return layout.partition([cost] * layers, min(count, layers), head=head)


def parts(model: Decoder) -> list[range]:
    """Blocks of each stage, as hpcdl.distributed.pipeline lays them out."""
    count, config, layers = model.dims.pp, model.config, model.shape.num_hidden_layers
    if config is None or count == 1:
        return [range(layers)]
    count *= layout.stages_per_rank(config.schedule, config.stages_per_rank)
    cost = layout.block_cost(model.shape, model.spec.data.seq_len)
    return _partition(layers, count, cost, layout.head_cost(model.shape))


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What one pipeline rank has of the model."""

    model: Decoder
    rank: int

    # --- which part of the model --------------------------------------------------------------------------

    @cached_property
    def stages(self) -> list[int]:
        """Numbers of its stages."""
        model = self.model
        if model.dims.pp == 1 or model.config is None:
            return [0]
        each = layout.stages_per_rank(model.config.schedule, model.config.stages_per_rank)
        kind = layout.SCHEDULES[model.config.schedule]
        return layout.held_by(kind.placement, self.rank, model.dims.pp, model.dims.pp * each)

    @cached_property
    def layers(self) -> int:
        """Its blocks."""
        found = parts(self.model)
        return sum(len(found[stage]) for stage in self.stages if stage < len(found))

    @cached_property
    def first(self) -> bool:
        """Whether it has the embedding."""
        return 0 in self.stages

    @cached_property
    def last(self) -> bool:
        """Whether it has the last norm, the head and the loss."""
        return len(parts(self.model)) - 1 in self.stages

    @cached_property
    def tables(self) -> int:
        """Matrices of the vocabulary's size here, each a tensor of its own."""
        tied = self.model.shape.tie_word_embeddings and self.model.dims.pp == 1
        return self.first + (self.last and not tied)

    # --- bytes that are there all the time ------------------------------------------------------------------

    @cached_property
    def weights(self) -> float:
        """Of the model's own weights, as they are held."""
        model = self.model
        found = self.layers * model.block_bytes
        if self.first:
            found += model.held(model.table).bytes / model.dims.tp
        if self.last:
            found += model.plain * model.shape.hidden_size
            if self.tables > self.first:
                found += model.held(model.head_matrix).bytes / model.dims.tp
        return found / model.shards

    @cached_property
    def adapters(self) -> float:
        """Of what is trained beside a frozen base."""
        return 4 * self.layers * self.model.block_adapters / self.model.shards if self.model.frozen else 0.0

    @cached_property
    def trained_whole(self) -> float:
        """Trained numbers before FSDP shares them."""
        model = self.model
        found = self.layers * model.block_trained
        if not model.frozen:
            found += self.tables * model.table_numel + self.last * model.shape.hidden_size
        return found

    @property
    def trained(self) -> float:
        """Of them this rank's."""
        return self.trained_whole / self.model.shards

    @cached_property
    def largest(self) -> float:
        """Numbers of the largest trained tensor."""
        model = self.model
        blocks = [linear.numel for _, linear in model.linears] if not model.frozen else [
            linear.rank * max(linear.rows, linear.columns) for _, linear in model.linears
        ]  # fmt: skip
        ends = [model.table_numel] if self.tables and not model.frozen else []
        return max([*blocks, *ends]) / model.shards

    @cached_property
    def optimizer(self) -> float:
        """Of its state."""
        optim = self.model.spec.optim
        if optim.name == "sgd" and not optim.momentum:
            return 0.0
        return STATE_BYTES[optim.name] * self.trained

    # --- a step ---------------------------------------------------------------------------------------------

    @cached_property
    def micro_batches(self) -> int:
        """That are added up one after the other."""
        return self.model.micro_batches

    @cached_property
    def teacher(self) -> teacher.Teacher | None:
        """Whom it learns from."""
        return teacher.of(self.model.spec, self.model.device)

    @property
    def head(self) -> Head:
        """The loss's sizes."""
        if self.teacher is None:
            return self.model.head
        width = self.teacher.shape.hidden_size
        return replace(self.model.head, teacher=width, teacher_held=self.teacher.plain)

    @cached_property
    def crowds(self) -> tuple[Crowd, ...]:
        """Micro-batches in this rank at a time."""
        model = self.model
        if model.dims.pp == 1 or model.config is None:
            return alone(self.micro_batches > 1)
        at_once = model.config.microbatches or model.micro_batches
        rounds = model.micro_batches > at_once
        found = parts(model)
        sizes = tuple(len(found[stage]) if stage < len(found) else 0 for stage in self.stages)
        return crowds(model.config.schedule, model.dims.pp, self.rank, sizes, at_once, rounds=rounds)

    @property
    def block_by_block(self) -> bool:
        """Whether a pipeline gathers a block when its turn comes; schedules of several stages gather whole stages."""
        config = self.model.config
        return config is not None and layout.SCHEDULES[config.schedule].one_stage

    def stage(self, around: Around) -> Stage:
        """The step's part here."""
        model, spec = self.model, self.model.spec
        block = model.block
        how = spec.trainer.activation_checkpointing
        recomputed = {"none": 0, "full": self.layers, "selective": -(-self.layers // 2)}[how]
        tied = model.shape.tie_word_embeddings and self.first and self.last and model.dims.pp == 1
        there = self.micro_batches > 1
        in_turn = model.sharded and model.dims.pp > 1
        exchanging = around.exchanging + (4 * self.trained if around.bucketed and there else 0.0)
        return Stage(
            block=block,
            layers=self.layers,
            head=self.head if self.last else None,
            embedding=(0.0 if model.frozen else model.seen * model.table_numel) if self.first else None,
            tied=tied,
            frozen=model.frozen,
            recomputed=recomputed,
            parked=spec.trainer.activation_offload != "none"
            and (model.device == "cuda" or spec.trainer.activation_offload == "disk"),
            crowds=self.crowds,
            bucketed=around.bucketed,
            gradients=4 * self.trained,
            largest=self.largest,
            around=add(self._around, of(TEMPORARY, 4 * self.trained if around.bucketed else 0.0)),
            within=self._masks,
            block_forward=self._gathered(2.0),
            block_backward=self._gathered(2.0),
            reducing=of(TEMPORARY, 4 * model.block_trained if model.sharded else 0.0),
            ends=of(BUFFERS, self.a_block if model.sharded else 0.0),
            of_each=self._of_each,
            after=of(TEMPORARY, exchanging if not around.bucketed else 0.0),
            updating=of(TEMPORARY, 0.0),
            staying=self.a_block if in_turn and not self._keeps_gathered else 0.0,
            whole=4 * self.trained_whole if in_turn else 0.0,
            shards=model.shards if model.sharded else 0,
            seen=model.seen if not model.frozen else model.adapter_seen,
        )

    @property
    def _around(self) -> Bytes:
        """Rotary angles, what FSDP gathers for the ends, what a pipeline receives."""
        model, block = self.model, self.model.block
        whole = block.batch * model.spec.data.seq_len / model.dims.cp
        rotary = 2 * block.residual * whole * block.head_dim
        # saved by blocks that keep their activations; held by the pass for those that are computed again
        again = model.spec.trainer.activation_checkpointing == "full"
        found = of(TEMPORARY if again else ACTIVATIONS, rotary)
        if self.teacher is not None:
            found = add(found, of(TEMPORARY, self.teacher.taught))
        if model.sharded:
            ends = model.seen * (self.tables * model.table_numel + self.last * model.shape.hidden_size)
            found = add(found, of(BUFFERS, ends))
            if model.config is not None and self._keeps_gathered:
                found = add(found, of(BUFFERS, self.layers * self.a_block))
        if model.dims.pp > 1:
            stream = block.residual * block.tokens * block.width
            at_once = (model.config.microbatches if model.config else 0) or model.micro_batches
            sides = len(self.stages) * 2 - self.first - self.last
            found = add(found, of(TEMPORARY, sides * at_once * stream))
        return found

    @property
    def _of_each(self) -> Bytes:
        """Of each micro-batch in a pipeline, beside what its blocks keep: rotary angles, and what is sent on."""
        if self.model.dims.pp == 1:
            return of(ACTIVATIONS, 0.0)
        block, count = self.model.block, len(self.stages)
        stream = block.residual * block.tokens * block.width * (count - self.last)
        whole = block.batch * self.model.spec.data.seq_len / self.model.dims.cp
        return add(
            of(ACTIVATIONS, 2 * block.residual * whole * block.head_dim * count), of(TEMPORARY, stream)
        )

    @property
    def _masks(self) -> Bytes:
        """Booleans for documents in a row; eager attention's mask is of numbers."""
        block = self.model.block
        each = {"masked": 1, "eager": block.residual}.get(block.attention, 0)
        return of(TEMPORARY, each * block.batch * block.queries * block.keys)

    @property
    def _keeps_gathered(self) -> bool:
        """Whether weights stay gathered throughout a step; of a pipeline's several stages at most."""
        config = self.model.config
        if config is None:
            return False
        return not config.reshard_after_forward or (self.model.dims.pp > 1 and not self.block_by_block)

    @property
    def a_block(self) -> float:
        """Bytes of a block's parameters, gathered."""
        model = self.model
        base = sum(m.numel * model.share(m) * model.in_block(m) for m in model.matrices)
        if model.spec.quant.scheme != "none" and model.frozen:
            return model.block_bytes + model.adapter_seen * model.block_adapters
        return model.seen * base + model.adapter_seen * model.block_adapters

    def _gathered(self, blocks: float) -> Bytes:
        """FSDP's: what was gathered into, and the parameters made of it; so many times a block.

        Source: torch.distributed.fsdp, _fsdp_collectives.py and _fsdp_param_group.py: going forward, what was
        gathered into stays until the next block is gathered; going back, the next one is gathered ahead.
        """
        if not self.model.sharded:
            return of(BUFFERS, 0.0)
        return of(BUFFERS, max(0.0, blocks - self._keeps_gathered) * self.a_block)

    # --- together -------------------------------------------------------------------------------------------

    def records(self) -> Iterator[RankMemory]:
        """For each kind of rank."""
        model = self.model
        trained = Trained(numbers=self.trained, largest=self.largest, optimizer=self.optimizer)
        strategy = parallel.get(model.spec.parallel.name)
        for around in strategy.memory(model.spec.parallel, model.dims, trained):
            yield self._record(around)

    def _record(self, around: Around) -> RankMemory:
        model = self.model
        stage = self.stage(around)
        optimizer = self.optimizer + around.optimizer
        taught = self.teacher.weights if self.teacher is not None else 0.0
        always = {
            "weights": self.weights + around.weights + taught,
            "adapters": self.adapters,
            "optimizer": optimizer,
        }
        instants = list(stage.moments())
        if around.updating:
            instants.append(
                Instant(moment="optimizer", bytes=of(TEMPORARY, around.updating), with_inside=around.updating)
            )
        if self.teacher is not None:
            listening = add(self.teacher.passing, of(GRADIENTS, stage.gradients if stage.there else 0.0))
            instants.append(Instant(moment="forward", bytes=listening, with_inside=sum(listening)))
        highest = max(instants, key=lambda instant: sum(instant.bytes))
        there = sum(always.values())
        tensors = there + sum(highest.bytes)
        inside = there + max(instant.with_inside for instant in instants)
        kinds = {name: round(size) for name, size in zip(KINDS, stage.highest(instants), strict=True)}
        held = {name: round(size) for name, size in always.items()}
        at_peak = {**held, **{n: round(size) for n, size in zip(KINDS, highest.bytes, strict=True)}}
        host = model.device == "cpu"
        small = pieces.kept(model, highest.bytes)
        outside = Outside(shares=self)
        resident = outside.untouched if host else 0.0
        elsewhere = outside.most(around) if host else 0.0
        return RankMemory(
            stage=self.rank,
            ranks=around.ranks,
            bytes={**held, **kinds},
            at_peak=at_peak,
            tensors=sum(at_peak.values()),
            moment=highest.moment,
            allocator=beside.allocator(
                model.device,
                tensors,
                inside - resident,
                elsewhere,
                made=sum(small),
                gradients=small[GRADIENTS] + (4 * self.trained if around.bucketed else 0.0),
                loaded=outside.let_go if host else 0.0,
                tidy=outside.matrix_by_matrix,
            ),
            runtime=beside.runtime(
                model.device, many=model.dims.world_size > 1, words=model.spec.model.tokenizer != "byte"
            )
            + (round(around.beside) + self._profiler if host else 0),
        )

    @property
    def _profiler(self) -> int:
        monitor = self.model.spec.monitor
        return beside.PROFILER if monitor.name != "none" and monitor.communication_steps else 0
