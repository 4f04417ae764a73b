"""The command line of `hpcdl launch`: Hydra's own flags, with faults instead of argparse's usage wall."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from hpcdl.errors import ConfigError, Fault, nearest_name

NOT_OURS = ("--experimental-rerun",)


class _Said(Exception):
    """What argparse would have printed before it exits."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Hydra's flags and the overrides, in any order.

    Raises:
        ConfigError: unknown flags, or flags that exclude each other; carries all of them.
    """
    parser = get_args_parser()
    parser.error = _said  # type: ignore[method-assign]
    flags = sorted(f for action in parser._actions for f in action.option_strings if f not in NOT_OURS)
    try:
        arguments, unknown = parser.parse_known_intermixed_args(list(argv))
    except _Said as said:
        fault = Fault(
            key="flags", value=" ".join(argv), problem=str(said), allowed=" ".join(flags), fix="--help"
        )
        raise ConfigError([fault]) from None
    arguments.overrides += [text for text in unknown if not text.startswith("-")]
    faults = [_unknown(text, flags) for text in unknown if text.startswith("-")]
    if arguments.experimental_rerun is not None:
        faults.append(_unknown(NOT_OURS[0], flags))
    faults += _excluding(arguments)
    if faults:
        raise ConfigError(faults)
    return arguments


def _said(message: str) -> NoReturn:
    raise _Said(message)


def _unknown(text: str, flags: Sequence[str]) -> Fault:
    flag, _, value = text.partition("=")
    near = nearest_name(flag, flags)
    # Somebody who is used to other tools writes --trainer.max_steps=3.
    override = text.lstrip("-") if value else ""
    return Fault(
        key=flag,
        value=value,
        problem="there is no such flag",
        allowed=" ".join(flags),
        nearest=near,
        fix=near or (f"{override} (overrides have no dashes)" if override else f"leave {flag} out"),
    )


def _excluding(arguments: argparse.Namespace) -> list[Fault]:
    chosen = {
        "--run": arguments.run,
        "--multirun": arguments.multirun,
        "--cfg": arguments.cfg,
        "--info": arguments.info,
        "--shell-completion": arguments.shell_completion,
    }
    given = [flag for flag, value in chosen.items() if value]
    faults = []
    if len(given) > 1:
        faults.append(
            Fault(
                key=" ".join(given),
                value="",
                problem="only one of these can be given at a time",
                allowed=" or ".join(chosen),
                fix=given[-1],
            )
        )
    for flag, value in (("--resolve", arguments.resolve), ("--package", arguments.package)):
        if value and not arguments.cfg and not arguments.help:
            faults.append(Fault(key=flag, value="", problem="belongs to --cfg", fix=f"--cfg job {flag}"))
    return faults
