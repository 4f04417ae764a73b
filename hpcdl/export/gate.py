"""The gate: an export in its own runtime, against the model that it was made from.

Four things must hold. Each matrix in the file is the source's but for rounding; the runtime's log-probabilities on
held-out text are near the source's; its perplexity there is not much higher; and it cuts that text, and some that is
harder, into the same tokens. A tensor that was damaged, rows in another order, another vocabulary: each breaks one
of these by far more than rounding does.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.errors import HpcdlError
from hpcdl.export import Bound, runtimes
from hpcdl.export.formats import Format
from hpcdl.export.source import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEPT = 192
"""Positions whose log-probabilities are compared."""
TEXT = "text.npz"
SOURCE = "source.npy"
EXPORT = "export.npy"
DIFFERENT_LINES = 0.005
"""Largest share of lines that may be cut into other tokens: two cutters' tables of Unicode are not always of a year."""
PROBES = (
    "Hello, world! It's 2024, and 3.14159 isn't 12345678.",
    "  indented\n\tdef f(x):\n\t\treturn x ** 2  # comment\n\n\n",
    "Größe, naïve café, ½ — “quotes” … Ωμέγα и Кирилл",
    "日本語のテキスト 中文 한국어 עברית عربى",
    "emoji: 🙂👩‍👩‍👧 \u200bzero\u00a0width",
    "https://example.org/a?b=c&d=%20#e <tag attr='x'/> {\"json\": [1, 2]}",
)
"""Text that vocabularies differ on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heldout:
    """What both are asked about."""

    arrays: Path
    """Folder with text.npz (`tokens`, `labels`, `ends`) and source.npy, the source's log-probabilities of the first
    KEPT positions, `(kept, vocabulary)`."""
    loss: float
    """The source's, a mean over the targets."""
    kept: int
    longest: int
    """Tokens of the longest sequence."""
    texts: tuple[str, ...]
    encode: Callable[[str], list[int]]
    """The source's tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the gate found."""

    faults: tuple[str, ...]
    """Why the export is not its source; empty: it is."""
    measured: Mapping[str, Any] = field(default_factory=dict)


def judge(
    format_: Format, source: Source, folder: Path, quant: str, heldout: Heldout, threads: int
) -> Verdict:
    """Compares the export in `folder` with its source.

    A runtime that can't open the file is a fault like the others.

    Raises:
        HpcdlError: the runtime isn't installed: nothing can be said.
    """
    from hpcdl.export.formats import refuse_missing

    refuse_missing(runtimes.PACKAGES.get(format_.RUNTIME, ()), "the gate")
    bound = format_.QUANTS[quant]
    faults, measured = _weights(format_, source, folder, quant)
    file = folder / format_.FILE
    common: dict[str, Any] = {"threads": threads, "context": heldout.longest + 64, "arrays": heldout.arrays}
    try:
        scored = runtimes.ask(format_.RUNTIME, "score", file, kept=heldout.kept, **common)
        told = runtimes.ask(format_.RUNTIME, "tokenize", file, texts=[*PROBES, *heldout.texts], **common)
    except HpcdlError as error:
        return Verdict(faults=(*faults, str(error)), measured=measured)
    measured |= {"runtime": scored["about"], **_logits(scored, heldout, bound, faults)}
    measured |= _tokens(told, source, heldout, faults)
    return Verdict(faults=tuple(faults), measured=measured)


def _logits(scored: Mapping[str, Any], heldout: Heldout, bound: Bound, faults: list[str]) -> dict[str, Any]:
    import numpy as np

    before, after = math.exp(min(heldout.loss, 700.0)), math.exp(min(scored["loss"], 700.0))
    found: dict[str, Any] = {
        "targets": scored["targets"], "perplexity_before": before, "perplexity_after": after,
        "perplexity_ratio": after / before, "perplexity_bound": bound.perplexity, "logits_bound": bound.logits,
    }  # fmt: skip
    if not after <= before * bound.perplexity:
        faults.append(
            f"perplexity {after:.3f} against the source's {before:.3f}: {after / before:.3f} times as high, and at most"
            f" {bound.perplexity:g} are allowed"
        )
    ours, theirs = np.load(heldout.arrays / SOURCE), np.load(heldout.arrays / EXPORT)
    if theirs.shape[1] < ours.shape[1]:
        faults.append(f"the vocabulary has {theirs.shape[1]} entries, the source's {ours.shape[1]}")
        return found
    found |= distances(ours, theirs[:, : ours.shape[1]])
    if not found["logits_difference"] <= bound.logits:
        faults.append(
            f"log-probabilities differ by {found['logits_difference']:.3f} of their spread, and at most"
            f" {bound.logits:g} is allowed"
        )
    return found


def distances(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> dict[str, float]:
    """How far two models' log-probabilities `(positions, vocabulary)` are from each other."""
    import numpy as np

    spread = ours - ours.mean(axis=1, keepdims=True)
    apart = theirs - theirs.mean(axis=1, keepdims=True) - spread
    return {
        "logits_difference": float(np.sqrt((apart.astype(np.float64) ** 2).sum() / (spread**2).sum())),
        "kl": float((np.exp(ours) * (ours - theirs)).sum(axis=1).mean()),
        "same_token": float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()),
    }


def _tokens(told: Mapping[str, Any], source: Source, heldout: Heldout, faults: list[str]) -> dict[str, Any]:
    texts = [*PROBES, *heldout.texts]
    other = [text for text, ids in zip(texts, told["ids"], strict=True) if ids != heldout.encode(text)]
    lost = [text for text, back in zip(texts, told["back"], strict=True) if not same_text(text, back)]
    share = len(other) / len(texts)
    if share > DIFFERENT_LINES:
        faults.append(
            f"{len(other)} of {len(texts)} lines of text become other tokens than the source's, the first of them"
            f" {json.dumps(other[0][:60], ensure_ascii=False)}"
        )
    if len(lost) / len(texts) > DIFFERENT_LINES:
        shown = json.dumps(lost[0][:60], ensure_ascii=False)
        faults.append(
            f"{len(lost)} of {len(texts)} lines don't come back from their tokens, the first of them {shown}"
        )
    if told["eos"] != source.eos_id:
        faults.append(f"a text ends with token {told['eos']}, the source's with {source.eos_id}")
    if tuple(told["prefix"]) != source.prefix:
        faults.append(f"a text begins with {told['prefix']}, the source's with {list(source.prefix)}")
    if told["template"] != source.tokenizer_config.get("chat_template"):
        faults.append("its chat template is not the source's")
    return {"lines": len(texts), "lines_cut_otherwise": len(other)}


def same_text(text: str, back: str) -> bool:
    """Whether tokens stand for the text: SentencePiece's put a space before it."""
    return back == text or back == f" {text}" or back.lstrip(" ") == text.lstrip(" ")


def _weights(format_: Format, source: Source, folder: Path, quant: str) -> tuple[list[str], dict[str, Any]]:
    """Each matrix of the file beside the source's."""
    import numpy as np

    bound = format_.QUANTS[quant].weights
    pieces = source.pieces()
    faults: list[str] = []
    seen: dict[str, float] = {}
    try:
        for name, found in format_.weights(source, folder):
            ours = pieces[name].read().float().numpy()
            if found.shape != ours.shape:
                faults.append(f"{name} is {found.shape} in the file, and {ours.shape} in the source")
                continue
            apart = float(np.linalg.norm((found - ours).astype(np.float64)))
            size = float(np.linalg.norm(ours.astype(np.float64)))
            # a tied matrix may lie in the file twice
            seen[name] = max(seen.get(name, 0.0), apart / size if size else float(apart > 0))
    except (HpcdlError, ValueError, KeyError, OSError) as error:
        return [*faults, f"the file can't be read back: {error}"], {}
    lost = sorted(pieces.keys() - seen.keys())
    if lost:
        faults.append(f"the file lacks {lost[0]} ({len(lost)} such in all)")
    bad = sorted((name for name in seen if not seen[name] <= bound), key=seen.__getitem__, reverse=True)
    if bad:
        faults.append(
            f"{bad[0]} differs from the source's by {seen[bad[0]]:.3g} of its size, and at most {bound:g} is rounding"
            f" ({len(bad)} such in all)"
        )
    worst = max(seen, key=seen.__getitem__, default=None)
    return faults, {
        "worst_weights": worst,
        "worst_weights_difference": seen.get(worst or ""),
        "weights_bound": bound,
    }


def write_text(folder: Path, sequences: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> None:
    """Tokens and targets of each sequence, as hpcdl.export.actions reads them."""
    import numpy as np

    ends = list(itertools.accumulate(len(tokens) for tokens, _ in sequences))
    np.savez(
        folder / TEXT,
        tokens=np.concatenate([tokens for tokens, _ in sequences]),
        labels=np.concatenate([labels for _, labels in sequences]),
        ends=np.array(ends),
    )  # fmt: skip
