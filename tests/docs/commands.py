"""Is a command of the guide one that hpcdl, make or the cluster's script would take? Nothing is run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hpcdl import cli
from hpcdl.errors import ConfigError
from hpcdl.launch import arguments, exporting, sweep, tools
from hpcdl.launch.compose import CONFIG_NAME, Composer
from tests.docs.pages import ROOT, Block, words_of

PLACES = frozenset(
    {
        "model.path",
        "data.paths",
        "trainer.resume_from",
        "after",
        "peft.init_from",
        "task.teacher",
        "task.source",
        "task.run",
        "task.reward",
    }
)
"""Keys that name something on a disk: what it is, and whether it is there, the test that runs the page finds out."""
SHELL = frozenset(
    {
        "cat", "cd", "cp", "curl", "cut", "echo", "export", "find", "grep", "head", "id", "kill",
        "less", "ls", "lscpu", "mkdir", "nproc", "printf", "rm", "sed", "sleep", "sort", "source",
        "tail", "tee", "test", "touch", "true", "wc", "sbatch", "srun", "squeue", "sinfo", "sacct",
        "scancel", "scontrol", "salloc", "sstat", "sacctmgr", "nvidia-smi", "kubectl", "docker",
        "ssh", "scp", "rsync", "git", "pip", "man", "podman", "apptainer", "llama-cli",
    }
)  # fmt: skip
"""Not ours: that they are spelt right the test that runs them shows, or nobody (`never`)."""


def check(block: Block, command: str, composer: Composer) -> None:
    """An AssertionError that names page and line where something isn't so."""
    for words in words_of(command):
        try:
            refused = _refused(words, composer)
        except ConfigError as error:
            refused = [f"{fault.key}: {fault.problem}" for fault in error.faults if fault.key not in PLACES]
        except (SystemExit, cli.UsageError) as error:
            refused = [str(error)]
        expected = block.kind == "fails"
        assert expected or not refused, f"{block.where}: {command}\n{'; '.join(refused)}"


def _refused(words: Sequence[str], composer: Composer) -> list[str]:
    program, *rest = words
    if words[:3] == ["python", "-m", "hpcdl.launch"]:
        return _launch(words[3:], composer)
    if program == "hpcdl":
        return _hpcdl(rest, composer)
    if program == "make":
        return [f"no target {word}" for word in rest if "=" not in word and word not in _targets()]
    if program == "docker/cluster":
        return (
            [] if rest and re.search(rf"^  {rest[0]}\b", _cluster_help(), re.MULTILINE) else ["no such word"]
        )
    if program in ("python", ".venv/bin/python") and rest[:1] and not rest[0].startswith("-"):
        return [] if (ROOT / rest[0]).exists() else [f"{rest[0]} is not there"]
    known = program in SHELL or (ROOT / program).exists()
    return [] if known else [f"{program} is no program that the guide's test knows (tests/docs/commands.py)"]


def _hpcdl(words: Sequence[str], composer: Composer) -> list[str]:
    verb, *rest = words or ["--help"]
    if verb == "launch":
        return _launch(rest, composer)
    if {"--help", "--version"} & set(words):
        return []
    if verb in tools.TOOLS:
        options = tools._parser(verb, tools.TOOLS[verb]).parse_intermixed_args(rest)
        known = (ROOT / "conf" / "model" / f"{options.model}.yaml").exists()
        model = (
            options.model if known else "smollm2_135m"
        )  # a run's or a folder's: stands for all of its kind
        return _launch([*tools.TOOLS[verb].base, f"model={model}", *options.overrides], composer)
    if verb == "export":
        exporting._parser().parse_intermixed_args(rest)
        return []
    options, more = cli._parser().parse_known_args(list(words))
    if more and (any(word.startswith("-") for word in more) or not hasattr(options, "words")):
        return [f"unrecognized: {' '.join(more)}"]
    if verb == "plan" and not options.calibrate:
        return _launch([*["--multirun"] * options.multirun, *options.words, *more], composer)
    return []


def _launch(words: Sequence[str], composer: Composer) -> list[str]:
    if {"--help", "--cfg", "--info", "-sc"} & set(words):
        return []
    flags = arguments.parse(words)
    own = composer
    if flags.config_dir and not Path(flags.config_dir).is_dir():
        return []  # the page makes it: the test that runs the page finds out
    if flags.config_dir or flags.config_name:
        own = Composer(config_dir=flags.config_dir, config_name=flags.config_name or CONFIG_NAME)
    sweep.read(own, flags.overrides, multirun=flags.multirun)
    return []


def _targets() -> set[str]:
    text = "".join((ROOT / name).read_text() for name in ("Makefile", "docker/cluster.mk"))
    return set(re.findall(r"^([a-z-]+):", text, re.MULTILINE))


def _cluster_help() -> str:
    return (ROOT / "docker" / "cluster").read_text()
