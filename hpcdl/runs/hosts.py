"""Slurm's short form of node lists: `c[1-4,7],login` ↔ c1 c2 c3 c4 c7 login."""

from __future__ import annotations

import re

_RANGE = re.compile(r"\[([^\]]*)\]")


def expand_hosts(text: str) -> tuple[str, ...]:
    """Each host of a node list, in its order; empty for none (Slurm writes `(null)`, `None assigned`).

    Several brackets in a name multiply (`r[1-2]n[1-2]`); leading zeros are kept (`gpu[08-10]`).
    """
    if not text or text.startswith("(") or text in ("None assigned", "N/A", "None"):
        return ()
    hosts: list[str] = []
    for part in _split(text):
        hosts.extend(_expand(part))
    return tuple(hosts)


def _split(text: str) -> list[str]:
    """The list at its commas, but not at those inside brackets."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part]


def _expand(name: str) -> list[str]:
    found = _RANGE.search(name)
    if found is None:
        return [name]
    head, tail = name[: found.start()], name[found.end() :]
    return [head + number + rest for number in _numbers(found.group(1)) for rest in _expand(tail)]


def _numbers(ranges: str) -> list[str]:
    numbers = []
    for part in ranges.split(","):
        low, _, high = part.partition("-")
        if high:
            numbers += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
        else:
            numbers.append(low)
    return numbers


def task_indices(text: str) -> list[range]:
    """An array expression as Slurm prints it (`4-10%2`, `0,2,5-7:2`) as ranges; [] for `N/A`."""
    ranges = []
    for part in text.split("%")[0].strip("[]").split(","):
        bounds, _, step = part.partition(":")
        low, _, high = bounds.partition("-")
        if not low.isdigit() or (high and not high.isdigit()):
            continue
        ranges.append(range(int(low), int(high or low) + 1, int(step) if step.isdigit() else 1))
    return ranges
