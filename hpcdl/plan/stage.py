"""A step of one rank's part of the model: its moments, put together from its blocks' passes (hpcdl.plan.passes)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from hpcdl.plan.block import Block
from hpcdl.plan.crowd import Crowd
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
    crowds: tuple[Crowd, ...]
    """What of other micro-batches is there at moments that may be the highest."""
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
    staying: float = 0.0
    """Pipeline under FSDP: bytes of a block's weights that stay gathered once it has been gone back through, until its
    next forward pass."""
    whole: float = 0.0
    """Pipeline under FSDP: bytes of gradients, which are shared out after the last backward pass only; 0: shared out
    block by block."""
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
        return any(crowd.there for crowd in self.crowds)

    @property
    def _own(self) -> bool:
        """Whether the part of the model that is gone through has them; `moments` takes those one by one."""
        return self.crowds[0].own

    @property
    def _into(self) -> bool:
        """Whether a block's gradients are added to those of an earlier micro-batch at once."""
        return self._own and not self.shards

    def _left(self, passes: Passes) -> float:
        """Bytes of gradients that a pass leaves."""
        if self._own or self.bucketed:
            return 0.0
        if not self.shards:
            return passes.gradients
        return passes.gradients * 4 / self.seen / (1 if self.whole else self.shards)

    def _passes(self, *, wants: bool, recompute: bool) -> Passes:
        return block_passes(
            self.block, wants=wants, recompute=recompute, gradients_there=self._into,
            bucketed=self.bucketed and not self._own, parked=self.parked and recompute,
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
        plain = self.layers - 1 - again
        return add(
            times(again, self.again.kept) if again else NOTHING,
            times(plain, self.plain.kept) if plain else NOTHING,
        )

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
            bucketed=self.bucketed and not self._own, tied=self.tied,
        )  # fmt: skip

    # --- its moments --------------------------------------------------------------------------------------

    def moments(self) -> Iterator[Instant]:
        """All that may be the highest."""
        for own in {crowd.own for crowd in self.crowds}:
            alike = tuple(crowd for crowd in self.crowds if crowd.own == own)
            stage = self if len(alike) == len(self.crowds) else replace(self, crowds=alike)
            for crowd in alike:
                yield from stage.of_a_crowd(crowd)
        yield from self._done()

    def of_a_crowd(self, crowd: Crowd) -> Iterator[Instant]:
        """Those of one pass, forward or back."""
        base = self._others(crowd)
        stays = self.recomputed > 0 or self.block.cp > 1  # a mask that the engine has made is the engine's
        if stays:
            base = add(base, self.within)
        if crowd.back:
            yield from self._backward(crowd, base)
            return
        entered = self._entered() if stays else add(self._entered(), self.within)
        last_kept = self.last.kept
        before_last = add(self.kept, times(-1, last_kept))
        cast = add(self.cached, times(-1, self.last.cached))  # its own are in what its pass holds
        yield self._at("forward", self.last.forward, base, entered, before_last, cast, self.block_forward)
        if self.staying and crowd.there:  # its blocks are let go one by one
            left = of(BUFFERS, self.staying * self.layers)
            yield self._at("forward", self.first.forward, base, entered, self.first.cached, left)
        if self.end is not None and crowd.end:
            yield self._at("loss", self.end.forward, base, self.kept, self.cached, self.ends)

    def _backward(self, crowd: Crowd, base: Bytes) -> Iterator[Instant]:
        left = 0.0
        if self.end is not None and crowd.end:
            yield self._at("loss", self.end.backward, base, self.kept, self.ends)
            left = self._left(self.end)
        found = add(base, of(GRADIENTS, left))
        for passes, before, after in self._places():
            rest = add(of(GRADIENTS, self._left(self.last) * after), of(BUFFERS, self.staying * after))
            # FSDP keeps what a block's gradients were reduced from until the next block's are
            reduced = self.reducing if after else NOTHING
            yield self._at("backward", passes.backward, found, before, rest, self.block_backward, reduced)
        yield from self._embedded(found)

    def _others(self, crowd: Crowd) -> Bytes:
        """Of other micro-batches: what they keep, and the gradients that they have left."""
        gradients = (self.whole or self.gradients) * crowd.there
        found = add(self.around, of(GRADIENTS, gradients))
        found = add(found, times(crowd.under_way - 1, self.kept), times(crowd.under_way, self.of_each))
        if crowd.losses and self.end is not None:
            found = add(found, times(crowd.losses, self.end.kept))
        if crowd.split:
            found = add(found, of(TEMPORARY, crowd.split * self.layers * self.block.split_gradients))
        return found

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

    def _embedded(self, found: Bytes) -> Iterator[Instant]:
        """The embedding's gradient."""
        if not self.embedding:
            return
        blocks = self._left(self.first) + self._left(self.last) * (self.layers - 1)
        # a tied head's gradient has waited, and the sum of both is a third tensor
        waits = self._own or self.bucketed or self.shards > 0
        size = self.embedding * ((3 if waits else 2) if self.tied else 1)
        back = add(
            found,
            of(GRADIENTS, blocks),
            of(BUFFERS, self.staying * self.layers),
            of(TEMPORARY, size + self.stream * (2 * self.block.tp if self.block.tp > 1 else 1)),
        )
        yield Instant(moment="backward", bytes=back, with_inside=sum(back))

    def _done(self) -> Iterator[Instant]:
        """What becomes of all gradients."""
        if self.whole:  # shared out a block at a time, with all weights still gathered
            sharing = add(
                self.around,
                of(GRADIENTS, self.whole),
                of(BUFFERS, self.staying * self.layers),
                times(1 + 1 / max(1, self.shards), self.reducing),
            )
            yield Instant(moment="backward", bytes=sharing, with_inside=sum(sharing))
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
        most = max(crowd.under_way for crowd in self.crowds)
        under_way = times(most, self.kept)
        end = self.end.highest if self.end else NOTHING
        found = [max(each) for each in zip(*(instant.bytes for instant in instants), strict=True)]
        block = tuple(map(max, self.first.highest, self.last.highest))
        wide = tuple(map(max, found, block, end))
        done = list(map(max, wide, add(under_way, self.around)))
        done[GRADIENTS] = 0.0 if self.bucketed else self.whole or self.gradients
        others = (
            self.kept[BUFFERS] + self.cached[BUFFERS] - self.last.kept[BUFFERS] - self.last.cached[BUFFERS]
        )
        done[BUFFERS] = max(done[BUFFERS], others + self.last.highest[BUFFERS])
        return tuple(done)
