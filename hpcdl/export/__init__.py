"""Models as files for other runtimes: written, proved in the very runtime that they are for, and only then named.

One file a format (formats/), one a runtime (runtimes/), both found by name. A runtime runs in a process of its own
(`python -m hpcdl.export.runtimes`), which imports nothing but that runtime: what it measures of memory is the
file's own. gate.py compares what the runtime computes with the source model; card.py tells what was found.

Of this room the login node imports names and bounds only: torch, numpy and the runtimes come inside functions, and
at module level in the files of runtimes/.
"""

from __future__ import annotations

from dataclasses import dataclass

CARD = "export.json"
"""In each export's folder: what it is, what was measured, what the gate said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """How far an export of one kind may be from its source."""

    perplexity: float
    """Largest held-out perplexity, as a multiple of the source's."""
    logits: float
    """Largest root mean square of the log-probabilities' differences, relative to the source's own spread."""
    weights: float
    """Largest difference of one matrix from its source: root mean square, relative to the source's."""
