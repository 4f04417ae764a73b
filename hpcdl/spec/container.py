"""What a container shows of a node's files: one mount, and how it is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

PLUGIN_CUTS = re.compile(r"[\s,:]")
"""What pyxis and enroot end a path at; neither knows a way to quote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A folder or a file of the node, seen from inside."""

    source: str
    """Absolute path on the node."""
    target: str
    """Absolute path inside."""
    read_only: bool = False
    """Whether nothing can be written there from inside."""
    made: bool = False
    """Whether it is made at submission where it isn't there yet: a cache."""

    @classmethod
    def of(cls, path: str, *, read_only: bool = False, made: bool = False) -> Mount:
        """A path that is the same inside and outside."""
        return cls(source=path, target=path, read_only=read_only, made=made)

    @classmethod
    def parse(cls, text: str) -> Mount | None:
        """`SRC`, `SRC:DST`, `SRC:DST:ro` or `SRC:DST:rw`; None where it is something else."""
        parts = text.split(":")
        if not 1 <= len(parts) <= 3 or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
            return None
        source, target = parts[0], parts[1] if len(parts) > 1 else parts[0]
        if not (_is_absolute(source) and _is_absolute(target)):
            return None
        return cls(source=source, target=target, read_only=parts[2:] == ["ro"])

    def shows(self, path: str) -> bool:
        """Whether a path of the node has the same name inside by this mount."""
        return self.source == self.target and (path == self.source or path.startswith(f"{self.source}/"))


def _is_absolute(path: str) -> bool:
    return path.startswith("/") and not re.search(r"[\x00-\x1f]|/\.\.(/|$)", path)
