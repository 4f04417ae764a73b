"""What a pass through a network holds, operation by operation, in bytes: autograd's bookkeeping without numbers.

A description of a forward pass (hpcdl.plan.block, hpcdl.plan.loss) is played on a Tape: each operation makes results
of so many bytes and says what autograd saves of it; going back, gradients are made, saved tensors let go, and
gradients of a weight stay, in the order in which torch's engine does it (torch/csrc/autograd/engine.cpp: nodes by
falling sequence number; a node's inputs go when its function returns, then what it saved; a second gradient of one
tensor is added in place where nobody else holds the first, input_buffer.cpp). So the highest moment is found rather
than guessed, in some hundred additions a block.

What an operator takes for itself and gives back (`inside`: workspaces of kernels) stands in `with_inside` only: the
tracker of a CPU run doesn't see it (hpcdl.worker.storages), a GPU's allocator does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

KINDS = ("activations", "recomputed", "logits", "buffers", "gradients", "temporary")
"""What a step makes (hpcdl.worker.storages)."""
(ACTIVATIONS, RECOMPUTED, LOGITS, BUFFERS, GRADIENTS, TEMPORARY) = range(6)

Bytes = tuple[float, ...]
"""By kind, in the order of KINDS."""


@dataclass(slots=True)
class Store:
    """Memory of one tensor and its views."""

    bytes: float
    kind: int
    refs: int = 1
    """Python names, saved tensors and gradients under way that hold it."""


@dataclass(slots=True, eq=False)
class Var:
    """A tensor of the forward pass."""

    store: Store
    wants: bool
    """Whether a gradient goes back through it."""
    bytes: float
    """Of its gradient."""
    grad: Store | None = None


@dataclass(slots=True, eq=False)
class Weight:
    """A parameter; `bytes` of its gradient, 0: frozen."""

    bytes: float
    grad: Store | None = None
    bucketed: bool = False
    """DDP: its gradient goes into a bucket as soon as it is there."""

    @property
    def wants(self) -> bool:
        """Whether it gets a gradient."""
        return self.bytes > 0


@dataclass(slots=True)
class Node:
    """An operation that a gradient goes back through."""

    out: Var
    to: Sequence[tuple[Var | Weight, float]]
    """What gets a gradient, and of how many bytes it is made before it is cast to the tensor's own dtype; less than
    0: the result's own gradient is passed on, as a view."""
    saved: list[Store]
    inside: float = 0.0
    """Bytes that going back takes and gives back."""
    passing: tuple[float, int] = (0.0, TEMPORARY)
    """The same, of tensors that are seen, and their kind."""


@dataclass(slots=True)
class Tape:
    """Live bytes; their highest, and what they were then."""

    saving: int | None = ACTIVATIONS
    """What saved tensors count as; None: they are not kept (a block that will be computed again)."""
    kind: int = TEMPORARY
    """What operations make."""
    live: list[float] = field(default_factory=lambda: [0.0] * len(KINDS))
    highest: list[float] = field(default_factory=lambda: [0.0] * len(KINDS))
    total: float = 0.0
    peak: float = 0.0
    at_peak: Bytes = (0.0,) * len(KINDS)
    with_inside: float = 0.0
    """The peak with what operators take for themselves."""
    nodes: list[Node] = field(default_factory=list)

    # --- memory -------------------------------------------------------------------------------------------

    def new(self, size: float, kind: int | None = None) -> Store:
        """A tensor's memory, held by whoever called."""
        kind = self.kind if kind is None else kind
        live = self.live
        live[kind] += size
        self.total += size
        if live[kind] > self.highest[kind]:
            self.highest[kind] = live[kind]
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, tuple(live)
            if self.total > self.with_inside:
                self.with_inside = self.total
        return Store(size, kind)

    def drop(self, store: Store) -> None:
        """Somebody lets go of it."""
        store.refs -= 1
        if not store.refs:
            self.live[store.kind] -= store.bytes
            self.total -= store.bytes

    def drop_all(self, stores: Iterable[Store]) -> None:
        """The same of many."""
        for store in stores:
            self.drop(store)

    def take(self, size: float) -> None:
        """An operator takes so much for itself, and gives it back."""
        self.with_inside = max(self.with_inside, self.total + size)

    def pass_by(self, size: float, kind: int | None = None) -> None:
        """A tensor comes and goes."""
        if size:
            self.drop(self.new(size, kind))

    def turn(self, store: Store, kind: int) -> None:
        """It has become something else."""
        self.live[store.kind] -= store.bytes
        store.kind = kind
        self.live[kind] += store.bytes
        self.highest[kind] = max(self.highest[kind], self.live[kind])
        if self.total == self.peak:
            self.at_peak = tuple(self.live)

    # --- forward ------------------------------------------------------------------------------------------

    def var(self, size: float, *, wants: bool, kind: int | None = None) -> Var:
        """A tensor that no operation of the tape has made."""
        return Var(self.new(size, kind), wants, size)

    def op(
        self,
        size: float,
        *,
        to: Sequence[tuple[Var | Weight, float]] = (),
        saves: Sequence[Store] = (),
        view: Store | None = None,
        kind: int | None = None,
        inside: float = 0.0,
        passing: tuple[float, int] = (0.0, TEMPORARY),
        unmade: bool = False,
    ) -> Var:
        """An operation's result.

        Args:
            size: of the result.
            to: as Node's; those that want no gradient are left out here.
            saves: what autograd saves of it, where a gradient goes back at all.
            view: the result lies in this memory.
            kind: of the result; as the tape's.
            inside: as Node's, on the way back.
            passing: as Node's.
            unmade: the result is never made, only what is saved of it.
        """
        to = [pair for pair in to if pair[0].wants]
        if view is not None:
            view.refs += 1
        out = Var(self.new(0.0 if unmade else size, kind) if view is None else view, bool(to), size)
        if to:
            kept = []
            if self.saving is not None:
                for store in saves:
                    store.refs += 1
                    if store.kind == TEMPORARY:
                        self.turn(store, self.saving)
                    kept.append(store)
            self.nodes.append(Node(out, to, kept, inside, passing))
        return out

    def done(self, *variables: Var) -> None:
        """Python names go."""
        for variable in variables:
            self.drop(variable.store)

    # --- backward -----------------------------------------------------------------------------------------

    def back(self, upto: int = 0) -> None:
        """Goes back through the nodes from the last to number `upto`; gradients wait in `Var.grad`."""
        while len(self.nodes) > upto:
            self._apply(self.nodes.pop())

    def _apply(self, node: Node) -> None:
        given, node.out.grad = node.out.grad, None
        if given is None:  # nothing came back: a result that nobody used
            self.drop_all(node.saved)
            return
        made: list[tuple[Var | Weight, Store]] = []
        for each, size in node.to:
            if size < 0:
                given.refs += 1
                made.append((each, given))
            else:
                made.append((each, self.new(size)))
        if node.passing[0]:
            self.pass_by(*node.passing)
        if node.inside:
            self.take(node.inside)
        self.drop(given)
        self.drop_all(node.saved)
        for each, store in made:
            self._give(each, store)

    def _give(self, to: Var | Weight, store: Store) -> None:
        if store.bytes != to.bytes:  # made in another dtype than the tensor's: cast
            cast = self.new(to.bytes)
            self.drop(store)
            store = cast
        if to.grad is None:
            if isinstance(to, Weight) and to.bucketed:
                self.drop(store)
                return
            if isinstance(to, Weight):
                self.turn(store, GRADIENTS)
            to.grad = store
            return
        if to.grad.refs > 1:  # somebody else has it too: not in place
            total = self.new(to.bytes)
            self.drop(to.grad)
            to.grad = total
        self.drop(store)


def add(first: Sequence[float], *others: Sequence[float]) -> Bytes:
    """By kind."""
    return tuple([sum(each) for each in zip(first, *others, strict=True)])
