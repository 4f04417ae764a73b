"""What Hydra shows instead of running: --help, --hydra-help, --cfg, --info, tab completion."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig

from hpcdl.errors import ConfigError, Fault, nearest_name
from hpcdl.launch.compose import VERSION_BASE, Composer, config_folder

SHELLS = {"bash": "", "zsh": "autoload -Uz bashcompinit && bashcompinit\n"}


def wanted(arguments: argparse.Namespace) -> bool:
    """Whether one of these modes was asked for."""
    shown = (arguments.help, arguments.hydra_help, arguments.cfg, arguments.info, arguments.shell_completion)
    return any(shown)


def show(arguments: argparse.Namespace) -> int:
    """Does what was asked for and ends.

    Raises:
        ConfigError: the overrides are wrong.
    """
    if arguments.shell_completion:
        return _complete(arguments.overrides)
    flags = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    flags += [f"--config-name={arguments.config_name}"] if arguments.config_name else []
    if arguments.help or arguments.hydra_help:
        return _hydra([*flags, "--help" if arguments.help else "--hydra-help"])
    composer = Composer(config_dir=arguments.config_dir, config_name=arguments.config_name or "config")
    lines = composer.spelled_out(arguments.overrides)
    if arguments.info:
        return _hydra([*flags, f"--info={arguments.info}", *lines])
    if arguments.package:
        _check_package(composer, lines, arguments.package)
        flags.append(f"--package={arguments.package}")
    if arguments.resolve:
        flags.append("--resolve")
    return _hydra([*flags, f"--cfg={arguments.cfg}", *lines])


def _hydra(argv: Sequence[str]) -> int:
    """Hands over to `hydra.main`, which reads sys.argv and exits by itself."""
    before = sys.argv
    sys.argv = [sys.argv[0], *argv]
    try:
        hydra.main(config_path=str(config_folder()), config_name="config", version_base=VERSION_BASE)(
            _nothing
        )()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def _nothing(config: DictConfig) -> None:
    """Hydra shows and doesn't run."""


def _check_package(composer: Composer, lines: Sequence[str], package: str) -> None:
    overrides, _ = composer.parse(lines)
    plain = composer.compose(overrides).plain
    if package != "_global_" and package.split(".")[0] not in (*plain, "hydra"):
        near = nearest_name(package, plain)
        fault = Fault(
            key="--package",
            value=package,
            problem="the config has no such part",
            allowed=", ".join(plain),
            nearest=near,
            fix=f"--package {near or 'model'}",
        )
        raise ConfigError([fault])


def _complete(words: Sequence[str]) -> int:
    command, _, shell = (words[0] if words else "").partition("=")
    if command not in ("install", "uninstall", "query") or shell not in SHELLS:
        fault = Fault(
            key="--shell-completion",
            value=" ".join(words),
            problem="wants to know what to do and for which shell",
            allowed="install, uninstall or query, = and " + " or ".join(SHELLS),
            fix='eval "$(hpcdl launch -sc install=bash)"',
        )
        raise ConfigError([fault])
    if command == "query":
        return _hydra(["--shell-completion", "query=bash"])
    if command == "uninstall":
        print("complete -r hpcdl python python3")
        return 0
    print(SHELLS[shell] + (Path(__file__).parent / "completion.bash").read_text(encoding="utf-8"))
    return 0
