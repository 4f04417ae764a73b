"""What Hydra, OmegaConf and YAML complain of, as faults in hpcdl's own form."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, Quote
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import split_key
from omegaconf.errors import (
    OmegaConfBaseException,
)

from hpcdl.errors import Fault, nearest_name
from hpcdl.experiment import sections, words

QUOTE = Quote.double
DEEPEST = 50
"""Brackets within each other: no key of the spec takes more than two."""


def no_config_dir(given: str, folder: Path) -> Fault:
    """--config-dir names no folder."""
    try:
        names = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except OSError:
        names = []
    near = nearest_name(folder.name, names)
    nearest = str(folder.parent / near) if near else ""
    return Fault(
        key="--config-dir",
        value=given,
        problem="is a file, not a folder" if folder.exists() else "there is no such folder",
        allowed="a folder with your own configs: my_conf/experiment/mine.yaml",
        nearest=nearest,
        fix=f"--config-dir {nearest or 'my_conf'}",
    )


def no_config_name(given: str, loader: ConfigLoaderImpl) -> Fault:
    """--config-name names no file."""
    names = loader.get_group_options("")
    near = nearest_name(given, names)
    return Fault(
        key="--config-name",
        value=given,
        problem="there is no such root config",
        allowed="one of " + ", ".join(names),
        nearest=near,
        fix=f"--config-name {near or 'config'}",
    )


def unreadable(text: str, error: Exception) -> Fault:
    """An argument that is no override in Hydra's grammar."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals:
        problem = "is no override: there is no = in it"
        fix = words.shell(f"{text}=VALUE") if re.fullmatch(r"[\w+./@-]+", text) else "key=value"
        return Fault(
            key=text or '""', value="", problem=problem, allowed="key=value, +key=value, ~key", fix=fix
        )
    if not re.fullmatch(r"(~|\+{1,2})?[\w./@:$-]+", key):
        problem = "is no key that Hydra can read"
        return Fault(
            key=key or '""', value=value, problem=problem, allowed="key=value, group=option", fix="key=value"
        )
    if value.startswith("="):
        problem, fix = "has one = too many", words.shell(f"{key}={value.lstrip('=')}")
        return Fault(key=key, value=value, problem=problem, allowed="key=value", fix=fix)
    return Fault(
        key=key,
        value=words.typed(value),
        problem=f"can't be read: {_what_is_odd(value) or _told(str(error))}",
        allowed="a number, true, false, null, text, [a,b] or {key: value}; other text in quotes",
        fix=words.shell(f"{key}={_in_quotes(value)}"),
    )


def beyond_reading(text: str) -> Fault | None:
    """An override that Hydra's grammar may have, and neither it nor OmegaConf gets through."""
    deep = max(itertools.accumulate(_turns(text)), default=0) > DEEPEST
    if not deep and not re.search("[\ud800-\udfff]", text):
        return None
    key, _, value = text.partition("=")
    return Fault(
        key=key,
        value=words.typed(value),
        problem="its brackets are nested too deep" if deep else "is not readable text: not in UTF-8",
        allowed=f"at most {DEEPEST} brackets in each other" if deep else "text in UTF-8",
        fix=f"{words.typed(key)}=VALUE",
    )


def _turns(text: str) -> list[int]:
    """1 for each bracket that opens outside of quotes, -1 for each that closes."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", text)
    return [1 if letter in "[{(" else -1 for letter in bare if letter in "[]{}()"]


def _in_quotes(value: str) -> str:
    """The value as text in quotes; of a plain list, each item, so that it stays a list."""
    items = re.fullmatch(r"\[([^\[\]{}]*)\]", value.strip())
    if items is None:
        return f'"{_quoted(value)}"'
    return "[" + ",".join(f'"{_quoted(item.strip())}"' for item in items.group(1).split(",")) + "]"


def _told(text: str) -> str:
    """What Hydra's parser says, less its own names."""
    lines = [
        line for line in text.splitlines() if not line.startswith(("Error parsing override", "See http"))
    ]
    if "integer string conversion" in text:
        return "a number has too many digits"
    told = " ".join(lines).split(" expecting ")[0].strip()
    if not told or told.startswith("LexerNoViableAlt"):
        return "it is not in the form of an override"
    return re.sub(r"^\w+(Exception|Error) while evaluating ('.*?'): (?=[A-Za-z])", r"\2: ", told)


def _quoted(value: str) -> str:
    return value.strip("\"'").replace("\\", "\\\\").replace('"', '\\"')


def _what_is_odd(value: str) -> str:
    for opening, closing in ("[]", "{}", "()"):
        if value.count(opening) != value.count(closing):
            return f"a bracket {opening} {closing} has no partner"
    for quote in "\"'":
        if value.count(quote) % 2:
            return f"a quote {quote} has no partner"
    odd = sorted(set(re.findall(r"[^\w\s.,:\[\]{}()\"'$%*@?|+/\\-]", value)))
    return f"{' '.join(odd)} must stand in quotes" if odd else ""


def _exists(config: str, loader: ConfigLoaderImpl) -> bool:
    try:
        return bool(loader.repository.config_exists(config))
    except OSError:  # a name that no file can have
        return False


def wrong_choice(override: Override, loader: ConfigLoaderImpl) -> Fault | None:
    """A group's option that has no file, or an experiment without its plus."""
    group, value = override.key_or_group, override.value()
    if override.is_delete() or override.is_hydra_override():
        return None
    if not group:
        said = words.typed(value)
        fix = "name the key that is meant, or leave it out (--cfg job shows all)"
        return Fault(key="=", value=said, problem="there is no key before it", fix=fix)
    options = loader.repository.get_group_options(group, results_filter=ObjectType.CONFIG)
    chosen = value if isinstance(value, list) else [value]
    for option in chosen:
        if not isinstance(option, str) or not _exists(f"{group}/{option}", loader):
            near = nearest_name(str(option), options)
            plus = "+" if override.is_add() or group == "experiment" else ""
            return Fault(
                key=group,
                value=words.typed(option),
                problem=f"the group {group} has no such option",
                allowed=", ".join(options),
                nearest=near,
                fix=f"{plus}{group}={near or 'OPTION'}",
            )
    if group == "experiment" and not override.is_add():
        return Fault(
            key="experiment",
            value=words.typed(value),
            problem="an experiment is added to the config, which has none",
            allowed="+experiment=NAME, with the plus",
            fix=f"+experiment={words.typed(value)}",
        )
    return None


def broken_file(error: Exception, lines: Sequence[str], loader: ConfigLoaderImpl) -> Fault:
    """A config file that can't be read or composed."""
    cause = error.__cause__ if isinstance(error.__cause__, yaml.YAMLError) else error
    if isinstance(cause, yaml.MarkedYAMLError):
        mark = cause.problem_mark or cause.context_mark
        place = f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}" if mark else "a config file"
        problem = f"is no YAML: {cause.problem or cause.context}"
        return Fault(key=place, value="", problem=problem, fix="correct the file at that place")
    told = in_one_line(str(error)) or (in_one_line(str(error.__cause__)) if error.__cause__ else "")
    where = re.search(r"In '?([\w./-]+)'?:", told)
    key = f"{where.group(1)}.yaml" if where else _unreadable_file(loader) or " ".join(lines) or "config"
    if isinstance(error, UnicodeDecodeError):
        told = f"a file is not UTF-8 text ({error.reason} at byte {error.start})"
    missing = _missing_file(error, told)
    if missing is not None:
        return missing
    twice = re.search(r"Multiple values for ([\w/@]+)", told)
    if twice:
        given = next((line.lstrip("+") for line in lines if line.startswith(f"+{twice.group(1)}=")), "")
        return Fault(
            key=twice.group(1),
            value=given.partition("=")[2],
            problem="is chosen already: a second one can't be added",
            allowed="one option of the group",
            fix=given or f"{twice.group(1)}=OPTION",
        )
    added = re.search(r"Could not override '([^']+)'.*use \+(\S+)", told)
    if added:
        return Fault(
            key=added.group(1),
            value=added.group(2).partition("=")[2],
            problem="the config has no such group to choose from",
            fix=f"+{added.group(2)}",
        )
    problem = re.sub(rf"^In '?{re.escape(where.group(1))}'?:\s*", "", told) if where else told
    return Fault(
        key=key,
        value="",
        problem=f"can't be composed: {problem or type(error).__name__}",
        fix="see which files are read: --info defaults",
    )


def _unreadable_file(loader: ConfigLoaderImpl) -> str:
    """The first file of the config folders that OmegaConf can't load: its errors don't name it."""
    for source in loader.get_sources():
        if source.scheme() != "file":
            continue
        for file in sorted(Path(source.path).rglob("*.yaml")):
            try:
                OmegaConf.load(file)
            except Exception:  # whatever it is, this is the file
                return str(file)
    return ""


def _missing_file(error: Exception, told: str) -> Fault | None:
    """A defaults list that names a file which isn't there."""
    if not isinstance(error, MissingConfigException) or not error.missing_cfg_file:
        return None
    group, _, option = error.missing_cfg_file.rpartition("/")
    listed = re.search(r"Available options in '[^']*': (.*?)( Config search path|$)", told)
    options = listed.group(1).split() if listed else []
    near = nearest_name(option, options)
    parent = re.match(r"In '([^']+)'", told)
    return Fault(
        key=f"{parent.group(1)}.yaml" if parent else group or "config",
        value=f"{group}: {option}" if group else option,
        problem="its defaults list names a file that is not there",
        allowed=", ".join(options) or "a file of a config folder",
        nearest=near,
        fix=f"{group}: {near}" if near else "correct the defaults list, or add the file",
    )


def in_one_line(text: str) -> str:
    """One line, without addresses, tabs and the list of folders."""
    text = re.sub(r"See https?://\S+[^\n]*|https?://\S+", "", text)
    text = text.split("\nConfig search path:")[0].split("\nSearch path:")[0]
    text = re.sub(r"\s+(full_key|object_type|reference_type)(:|=).*", "", text, flags=re.S)
    return " ".join(text.split())


def has(config: DictConfig, key: str) -> bool:
    """Whether the config has the key, whatever its value."""
    node: Any = config
    for part in split_key(key):
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            if node._is_interpolation() or part not in list(node.keys()):
                return node._is_interpolation()
            node = node._get_node(part)
        elif isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node._get_node(int(part))
        else:
            return False
    return True


def unknown_key(override: Override, config: DictConfig, loader: ConfigLoaderImpl) -> Fault:
    """A key that neither the config nor the spec has."""
    key, value = override.key_or_group, override.value()
    groups = [g for g in loader.list_groups("") if g != "hydra"]
    top, *rest = key.split(".")
    if "/" in key or override.package is not None or (not rest and isinstance(value, str)):
        near_group = nearest_name(key.split("/")[0], groups)
        if near_group:
            options = loader.get_group_options(near_group)
            option = nearest_name(str(value), options) or "OPTION"
            plus = "+" if near_group == "experiment" else ""
            fix = f"{plus}{near_group}={option}"
            known = ", ".join(sorted({*groups, *sections.top_level()}))
            problem = "there is no such group or key"
            return Fault(
                key=key, value=words.typed(value), problem=problem, allowed=known, nearest=near_group, fix=fix
            )
    if rest and top not in config and top not in sections.top_level():
        near = nearest_name(top, sections.top_level())
        corrected = ".".join([near, *rest]) if near else ""
        return Fault(
            key=key,
            value=words.typed(value),
            problem=f"there is no section {top}",
            allowed=", ".join(sections.top_level()),
            nearest=corrected,
            fix=words.shell(f"{corrected}={words.typed(value)}") if corrected else f"leave {key} out",
        )
    parent = key.rpartition(".")[0]
    node = _select(config, parent) if parent else config
    if not isinstance(node, DictConfig) and parent and has(config, parent):
        problem = f"{parent} is one value, not a group of keys"
        fix = words.shell(f"{parent}={words.typed(value)}")
        return Fault(key=key, value=words.typed(value), problem=problem, nearest=parent, fix=fix)
    siblings = [str(k) for k in node] if isinstance(node, DictConfig) else []
    return words.unknown_key(key, value, siblings, sections.every_key())


def _select(config: DictConfig, key: str) -> Any:
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None


def unfit(override: Override, config: DictConfig, error: Exception) -> Fault:
    """An override that names something real and can't be applied to it."""
    key, line = override.key_or_group, str(override.input_line)
    value = words.typed(override.value()) if override.value() is not None else ""
    if override.package is not None:
        return Fault(
            key=key, value=value, problem="there is no such group", fix=f"leave @{override.package} out"
        )
    if override.is_delete():
        near = nearest_name(key, sections.every_key().values())
        told = in_one_line(str(error))
        problem = "can't be taken away: it is not there" if "does not exist" in told else told
        return Fault(
            key=f"~{key}",
            value=value,
            problem=problem,
            nearest=near,
            fix=f"~{near}" if near else f"leave ~{key} out",
        )
    if override.is_add() and "already at" in str(error):
        problem = "can't be added: the config has it already"
        return Fault(key=f"+{key}", value=value, problem=problem, fix=words.shell(line.lstrip("+")))
    told = in_one_line(str(error.__cause__ or error))
    if "Incompatible key type" in told:
        problem, fix = "null can't be a key in {…}", "quote it: 'null', or leave it out"
        return Fault(key=key, value=value, problem=problem, allowed="text, numbers, true, false", fix=fix)
    return Fault(key=key, value=value, problem=f"can't be set: {told}", fix="see the config with --cfg job")


def lacks_package(content: dict[str, Any]) -> Fault:
    """An experiment file whose keys ended up below `experiment`."""
    return Fault(
        key="experiment",
        value=words.typed(list(content), 60),
        problem="its keys lie below `experiment` and change nothing: the file lacks its first line",
        allowed="a file of conf/experiment that starts with # @package _global_",
        fix="put `# @package _global_` at the top of the file",
    )
