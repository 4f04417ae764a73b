"""A step of one rank's part of the model: its moments, put together from its blocks' passes (hpcdl.plan.passes)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from hpcdl.plan.block import Block
from hpcdl.plan.loss import Head
from hpcdl.plan.passes import NOTHING, Passes, Peak, block_passes, end_passes
from hpcdl.plan.records import Moment
from hpcdl.plan.tape import ACTIVATIONS, BUFFERS, GRADIENTS, TEMPORARY, Bytes, add


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """A moment of the step, and what is there then."""

    moment: Moment
    bytes: Bytes
    with_inside: float
    """All together, with what operators take for themselves."""


def of(kind: int, size: float) -> Bytes:
    """So many bytes of one kind."""
    return (*NOTHING[:kind], size, *NOTHING[kind + 1 :])


def times(number: float, sizes: Bytes) -> Bytes:
    """By kind."""
    return tuple([number * size for size in sizes])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What a rank has of the model, and how it goes through it."""

    block: Block
    layers: int
    """Blocks here."""
    head: Head | None
    """None: another rank has the loss."""
    embedding: float | None
    """Bytes of the embedding's gradient, 0 where it is frozen; None: another rank has it."""
    tied: bool
    """The head's weight is the embedding's, and both are here."""
    frozen: bool
    recomputed: int
    """Of the blocks those that are computed again on the way back."""
    parked: bool
    """Their inputs wait somewhere else."""
    micro_batches: int
    """Of a step."""
    under_way: float
    """Micro-batches whose forward pass is done and whose backward pass isn't, at most: 1 without a pipeline."""
    bucketed: bool
    """DDP's buckets hold gradients, which are there all the time."""
    gradients: float
    """Bytes of gradients of all that is trained here."""
    largest: float
    """Numbers of the largest gradient."""
    around: Bytes = NOTHING
    """There in both passes: weights gathered, masks, rotary angles."""
    within: Bytes = NOTHING
    """There while blocks are on their way: masks; with blocks that are computed again, until the last of them."""
    block_forward: Bytes = NOTHING
    """There while a block is on its way forward: its weights gathered."""
    block_backward: Bytes = NOTHING
    """The same on its way back."""
    reducing: Bytes = NOTHING
    """The gradients of the block before it, under way to the ranks that keep them."""
    ends: Bytes = NOTHING
    """There in the loss."""
    of_each: Bytes = NOTHING
    """Pipeline: of each micro-batch under way, beside what its blocks keep."""
    after: Bytes = NOTHING
    """Beside the gradients once they are there: what is summed up over ranks, or sent."""
    updating: Bytes = NOTHING
    """Beside the gradients in the optimizer's step."""
    shards: int = 0
    """FSDP: ranks that share each gradient once its block is through; 0: there is no FSDP."""
    seen: int = 4
    """FSDP: bytes of a gathered number."""

    # --- its blocks ---------------------------------------------------------------------------------------

    @property
    def stream(self) -> float:
        """Bytes of what goes from block to block."""
        return self.block.residual * self.block.tokens * self.block.width

    @cached_property
    def there(self) -> bool:
        """Whether gradients of an earlier micro-batch are there."""
        return self.micro_batches > 1

    @property
    def _into(self) -> bool:
        """Whether a block's gradients are added to those of an earlier micro-batch at once."""
        return self.there and not self.shards

    def _left(self, passes: Passes) -> float:
        """Bytes of gradients that a pass leaves."""
        if self.there or self.bucketed:
            return 0.0
        return passes.gradients * 4 / self.seen / self.shards if self.shards else passes.gradients

    def _passes(self, *, wants: bool, recompute: bool) -> Passes:
        return block_passes(
            self.block, wants=wants, recompute=recompute, gradients_there=self._into,
            bucketed=self.bucketed and not self.there, parked=self.parked and recompute,
        )  # fmt: skip

    @cached_property
    def plain(self) -> Passes:
        """A block that keeps its activations."""
        return self._passes(wants=True, recompute=False)

    @cached_property
    def again(self) -> Passes:
        """One that is computed again."""
        return self._passes(wants=True, recompute=True)

    @cached_property
    def first(self) -> Passes:
        """The first block here: of a frozen model no gradient goes beyond it."""
        if not self.frozen or self.embedding is None:
            return self.again if self.recomputed else self.plain
        return self._passes(wants=False, recompute=self.recomputed > 0)

    @cached_property
    def others(self) -> Bytes:
        """What all but the first keep."""
        again = self.recomputed - (1 if self.recomputed else 0)
        return add(times(again, self.again.kept), times(self.layers - 1 - again, self.plain.kept))

    @cached_property
    def last(self) -> Passes:
        """The last block here."""
        if self.layers == 1:
            return self.first
        if self.recomputed == self.layers or (self.recomputed and self.layers % 2):
            return self.again
        return self.plain

    @cached_property
    def kept(self) -> Bytes:
        """Of one micro-batch when its forward pass is done."""
        return add(self.first.kept, self.others)

    @cached_property
    def cached(self) -> Bytes:
        """Copies by autocast that nothing but the forward pass needs."""
        again = self.recomputed
        found = times(again, self.again.cached if again else NOTHING)
        return add(found, times(self.layers - again, self.plain.cached if again < self.layers else NOTHING))

    @cached_property
    def end(self) -> Passes | None:
        """The loss's."""
        if self.head is None:
            return None
        return end_passes(
            self.block, self.head, wants=True, gradients_there=self._into,
            bucketed=self.bucketed and not self.there, tied=self.tied,
        )  # fmt: skip

    # --- its moments --------------------------------------------------------------------------------------

    def moments(self) -> Iterator[Instant]:
        """All that may be the highest."""
        gathered = of(GRADIENTS, self.gradients if self.there else 0.0)
        base = add(self.around, gathered)
        # micro-batches of a pipeline that wait for their way back, this one left out
        base = add(base, times(self.under_way - 1, self.kept), times(self.under_way, self.of_each))
        stays = self.recomputed > 0 or self.block.cp > 1  # a mask that the engine has made is the engine's
        if stays:
            base = add(base, self.within)
        entered = self._entered() if stays else add(self._entered(), self.within)
        last_kept = self.last.kept
        before_last = add(self.kept, times(-1, last_kept))
        cast = add(self.cached, times(-1, self.last.cached))  # its own are in what its pass holds
        yield self._at("forward", self.last.forward, base, entered, before_last, cast, self.block_forward)
        left = 0.0
        if self.end is not None:
            yield self._at("loss", self.end.forward, base, self.kept, self.cached, self.ends)
            yield self._at("loss", self.end.backward, base, self.kept, self.ends)
            left = self._left(self.end)
        found = add(base, of(GRADIENTS, left))
        for passes, before, after in self._places():
            rest = of(GRADIENTS, self._left(self.last) * after)
            # FSDP keeps what a block's gradients were reduced from until the next block's are
            reduced = self.reducing if after else NOTHING
            yield self._at("backward", passes.backward, found, before, rest, self.block_backward, reduced)
        yield from self._after(base, found)

    def _places(self) -> Iterator[tuple[Passes, Bytes, int]]:
        """Blocks that may be the highest on the way back, what those before them keep, and how many come after.

        In between, what is held changes evenly: of each kind of block the last one and the first one count.
        """
        yield self.first, NOTHING, self.layers - 1
        if self.layers == 1:
            return
        if self.recomputed in (0, self.layers):
            yield self.last, add(self.kept, times(-1, self.last.kept)), 0
            yield self.last, self.first.kept, self.layers - 2
            return
        # every second one, the first among them, is computed again (hpcdl.distributed.parallelize)
        odd = self.layers % 2
        if self.layers > 2:
            again = add(self.kept, times(-1, self.again.kept), times(odd - 1, self.plain.kept))
            yield self.again, again, 1 - odd
        yield self.plain, add(self.kept, times(-1, self.plain.kept), times(-odd, self.again.kept)), odd
        yield self.plain, self.first.kept, self.layers - 2

    def _entered(self) -> Bytes:
        """The trunk holds the embedding's result in the forward pass, though nothing needs it any more."""
        kept = self.first.kept[ACTIVATIONS] >= self.stream and (self.block.residual == 4 or self.recomputed)
        return of(TEMPORARY, 0.0 if kept and not self.parked else self.stream)

    def _after(self, base: Bytes, found: Bytes) -> Iterator[Instant]:
        """The embedding's gradient, and what becomes of all of them."""
        if self.embedding:
            blocks = self._left(self.first) + self._left(self.last) * (self.layers - 1)
            # a tied head's gradient has waited, and the sum of both is a third tensor
            waits = self.there or self.bucketed or self.shards > 0
            size = self.embedding * ((3 if waits else 2) if self.tied else 1)
            back = add(
                found,
                of(GRADIENTS, blocks),
                of(TEMPORARY, size + self.stream * (2 * self.block.tp if self.block.tp > 1 else 1)),
            )
            yield Instant(moment="backward", bytes=back, with_inside=sum(back))
        whole = of(GRADIENTS, 0.0 if self.bucketed else self.gradients)
        sent = add(whole, self.after)
        yield Instant(moment="backward", bytes=sent, with_inside=sum(sent))
        # the norm is taken in fp64: torch casts a gradient for it
        stepped = add(whole, self.updating)
        yield Instant(
            moment="optimizer",
            bytes=stepped,
            with_inside=sum(whole) + max(8 * self.largest, sum(self.updating)),
        )

    def _at(self, moment: Moment, peak: Peak, *rest: Bytes) -> Instant:
        beside = add(*rest)
        return Instant(
            moment=moment, bytes=add(peak.bytes, beside), with_inside=peak.with_inside + sum(beside)
        )

    def highest(self, instants: Sequence[Instant]) -> Bytes:
        """Each kind by itself, from what `moments` gave."""
        under_way = times(self.under_way, self.kept)
        end = self.end.highest if self.end else NOTHING
        found = [max(each) for each in zip(*(instant.bytes for instant in instants), strict=True)]
        block = tuple(map(max, self.first.highest, self.last.highest))
        wide = tuple(map(max, found, block, end))
        done = list(map(max, wide, add(under_way, self.around)))
        done[GRADIENTS] = 0.0 if self.bucketed else self.gradients + self.around[GRADIENTS]
        others = (
            self.kept[BUFFERS] + self.cached[BUFFERS] - self.last.kept[BUFFERS] - self.last.cached[BUFFERS]
        )
        done[BUFFERS] = max(done[BUFFERS], others + self.last.highest[BUFFERS])
        return tuple(done)
