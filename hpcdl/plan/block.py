"""A decoder block's passes, told to a Tape: what transformers' Llama does (modeling_llama.py, 5.23), line by line.

With what hpcdl and peft put around it: autocast's casts (torch/csrc/autocast_mode.cpp: those of trained fp32 weights
are kept to the end of the forward pass), LoRA's and DoRA's way beside a matrix (peft 0.21, tuners/lora), matrices held
in few bits (hpcdl.distributed.held), tensor and context parallel's collectives (hpcdl.distributed.tensor, context).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hpcdl.plan import adapter, attention
from hpcdl.plan.tape import BUFFERS, TEMPORARY, Store, Tape, Var, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One of a block's matrices on this rank."""

    rows: float
    """Outputs that are here."""
    columns: float
    """Inputs that are here."""
    trained: bool
    held: int
    """Bytes of a number as the pass finds it: 4, or 2; what isn't in the compute dtype is cast."""
    whole: float = 0.0
    """Bytes that making it whole takes while it is used; 0: it is used as it is."""
    form: str = "plain"
    """`plain`; `held` (made whole each time); `scaled` (the product is scaled once more); `rounded` (trained through
    rounding); `zeros` (its zeros get no gradient)."""
    rank: int = 0
    """Of the adapter beside it; 0: none."""
    lengths: bool = False
    """DoRA's."""
    dropout: bool = False
    """Before the adapter."""

    @property
    def numel(self) -> float:
        """Numbers of it."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What a block's passes depend on: everything that is here, on one rank, of one micro-batch."""

    batch: int
    """Sequences."""
    length: float
    """Tokens of a sequence that this rank computes norms and residuals of."""
    keys: float
    """Tokens of a sequence that attention looks at."""
    queries: float
    """Tokens of a sequence that ask, on this rank."""
    width: int
    heads: float
    kv_heads: float
    head_dim: int
    inner: float
    compute: int
    """Bytes of a number in products."""
    residual: int
    """Bytes of a number between blocks."""
    norms: int
    """Bytes of a norm's weight as the pass finds it."""
    trained_norms: bool
    adapters: int
    """Bytes of an adapter's number as the pass finds it."""
    linears: tuple[tuple[str, Linear], ...]
    """By transformers' names."""
    attention: str = "flash"
    """`flash` (causal, no mask), `masked` (documents in a row), `eager`."""
    gpu: bool = False
    tp: int = 1
    """Ranks that share each matrix."""
    split_stream: bool = False
    """Sequence parallel: between the matrices a rank has its part of each sequence."""
    cp: int = 1
    swap: bool = False
    """Context parallel by all-to-all; else keys and values are gathered."""

    @property
    def tokens(self) -> float:
        """On the stream."""
        return self.batch * self.length

    @property
    def inside(self) -> float:
        """Tokens between the matrices: all of them, though the stream is split."""
        return self.batch * self.length * (self.tp if self.split_stream else 1)

    @property
    def split_gradients(self) -> float:
        """Bytes that wait where gradients of inputs are computed first: of each trained matrix's result, and norm's.

        Source: torch.distributed.pipelining, _backward.py, `param_groups`.
        """
        results = sum(
            (linear.rows if linear.trained or linear.rank else 0.0) + linear.rank
            for _, linear in self.linears
        )
        norms = 2 * self.width if self.trained_norms else 0
        return self.compute * self.inside * results + self.residual * self.tokens * norms


@dataclass(slots=True)
class Passing:
    """A block on its way over a tape."""

    block: Block
    tape: Tape
    weights: list[Weight] = field(default_factory=list)
    """Whose gradients stay."""
    casts: dict[int, Var] = field(default_factory=dict)
    """autocast's cache."""
    bucketed: bool = False
    gradients_there: bool = False
    """Whether an earlier micro-batch has left gradients."""
    matrices: dict[str, Linear] = field(default_factory=dict)
    known: dict[tuple[str, str], Weight] = field(default_factory=dict)
    stop: bool = False
    """Computed again: it ends with the last tensor that is saved (torch.utils.checkpoint, early stop)."""
    unmade: bool = False

    def __post_init__(self) -> None:
        self.matrices = dict(self.block.linears)

    # --- pieces -------------------------------------------------------------------------------------------

    def weight(self, name: str, part: str, size: float) -> Weight:
        """A parameter whose gradient is of `size` bytes; 0: frozen."""
        key = (name, part)
        if key not in self.known:
            there = Store(size, 0) if self.gradients_there and size else None
            self.known[key] = Weight(size, grad=there, bucketed=self.bucketed)
        return self.known[key]

    def cast(self, x: Var, size: float) -> Var:
        """`x` in another dtype, of `size` bytes; itself where it has it. Held by the caller."""
        if x.bytes == size:
            x.store.refs += 1
            return x
        return self.tape.op(size, to=[(x, x.bytes)])

    def _cached(self, weight: Weight, numel: float, held: int) -> Var | None:
        """A copy by autocast of a trained weight; None where the weight is used as it is."""
        size = self.block.compute * numel
        if held == self.block.compute:
            return None
        found = self.casts.get(id(weight))
        if found is None:
            found = self.tape.op(size, to=[(weight, weight.bytes)], kind=BUFFERS)
            self.casts[id(weight)] = found
        return found

    def product(self, x: Var, weight: Weight, rows: float, columns: float, tokens: float, held: int) -> Var:
        """nn.Linear under autocast; `x` stays the caller's."""
        tape, e = self.tape, self.block.compute
        states = self.cast(x, e * tokens * columns)
        numel = rows * columns
        copy = self._cached(weight, numel, held) if weight.bytes else None
        passed: Store | None = None
        if not weight.bytes and held != e:  # a frozen weight is cast anew each time
            passed = tape.new(e * numel, BUFFERS)
        to: list[tuple[Var | Weight, float]] = [(states, e * tokens * columns)]
        to.append((weight, e * numel) if copy is None else (copy, e * numel))
        saves = [states.store] if weight.bytes else []
        if states.wants:
            saves += [copy.store] if copy is not None else [passed] if passed is not None else []
        out = tape.op(e * tokens * rows, to=to, saves=saves, unmade=self.unmade)
        tape.done(states)
        if passed is not None:
            tape.drop(passed)
        return out

    def base(self, name: str, x: Var, tokens: float) -> Var:
        """A block's matrix without what is beside it."""
        linear, tape, e = self.matrices[name], self.tape, self.block.compute
        own = self.weight(name, "weight", linear.held * linear.numel if linear.trained else 0.0)
        if linear.form == "plain":
            return self.product(x, own, linear.rows, linear.columns, tokens, linear.held)
        states = self.cast(x, e * tokens * linear.columns)
        if linear.form == "zeros":
            out = self._keeping_zeros(own, linear, states, tokens)
        elif linear.form == "rounded":
            tape.pass_by(linear.whole, BUFFERS)
            to: list[tuple[Var | Weight, float]] = [(states, states.bytes), (own, e * linear.numel)]
            out = tape.op(
                e * tokens * linear.rows, to=to, saves=[states.store], passing=(linear.whole, BUFFERS)
            )
        else:
            whole = tape.new(linear.whole, BUFFERS)
            scaled = e * tokens * linear.rows if linear.form == "scaled" else 0.0
            tape.pass_by(scaled)
            out = tape.op(
                e * tokens * linear.rows,
                to=[(states, states.bytes)],
                passing=(linear.whole + scaled, BUFFERS),
            )
            tape.drop(whole)
        tape.done(states)
        return out

    def _keeping_zeros(self, own: Weight, linear: Linear, states: Var, tokens: float) -> Var:
        """hpcdl.distributed.zeros: the weight passes through a function that masks its gradient."""
        tape, e, n = self.tape, self.block.compute, linear.numel
        kept = tape.op(own.bytes, to=[(own, own.bytes)], view=Store(own.bytes, BUFFERS), passing=(n, BUFFERS))
        source: Var | Weight = kept
        copy = None
        if linear.held != e:  # a view of a weight is no leaf: autocast keeps no copy of it
            copy = tape.op(e * n, to=[(kept, kept.bytes)], kind=BUFFERS)
            source = copy
        saves = [states.store] + ([copy.store] if copy is not None and states.wants else [])
        out = tape.op(e * tokens * linear.rows, to=[(states, states.bytes), (source, e * n)], saves=saves)
        if copy is not None:
            tape.done(copy)
        return out

    # --- tensor parallel's collectives (hpcdl.distributed.tensor) -------------------------------------------

    def enter(self, x: Var) -> Var:
        """The whole sequence from the stream; `x` stays the caller's. Gathered on another dimension than the first: a
        copy (torch.distributed._functional_collectives).
        """
        block, tape, e = self.block, self.tape, self.block.compute
        own, whole = e * block.tokens * block.width, e * block.inside * block.width
        states = self.cast(x, own)
        if block.split_stream:
            tape.pass_by(whole)
            out = tape.op(whole, to=[(states, own)], passing=(whole, TEMPORARY))
        else:
            out = tape.op(own, to=[(states, own)], view=states.store)
        tape.done(states)
        return out

    def leave(self, x: Var, width: float) -> Var:
        """The ranks' summands added up, onto the stream; `x` is used up."""
        block, tape, e = self.block, self.tape, self.block.compute
        own, whole = e * block.tokens * width, e * block.inside * width
        if block.split_stream:
            tape.pass_by(whole)
            out = tape.op(own, to=[(x, whole)], passing=(whole, TEMPORARY))
        else:
            out = tape.op(whole, to=[(x, -1)])
        tape.done(x)
        return out

    # --- norms, attention, MLP ----------------------------------------------------------------------------

    def norm(self, x: Var, name: str, tokens: float, width: float) -> Var:
        """LlamaRMSNorm; `x` stays the caller's."""
        tape, block = self.tape, self.block
        numbers = tokens * width
        wide = self.cast(x, 4 * numbers)
        square = tape.op(
            4 * numbers, to=[(wide, 4 * numbers)], saves=[wide.store], passing=(8 * numbers, TEMPORARY)
        )
        variance = tape.op(4 * tokens, to=[(square, 4 * numbers)])
        tape.done(square)
        root = tape.op(4 * tokens, to=[(variance, 4 * tokens)])
        scale = tape.op(4 * tokens, to=[(root, 4 * tokens)])
        self.save_own(scale)
        tape.done(root)
        normed = tape.op(
            4 * numbers, to=[(wide, 4 * numbers), (scale, 4 * numbers)], saves=[wide.store, scale.store]
        )
        tape.done(scale, wide)
        own = self.weight(name, "weight", block.norms * width if block.trained_norms else 0.0)
        again = self.cast(normed, x.bytes)
        size = max(x.bytes, block.norms * numbers)
        out = tape.op(
            size,
            to=[(again, size), (own, size)],
            saves=[again.store] if own.bytes else [],
        )
        tape.done(again, normed, variance)
        return out

    def save_own(self, out: Var) -> None:
        """The result is saved too, as rsqrt and softmax do."""
        node = self.tape.nodes[-1] if self.tape.nodes else None
        if node is not None and node.out is out and self.tape.saving is not None:
            out.store.refs += 1
            if out.store.kind == TEMPORARY:
                self.tape.turn(out.store, self.tape.saving)
            node.saved.append(out.store)

    def rotary(self, x: Var, numbers: float, wide: int) -> Var:
        """What x · cos + rotate_half(x) · sin makes; `x` stays the caller's."""
        tape, own = self.tape, x.bytes
        size = wide * numbers
        first = tape.op(size, to=[(x, size)])
        half = tape.new(own / 2)
        # rotate_half's slices: each gives a gradient as large as all of x
        whole = tape.op(own, to=[(x, own), (x, own)], passing=(own / 2, TEMPORARY))
        tape.drop(half)
        second = tape.op(size, to=[(whole, size)])
        tape.done(whole)
        out = tape.op(size, to=[(first, -1), (second, -1)])
        tape.done(first, second)
        return out

    def attention(self, x: Var) -> Var:
        """LlamaAttention, from the normed stream to what o_proj gave."""
        block, tape, tokens = self.block, self.tape, self.block.inside
        e = block.compute
        numbers = {"q": tokens * block.heads * block.head_dim, "k": tokens * block.kv_heads * block.head_dim}
        query = adapter.linear(self, "q_proj", x, tokens)
        key = adapter.linear(self, "k_proj", x, tokens)
        value = adapter.linear(self, "v_proj", x, tokens)
        wide = max(e, block.residual)
        turned = self.rotary(query, numbers["q"], wide), self.rotary(key, numbers["k"], wide)
        tape.done(query, key)
        out = attention.softmax(self, *turned, value, numbers)
        result = adapter.linear(self, "o_proj", out, tokens)
        tape.done(out)
        return result

    def mlp(self, x: Var) -> Var:
        """LlamaMLP."""
        block, tape, tokens = self.block, self.tape, self.block.inside
        size = block.compute * tokens * block.inner
        gate = adapter.linear(self, "gate_proj", x, tokens)
        active = tape.op(size, to=[(gate, size)], saves=[gate.store])
        tape.done(gate)
        up = adapter.linear(self, "up_proj", x, tokens)
        both = tape.op(size, to=[(active, size), (up, size)], saves=[active.store, up.store])
        tape.done(active, up)
        self.unmade = self.stop and not self.matrices["down_proj"].rank
        out = adapter.linear(self, "down_proj", both, tokens)
        self.unmade = False
        tape.done(both)
        return out

    def forward(self, x: Var) -> Var:
        """LlamaDecoderLayer; `x` stays the caller's."""
        block, tape = self.block, self.tape
        normed = self.norm(x, "input_layernorm", block.tokens, block.width)
        entered = self.enter(normed) if block.tp > 1 else normed
        attended = self.attention(entered)
        if block.tp > 1:
            tape.done(entered)
        tape.done(normed)
        middle = self.residual(x, attended)
        tape.done(attended)
        normed = self.norm(middle, "post_attention_layernorm", block.tokens, block.width)
        entered = self.enter(normed) if block.tp > 1 else normed
        passed = self.mlp(entered)
        if block.tp > 1:
            tape.done(entered)
        tape.done(normed)
        out = self.residual(middle, passed, unmade=self.stop)
        tape.done(passed, middle)
        return out

    def residual(self, x: Var, beside: Var, *, unmade: bool = False) -> Var:
        """The sum of x and what a part of the block gave."""
        return self.tape.op(max(x.bytes, beside.bytes), to=[(x, -1), (beside, -1)], unmade=unmade)
