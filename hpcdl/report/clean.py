"""What a page is made of, without what it must not show: secrets, control characters, numbers that JSON lacks."""

from __future__ import annotations

import math
from typing import Any

from hpcdl.runs.terminal import harmless
from hpcdl.secrets import hide, mask


def plain(value: Any) -> Any:
    """A tree of dicts and lists with every text made harmless; NaN and infinities are null."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return {text(str(key)): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def text(value: str) -> str:
    """Without this environment's secrets, without what turns or ends a line unseen, and writable as UTF-8."""
    return harmless(hide(value)).encode("utf-8", "replace").decode("utf-8")


def document(value: str) -> str:
    """A whole file's text: also without what only looks like a secret."""
    return text(mask(value))
