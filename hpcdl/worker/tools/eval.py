"""`hpcdl eval`: how good, how large and how quick a model is."""

from __future__ import annotations

from typing import Any

from hpcdl.worker.tools import Request


def run(request: Request) -> dict[str, Any]:
    """Held-out loss and perplexity, size on disk and in memory, peak memory, tokens a second."""
    raise NotImplementedError
