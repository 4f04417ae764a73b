"""The times that are told of real runs are read from their events rightly."""

from __future__ import annotations

from typing import Any

from tests.delays import Delay, delays


def at(second: float, event: str, **more: Any) -> dict[str, Any]:
    return {"time": f"2026-11-23T20:39:{second:06.3f}+00:00", "event": event, **more}


def test_each_disturbance_and_what_followed() -> None:
    events = [
        at(0, "started"),
        at(7.5, "requeued", kind="node", step=191, way="successor"),
        at(9.5, "started"),
        at(12, "loaded"),
        at(12.25, "resumed"),
        at(20, "restarting", kind="killed", step=200, in_place="torchrun"),
        at(28, "resumed"),
        at(30, "requeued", kind="timeout", step=240, way="requeue"),
        at(40, "lost"),
        at(41, "started"),
    ]
    assert list(delays(events)) == [
        Delay(kind="node", way="successor", step=191, agents_s=2.0, trains_s=4.75),
        Delay(kind="killed", way="torchrun", step=200, agents_s=None, trains_s=8.0),
        Delay(kind="timeout", way="requeue", step=240, agents_s=None, trains_s=None),
        Delay(kind="lost", way="-", step=0, agents_s=1.0, trains_s=None),
    ]
