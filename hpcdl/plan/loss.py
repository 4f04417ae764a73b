"""The loss on a Tape: output head and cross-entropy in chunks of tokens (hpcdl.distributed.losses, line by line)."""

from __future__ import annotations

from dataclasses import dataclass

from hpcdl.plan.tape import BUFFERS, LOGITS, TEMPORARY, Store, Tape, Var, Weight

CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**27}
HELD_WEIGHTS = {"cpu": 2**25, "cuda": 2**27}
"""As hpcdl.distributed.losses has them (which imports torch); a test compares them."""
DISTILLED = 6
"""As hpcdl.distributed.distillation has it (MATRICES)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the loss depends on."""

    tokens: float
    """Of a micro-batch on this rank; all are taken for targets."""
    width: int
    rows: float
    """Of the vocabulary on this rank."""
    chunk_rows: float
    """Of the rank that has most: chunks are the same on all of them."""
    compute: int
    """Bytes of a number in products."""
    held: int
    """Bytes of the head's numbers as the loss finds them."""
    trained: bool
    part: float = 0.0
    """Rows that are made whole at a time, of a head in few bits; 0: it is used as it is."""
    of_a_part: float = 0.0
    """Bytes of such a part, with what making it takes."""
    gathered: int = 1
    """Ranks that have some rows each, all of which are gathered first (`loss_parallel=false`)."""
    device: str = "cpu"
    teacher: int = 0
    """Width of the teacher that is learned from; 0: none."""
    teacher_held: int = 4
    """Bytes of a number of its head."""


def loss(tape: Tape, hidden: Var, head: Head, own: Weight) -> Var:
    """The summed loss; `hidden` stays the caller's.

    Args:
        tape: where it is played.
        hidden: the last norm's result, or what was gathered of it.
        head: the sizes.
        own: the head's weight.
    """
    tape.kind = LOGITS
    e, numbers = head.compute, head.tokens * head.width
    # labels != IGNORE, and both indices of what is kept
    index = tape.new(17 * head.tokens)
    picked = tape.op(hidden.bytes, to=[(hidden, hidden.bytes)], saves=[index], passing=(0.0, TEMPORARY))
    rows = picked
    if picked.bytes != e * numbers:
        rows = tape.op(e * numbers, to=[(picked, picked.bytes)])
        tape.done(picked)
    labels = tape.new(8 * head.tokens)
    source: Var | Weight = own
    whole: Var | None = None
    if head.gathered > 1:
        size = head.held * head.rows * head.width
        source = whole = tape.op(size, to=[(own, own.bytes)], kind=BUFFERS)
        if not own.bytes:
            source = own
    if head.teacher:
        out = _distilled(tape, rows, head, source)
    elif head.part:
        out = _in_parts(tape, rows, head)
    else:
        out = _chunked(tape, rows, head, source)
    if whole is not None:
        tape.done(whole)
    tape.done(rows)
    tape.drop_all([index, labels])
    tape.kind = TEMPORARY
    return out


def _chunked(tape: Tape, rows: Var, head: Head, own: Var | Weight) -> Var:
    """LinearCrossEntropy."""
    e, numel = head.compute, head.rows * head.width
    matrix = tape.new(e * numel) if head.held != e else None
    grad_hidden = tape.new(rows.bytes)
    grad_weight = tape.new(head.held * numel) if own.bytes else None
    most = min(head.tokens, max(64, CHUNK_LOGITS[head.device] // max(1, int(head.chunk_rows))))
    logits: Store | None = None
    delta: Store | None = None
    for chunk in _first_two(head.tokens, most):
        few = tape.new(25 * chunk)
        made = tape.new(e * chunk * head.rows)
        if e != 4:  # .float() makes another
            wide = tape.new(4 * chunk * head.rows)
            tape.drop(made)
            made = wide
        if logits is not None:  # of the chunk before, until its name is taken
            tape.drop(logits)
        logits = made
        tape.take(4 * chunk * head.rows)  # logsumexp's exponentials
        logits.refs += 1
        fresh = logits if e == 4 else tape.new(e * chunk * head.rows)
        if delta is not None:
            tape.drop(delta)
        delta = fresh
        if e != 4:
            logits.refs -= 1
        tape.pass_by(e * chunk * head.width)
        if grad_weight is not None:
            tape.pass_by(e * numel)
        tape.drop(few)
    assert logits is not None and delta is not None
    tape.drop_all([logits, delta])
    saves = [grad_hidden] + ([grad_weight] if grad_weight is not None else [])
    out = tape.op(4, to=[(rows, rows.bytes), (own, head.held * numel)], saves=saves)
    tape.drop_all(saves)
    if matrix is not None:
        tape.drop(matrix)
    return out


def _first_two(tokens: float, chunk: float) -> list[float]:
    """Sizes of the first chunks: those that come later are no larger."""
    return [chunk] if tokens <= chunk else [chunk, min(chunk, tokens - chunk)]


def _in_parts(tape: Tape, rows: Var, head: Head) -> Var:
    """HeldCrossEntropy: the head is never whole."""
    e, width = head.compute, head.width
    gradient = tape.new(rows.bytes)
    chunk = min(head.tokens, max(64, CHUNK_LOGITS[head.device] // max(1, int(head.part))))
    pull = tape.new(4 * chunk * width)
    of_targets = tape.new(e * chunk * width)
    tape.pass_by((4 + 4 + 4) * chunk * width)  # both in fp32, and their product
    part = tape.new(e * head.part * width)
    tape.pass_by(head.of_a_part - e * head.part * width)
    logits = tape.new(e * chunk * head.part)
    if e != 4:
        wide = tape.new(4 * chunk * head.part)
        tape.drop(logits)
        logits = wide
    cast = tape.new(e * chunk * head.part) if e != 4 else None
    tape.pass_by(e * chunk * width)
    tape.drop_all([part, logits, *([cast] if cast else [])])
    out = tape.op(4, to=[(rows, rows.bytes)], saves=[gradient])
    tape.drop_all([gradient, pull, of_targets])
    return out


def _distilled(tape: Tape, rows: Var, head: Head, own: Var | Weight) -> Var:
    """LinearDistillation, with the teacher's head beside this one (hpcdl.distributed.distillation)."""
    e, numel, vocabulary = head.compute, head.rows * head.width, head.rows
    theirs = tape.new(e * head.tokens * head.teacher)
    matrices = []
    if head.held != e:
        matrices.append(tape.new(e * numel))
    if head.teacher_held != e:
        matrices.append(tape.new(e * vocabulary * head.teacher))
    grad_hidden = tape.new(rows.bytes)
    grad_weight = tape.new(head.held * numel) if own.bytes else None
    chunk = min(head.tokens, max(16, CHUNK_LOGITS[head.device] // (DISTILLED * max(1, int(vocabulary)))))
    before: list[Store] = []  # student and slope of the chunk before, until the next one has its own
    for part in _first_two(head.tokens, chunk):
        one = 4 * part * vocabulary
        student = tape.new(one)
        tape.pass_by(e * part * vocabulary if e != 4 else 0.0)
        # the teacher's logits, log q, log p, p and a product: hpcdl.distributed.distillation._divergence
        within = [tape.new(one) for _ in range(3)]
        tape.pass_by(2 * one)
        tape.take(one)
        tape.drop_all(before)
        tape.drop_all(within[1:])
        delta = tape.new(e * part * vocabulary) if e != 4 else None
        if grad_weight is not None:
            tape.pass_by(e * numel)
        tape.drop_all([delta] if delta else [])
        before = [student, within[0]]
    tape.drop_all(before)
    saves = [grad_hidden] + ([grad_weight] if grad_weight is not None else [])
    out = tape.op(4, to=[(rows, rows.bytes), (own, head.held * numel)], saves=saves)
    tape.drop_all([*saves, *matrices, theirs])
    return out
