"""Which try a run belongs to: what an older one's agents and workers may no longer write.

A node that is cut off goes on training: it doesn't know that Slurm has given it up and started the job
elsewhere, and the shared disk may be reached over another network. So each try, before it trains, writes its
number into state.json (`running_try`). From then on

- every change of the state by an older try's agent is refused (`update`, under the run's lock);
- its agents look once a second, and kill torchrun and the workers (`hpcdl.launch.agent`);
- a checkpoint is renamed to its final name only by the try that holds the run.

What the older try has saved until then is whole and counts: the new one resumes from it.
"""

from __future__ import annotations

from typing import Any

from hpcdl.errors import SupersededError
from hpcdl.runs import chain
from hpcdl.runs.state import RunState
from hpcdl.runs.store import RunDir


def number(attempt: str) -> tuple[int, ...]:
    """A try's number to compare by: `0.1` comes after `0.0.2`; empty for a text that is none."""
    parts = attempt.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else ()


def holder(state: RunState, attempt: str, token: str | None = None) -> str:
    """Who holds the run in the place of a try, in words; empty where nobody does.

    Args:
        state: the run's.
        attempt: the try that asks.
        token: its submission; None: it isn't known (a worker).
    """
    if number(state.running_try) > number(attempt):
        return f"try {state.running_try}"
    # Launched again since; but a successor's own agents come before it has taken the run over.
    again = number(state.running_try) == number(attempt) and token is not None
    if again and state.submission is not None and state.submission != token:
        return f"submission {state.submission}"
    return ""


def update(
    run: RunDir,
    attempt: str,
    token: str | None,
    event: tuple[str, dict[str, Any]] | None = None,
    **changes: Any,
) -> RunState:
    """Changes the state (`RunDir.update`) on behalf of a try, if the run is still its own.

    Raises:
        SupersededError: a newer try holds it; nothing was written.
    """
    before = chain.link(run.runs_dir, token)

    def guard(state: RunState) -> None:
        handed = before is not None and state.submission == before.token
        newer = holder(state, attempt, state.submission if handed else token)
        if newer:
            raise SupersededError(f"{newer} has taken the run over from try {attempt}: nothing was written")

    return run.update(event=event, guard=guard, **changes)


def must_hold(run: RunDir, attempt: str, what: str) -> None:
    """Before a worker makes something final.

    Args:
        run: the run.
        attempt: the worker's try.
        what: names what it is about to write.

    Raises:
        SupersededError: a newer try holds the run.
    """
    try:
        newer = holder(run.read_state(), attempt)
    except FileNotFoundError:  # a worker without a launcher
        return
    if newer:
        raise SupersededError(f"{newer} has taken the run over from try {attempt}: {what} is not written")
