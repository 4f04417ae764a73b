"""`python -m hpcdl.launch` = `hpcdl launch`: compose, validate, plan, submit, say what happened."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpcdl.errors import HpcdlError
from hpcdl.launch import after, arguments, modes, planning, points, report, sweep
from hpcdl.launch.compose import CONFIG_NAME, Composer
from hpcdl.spec import LaunchOptions

INTERRUPTED = 130
Plan = Callable[[Sequence[sweep.Point], LaunchOptions], list[points.Planned]]


def main(argv: Sequence[str] | None = None) -> int:
    """Launches what the command line asks for; returns the exit code. A user's fault is shown, no traceback."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except HpcdlError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _main(argv: Sequence[str]) -> int:
    flags = arguments.parse(argv)
    if modes.wanted(flags):
        return modes.show(flags)
    composer = Composer(config_dir=flags.config_dir, config_name=flags.config_name or CONFIG_NAME)
    drafts = sweep.compose(composer, flags.overrides, multirun=flags.multirun)
    if any(_login_host(draft.composed.plain) for draft in drafts.drafts):
        from hpcdl.launch import remote

        return remote.launch(drafts)
    return go_on(drafts, composer)


def _login_host(plain: Mapping[str, Any]) -> Any:
    cluster = plain.get("cluster")
    return cluster.get("login_host") if isinstance(cluster, dict) else None


def go_on(drafts: sweep.Drafts, composer: Composer, plan: Plan = points.plan) -> int:
    """All that comes after composing; returns the exit code.

    Args:
        drafts: what was composed, here or on another machine.
        composer: makes the configs of changes that would help.
        plan: says what is to be done about each point.

    Raises:
        HpcdlError: something is wrong with it; the exit code tells what.
    """
    asked = sweep.judge(drafts)
    options = asked.options
    parents = after.find(options, {point.spec.cluster.kind for point in asked.points})
    fitting = planning.fitting(plan(asked.points, options), asked, composer)
    planned, asked = fitting.planned, fitting.asked
    for line in fitting.warnings:
        print(f"warning: {line}", file=sys.stderr)
    batches = points.batches([item for item in planned if item.launches], options, parents)
    if options.dry_run:
        shown, notes = points.as_if_forced(planned, batches, options, parents)
        report.dry_run(shown, [*report.refused_lines(asked.refused), *notes])
        return 0
    from hpcdl.launch import running  # a dry run needs none of what submits

    return running.launch(planned, batches, asked)


if __name__ == "__main__":
    sys.exit(main())
