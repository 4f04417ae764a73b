"""Pipeline parallel on the torch side: the whole model → this rank's stages → an engine that drives them.

The order of passes and what travels when are torch.distributed.pipelining's schedules; the loss is the last
stage's own output. Copies of a pipeline add up their gradients after the last backward pass of a step, and
not by DDP, whose hooks don't fire where inputs' and weights' gradients are computed apart.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import pipelining
from torch.distributed.fsdp import FSDPModule

from hpcdl.distributed import stages as layout
from hpcdl.distributed.collectives import average
from hpcdl.distributed.decoder import Stage, cut, inner, is_tied, named_parameters, trunk
from hpcdl.distributed.engine import Batch, Engine, local, settle
from hpcdl.distributed.mesh import Grid
from hpcdl.distributed.parallelize import Job
from hpcdl.errors import HpcdlError


def split(config: Any, model: Any, grid: Grid, job: Job) -> list[Stage]:
    """This rank's stages, cut out of the whole model; what other ranks hold is freed.

    Args:
        config: the strategy's MeshConfig.
        model: whole, the same on every rank; taken apart in place.
        grid: the degrees and this rank's place.
        job: for the length of a sequence, of which a block's cost depends.

    Raises:
        HpcdlError: the model has too few blocks, or a head that is no plain matrix.
    """
    if not Stage(model).has_plain_head():
        raise HpcdlError(
            f"parallel.pp: a {inner(model).config.model_type} can't be cut into stages, since it computes more"
            " between embedding and loss than its blocks and a matrix; set parallel.pp=1"
        )
    schedule, ranks = layout.SCHEDULES[config.schedule], grid.dims.pp
    count = ranks * layout.stages_per_rank(config.schedule, config.stages_per_rank)
    blocks, shape = len(trunk(model).layers), inner(model).config
    if blocks < count:
        raise HpcdlError(
            f"parallel.pp={ranks}: the model's {blocks} blocks don't make {count} stages; "
            f"set parallel.pp to {blocks * ranks // count or 1} at most"
        )
    parts = layout.partition(
        [layout.block_cost(shape, job.seq_len)] * blocks, count, head=layout.head_cost(shape)
    )
    tied = _name_of_tied(model)
    mine = layout.held_by(schedule.placement, grid.rank("pp"), ranks, count)
    stages = []
    for place in mine:
        part, is_last = parts[place], place == count - 1
        own = model if place == mine[-1] else _same_weights(model)
        stage = cut(own, part.start, part.stop, is_first=place == 0, is_last=is_last)
        stage.tied = tied if place == 0 or is_last else None
        stages.append(stage)
    return stages


def _work(stage: Any, seq_len: int) -> float:
    """Floating-point operations of a stage's forward pass, a token."""
    shape = inner(stage.model).config
    head = layout.head_cost(shape) if stage.is_last else 0.0
    return len(trunk(stage.model).layers) * layout.block_cost(shape, seq_len) + head


def _name_of_tied(model: Any) -> str | None:
    """The embedding's name in the whole model, where it is the head too and trained."""
    weight = inner(model).get_input_embeddings().weight
    if not is_tied(model) or not weight.requires_grad:
        return None
    return next(name for name, parameter in named_parameters(Stage(model)).items() if parameter is weight)


def _same_weights(model: Any) -> Any:
    """The modules once more, around the same tensors."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


class PipelineEngine(Engine):
    """Drives a rank's stages; the ranks of a pipeline get the same micro-batches."""

    def __init__(self, config: Any, stages: Sequence[nn.Module], grid: Grid, job: Job) -> None:
        """As Engine.

        Args:
            config: the strategy's MeshConfig.
            stages: from `split`, under FSDP where it is on.
            grid: this rank's place.
            job: its micro-batches are what each step brings.
        """
        super().__init__(stages, grid, job.make_optimizer, autocast=job.autocast)
        kind, self._ranks = layout.SCHEDULES[config.schedule], grid.dims.pp
        self._group, self._rank = grid.group("pp"), grid.rank("pp")
        self._placement, self._count = kind.placement, self._ranks * len(stages)
        self._places = layout.held_by(kind.placement, self._rank, self._ranks, self._count)
        self._round = config.microbatches or job.micro_batches
        assert job.micro_batches % self._round == 0, "checked before submission"
        assert not layout.does_not_fit(config.schedule, self._ranks, self._round), "checked before submission"
        self._cp_method = config.cp_method
        self._bucket_bytes = config.bucket_cap_mb * 2**20
        self._shards = any(isinstance(stage, FSDPModule) for stage in stages)
        if kind.splits_backward:  # the second half of a backward pass asks for the parameters of the first
            for stage in stages:
                if isinstance(stage, FSDPModule):
                    stage.set_reshard_after_forward(False)
        self._has_last = self._count - 1 in self._places
        self.work = sum(_work(stage, job.seq_len) for stage in stages)
        self.reports = self.reports and self._has_last
        if job.autocast:  # around the forward pass alone: schedules run backward passes in between
            for stage in stages:
                within = torch.autocast(self.device.type, torch.bfloat16)
                setattr(stage, "forward", within(stage.forward))  # noqa: B010
        # NCCL opens a group's channels at its first collective, which all its ranks must take part in.
        dist.all_reduce(torch.zeros(1, device=self.device), group=self._group)
        self._scale = 1.0
        self._schedule = self._make_schedule(kind)
        self._tie = Tie(self)
        self._arriving: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self._announced: set[int] = set()

    def _make_schedule(self, kind: layout.Schedule) -> Any:
        stages = [
            pipelining.PipelineStage(stage, place, self._count, self.device, group=self._group)
            for place, stage in zip(self._places, self.stages, strict=True)
        ]
        make: Any = getattr(pipelining, kind.torch_name)
        single = issubclass(make, pipelining.schedules.PipelineScheduleSingle)
        # The sum over micro-batches is what is wanted: the loss is scaled by the tokens of all of them.
        return make(
            stages[0] if single else stages,
            self._round,
            loss_fn=lambda loss, _: loss * self._scale,
            scale_grads=False,
        )

    # --- a step -------------------------------------------------------------------------------------------

    def accumulate(self, batches: Sequence[Batch], targets: int) -> Tensor:
        """As Engine's; only the ranks with the last stage have a part of the loss."""
        assert len(batches) % self._round == 0
        self._scale = self.grid.dims.gradient_ranks / targets
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for at in range(0, len(batches), self._round):
            total += self._run(batches[at : at + self._round])
        lost = [name for name, parameter in self.trainable.items() if parameter.grad is None]
        assert not lost, f"no gradient came to {lost}"
        settle(self.trainable.values())
        if not self._shards and self.grid.dims.gradient_ranks > 1:
            average(
                [_gradient(p) for p in self.trainable.values()], self.grid.gradient_group, self._bucket_bytes
            )
        self._tie.add_up()
        return total if self.reports else torch.zeros_like(total)

    def _run(self, batches: Sequence[Batch]) -> Tensor:
        """One round through the pipeline and back."""
        inputs = [self._inputs(batch) for batch in batches]
        whole = {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}
        tokens = whole.pop("input_ids")
        arguments = (tokens,) if 0 in self._places else ()
        labels = whole["labels"] if self._has_last else None
        losses: Tensor | None = self._schedule.step(*arguments, target=labels, **whole)
        if losses is None:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return losses.detach().sum(dtype=torch.float64)

    def _inputs(self, batch: Batch) -> Batch:
        """What stages are given of a micro-batch."""
        if self.grid.dims.cp == 1:
            return batch
        from hpcdl.distributed.context import cut_batch

        return cut_batch(self._cp_method, self.grid, batch)

    def counted(self) -> Iterable[nn.Parameter]:
        """All parameters, but for the copy of a tied embedding."""
        return (p for p in self.trainable.values() if p is not self._tie.copy)

    # --- evaluation ---------------------------------------------------------------------------------------

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """As Engine's.

        Not by the schedule: the V-shaped ones can't go forward only, and each change between training and
        evaluation would have it find out shapes anew.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.stages.eval()
        with torch.no_grad():
            for at in range(0, len(batches), self._round):
                total += self._forward_only([self._inputs(b) for b in batches[at : at + self._round]])
        self.stages.train()
        return total if self.reports else torch.zeros_like(total)

    def _forward_only(self, batches: Sequence[Batch]) -> Tensor:
        """All batches through a stage, then through this rank's next; no rank waits for a later stage."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        here: list[Tensor] = []
        sending: list[tuple[dist.Work, Tensor]] = []
        for place, stage in zip(self._places, self.stages, strict=True):
            outputs = self._outputs(place, stage, batches, here)
            if place == self._count - 1:
                total += torch.cat(list(outputs)).sum(dtype=torch.float64)
            elif self._owner(place + 1) == self._rank:
                here = list(outputs)
            else:
                if place > 0 and self._owner(place - 1) == self._owner(place + 1):
                    # Two ranks in a ring share one channel for both ways: first everything is taken from it.
                    outputs = iter(list(outputs))
                sending += [self._send(place, out) for out in outputs]
        for work, _ in sending:
            work.wait()
        return total

    def _outputs(
        self, place: int, stage: nn.Module, batches: Sequence[Batch], here: Sequence[Tensor]
    ) -> Iterator[Tensor]:
        """What a stage makes of each batch, when it is asked for; `here`: what the one before made, if on this rank."""
        for number, batch in enumerate(batches):
            rest = dict(batch)
            tokens = rest.pop("input_ids")
            if place == 0:
                inputs = tokens
            elif self._owner(place - 1) == self._rank:
                inputs = here[number]
            else:
                inputs = self._receive(place)
            yield stage(inputs, **rest)

    def _owner(self, place: int) -> int:
        return layout.owner(self._placement, place, self._ranks)

    def _send(self, place: int, out: Tensor) -> tuple[dist.Work, Tensor]:
        to = dist.get_global_rank(self._group, self._owner(place + 1))
        out = out.contiguous()
        if place not in self._announced:  # all batches have one shape: it is told once
            self._announced.add(place)
            dist.send_object_list([(out.shape, out.dtype)], to, self._group, self.device)
        work = dist.isend(out, to, self._group)
        assert work is not None, "this rank is in the group"
        return work, out

    def _receive(self, place: int) -> Tensor:
        source = dist.get_global_rank(self._group, self._owner(place - 1))
        if place not in self._arriving:
            told: list[Any] = [None]
            dist.recv_object_list(told, source, self._group, self.device)
            self._arriving[place] = told[0]
        shape, dtype = self._arriving[place]
        arrived = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(arrived, source, self._group)
        return arrived

    # --- state --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """As Engine's; a tied embedding has one name, and both of its ranks the same content."""
        return self._tie.under_one_name(super().state())

    def restored(self, step: int, keys: frozenset[str]) -> None:
        """As Engine's."""
        super().restored(step, keys)
        self._tie.fill_copy()


class Tie:
    """An embedding on the first stage that is the output head on the last one too, as a copy.

    Both start equal, get the sum of both gradients, and so take the same steps.
    """

    def __init__(self, engine: PipelineEngine) -> None:
        self._engine = engine
        self.name = ""
        self.first: nn.Parameter | None = None
        self.copy: nn.Parameter | None = None
        self._copy_name = ""
        stages: list[Any] = list(engine.stages)
        if stages[0].is_first and stages[0].tied:
            self.name = stages[0].tied
            self.first = engine.trainable[self.name]
        if stages[-1].is_last and stages[-1].tied:
            self.name = stages[-1].tied
            self.copy = stages[-1].head().weight
            self._copy_name = next(n for n, p in engine.trainable.items() if p is self.copy)

    def add_up(self) -> None:
        """Gives both the sum of their gradients, the same to the last bit."""
        if self.first is not None and self.copy is not None:
            mine, others = _gradient(self.first), _gradient(self.copy)
            mine += others
            others.copy_(mine)
            return
        weight = self.copy if self.first is None else self.first
        if weight is None:
            return
        engine = self._engine
        peer = dist.get_global_rank(engine._group, 0 if self.first is None else engine._ranks - 1)
        mine = _gradient(weight)
        sent, others = mine.contiguous(), torch.empty_like(mine)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, peer, engine._group),
                dist.P2POp(dist.irecv, others, peer, engine._group),
            ]
        )
        for work in works:
            work.wait()
        mine += others

    def under_one_name(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The copy's entries as the embedding's; left out where the embedding itself is on this rank."""
        if self.copy is None:
            return state
        found: dict[str, Tensor] = {}
        for key, value in state.items():
            for kind in ("model.", "optimizer."):
                name = f"{kind}{self._copy_name}"
                if key == name or key.startswith(f"{name}."):
                    key = f"{kind}{self.name}{key.removeprefix(name)}"
            found.setdefault(key, value)
        return found

    def fill_copy(self) -> None:
        """Sets the copy to the embedding where both are on this rank and only one was loaded."""
        if self.first is None or self.copy is None:
            return
        states = self._engine.optimizer.state
        with torch.no_grad():
            local(self.copy).copy_(local(self.first))
            for key, value in states[self.first].items():
                local(states[self.copy][key]).copy_(local(value))


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "checked after the backward passes"
    return local(parameter.grad)
