"""Numbers, times and states as people read them, the same in every view."""

from __future__ import annotations

from datetime import UTC, datetime

STYLES = {
    "PENDING": "yellow",
    "RUNNING": "cyan",
    "COMPLETED": "green",
    "FAILED": "bold red",
    "CANCELLED": "magenta",
    "PREEMPTED": "red",
    "TIMEOUT": "bold red",
    "OUT_OF_MEMORY": "bold red",
    "NODE_FAIL": "bold red",
    "UNKNOWN": "dim",
}
"""A state's colour; the word itself always stands beside it."""


def duration(seconds: float) -> str:
    """`0:07`, `1:02:03`, `3d 4:05:06`."""
    total = max(0, round(seconds))
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, second = divmod(rest, 60)
    clock = f"{hours}:{minutes:02}:{second:02}" if hours or days else f"{minutes}:{second:02}"
    return f"{days}d {clock}" if days else clock


def age(seconds: float) -> str:
    """The largest unit only: `7s`, `12m`, `5h`, `3d`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(max(0, seconds))}s"


def size(count: float) -> str:
    """Bytes in binary units: `512 MiB`, `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB" if count < 1024 else f"{count / 1024:.1f} TiB"


def number(value: object, digits: int = 4) -> str:
    """A metric with so many decimals; `-` where it is no number (null, or text)."""
    try:
        return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"
    except OverflowError:  # a whole number that no float can hold: somebody else wrote it
        return "-"


def short(count: float) -> str:
    """A count in at most six characters: `950`, `4,650`, `12.3k`, `1.20M`."""
    if count < 10_000:
        return f"{count:,.0f}"
    return f"{count / 1000:.1f}k" if count < 1_000_000 else f"{count / 1_000_000:.2f}M"


def since(time: str | None) -> float:
    """Seconds since a time in ISO 8601; 0 where there is none."""
    moment = parse(time)
    return (datetime.now(UTC) - moment).total_seconds() if moment else 0.0


def between(start: str | None, end: str | None) -> float:
    """Seconds from one time to another."""
    first, last = parse(start), parse(end)
    return (last - first).total_seconds() if first and last else 0.0


def local(time: str | None) -> str:
    """A time in this machine's zone, to the second; `-` where there is none."""
    moment = parse(time)
    return f"{moment.astimezone():%Y-%m-%d %H:%M:%S}" if moment else "-"


def parse(time: str | None) -> datetime | None:
    """A time in ISO 8601, or None."""
    try:
        moment = datetime.fromisoformat(time or "")
    except ValueError:
        return None
    if not 1 < moment.year < 9999:  # another zone's year may be none
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
