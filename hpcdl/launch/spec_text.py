"""Experiments as the YAML of their spec.yaml."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hpcdl.launch import frozen
from hpcdl.spec import ExperimentSpec
from hpcdl.spec.plain import dump_yaml, to_plain


class SpecTexts:
    """Writes them. The points of a sweep share most of their sections, so each is written once."""

    def __init__(self) -> None:
        self._sections: dict[int, tuple[object, str]] = {}

    def text(self, spec: ExperimentSpec, notes: Sequence[str] = ()) -> str:
        """The content of spec.yaml: the same as the whole spec's in one go.

        Args:
            spec: the experiment.
            notes: remarks that stand before it.
        """
        spec = dataclasses.replace(spec, code=frozen.identity())
        head = "".join(f"# {note}\n" for note in notes)
        return head + "".join(self._section(f.name, getattr(spec, f.name)) for f in dataclasses.fields(spec))

    def _section(self, name: str, value: object) -> str:
        if not dataclasses.is_dataclass(value):
            return dump_yaml({name: value})
        known = self._sections.get(id(value))
        if known is None:
            known = self._sections[id(value)] = (value, dump_yaml({name: to_plain(value)}))
        return known[1]
