"""Overrides → one plain config, through Hydra; every fault collected where Hydra stops at the first.

Hydra reads the files once for each choice of groups; values are then set on a copy, by Hydra's own function
and therefore with its result, so that a sweep of a thousand values doesn't read the same files a thousand
times (tests/launch/test_compose.py compares with `hydra.compose`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import create_defaults_list
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, QuotedString
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from hpcdl.errors import ConfigError, Fault
from hpcdl.experiment import sections, words
from hpcdl.launch import hydra_faults, interpolations
from hpcdl.spec import options

VERSION_BASE = "1.3"
CONFIG_NAME = "config"


def config_folder() -> Path:
    """The checkout's `conf/`, or the copy inside the installed package.

    Raises:
        ConfigError: neither is there.
    """
    folder = options.config_folder()
    if folder is not None:
        return folder
    raise ConfigError([Fault(key="conf/config.yaml", value="", problem="hpcdl's own configs are missing")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A config made of its files and overrides, and what was wrong on the way."""

    plain: dict[str, Any]
    """Resolved: no interpolation is left."""
    faults: tuple[Fault, ...] = ()
    incomplete: frozenset[str] = frozenset()
    """Top-level keys whose content is not what was asked for, because of a fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """The config that one choice of groups makes, before values are overridden."""

    config: DictConfig
    """Without Hydra's own part, as `hydra.compose` gives it."""
    hydra: DictConfig | None = None
    """Hydra's own part, for `${hydra:…}`."""
    plain: dict[str, Any] | None = None
    """Resolved; None where a value may hang on another one, so that each override must be resolved anew."""
    faults: tuple[Fault, ...] = ()
    incomplete: frozenset[str] = frozenset()


@dataclass(slots=True)
class Composer:
    """Hydra with hpcdl's configs, and the user's beside them."""

    config_dir: str | None = None
    """A further folder of configs (--config-dir)."""
    config_name: str = CONFIG_NAME
    """The root config (--config-name)."""
    loader: ConfigLoaderImpl = field(init=False)
    parser: OverridesParser = field(init=False)
    _groups: dict[str, bool] = field(init=False, default_factory=dict)
    _files: dict[tuple[str, ...], Files] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        version.setbase(VERSION_BASE)
        setup_globals()
        search_path = create_config_search_path(str(config_folder()))
        if self.config_dir is not None:
            folder = Path(os.path.expanduser(self.config_dir)).absolute()  # noqa: PTH111 (raises for no ~user)
            if not folder.is_dir():
                raise ConfigError([hydra_faults.no_config_dir(self.config_dir, folder)])
            schema = SearchPathQuery(provider="schema")
            search_path.prepend(provider="command-line", path=f"file://{folder}", anchor=schema)
        self.loader = ConfigLoaderImpl(search_path)
        self.parser = OverridesParser.create(config_loader=self.loader)
        if not self.loader.repository.config_exists(self.config_name):
            raise ConfigError([hydra_faults.no_config_name(self.config_name, self.loader)])

    def parse(self, texts: Sequence[str]) -> tuple[list[Override], list[Fault]]:
        """The overrides in Hydra's terms, and the faults of those that are none."""
        overrides, faults = [], []
        for text in texts:
            beyond = hydra_faults.beyond_reading(text)
            if beyond is not None:
                faults.append(beyond)
                continue
            try:
                overrides += self.parser.parse_overrides([text])
            except (HydraException, ValueError) as error:
                faults.append(hydra_faults.unreadable(text, error))
        return overrides, faults

    def is_choice(self, override: Override) -> bool:
        """Whether the override chooses files (or says something to Hydra itself), not a value."""
        key = override.key_or_group
        if key not in self._groups:
            self._groups[key] = override.is_hydra_override() or self.loader.repository.group_exists(key)
        return self._groups[key] and not isinstance(override.value(), dict)

    def files(self, choices: Sequence[Override], mode: RunMode = RunMode.RUN) -> Files:
        """What the files make for these choices of groups, composed once."""
        lines = tuple(str(override.input_line) for override in choices)
        if (mode.name, *lines) not in self._files:
            self._files[mode.name, *lines] = self._read(choices, mode)
        return self._files[mode.name, *lines]

    def _read(self, choices: Sequence[Override], mode: RunMode) -> Files:
        faults, good, incomplete = [], [], set()
        for choice in choices:
            fault = hydra_faults.wrong_choice(choice, self.loader)
            if fault is None:
                good.append(str(choice.input_line))
            else:
                faults.append(fault)
                incomplete.add(choice.key_or_group.split("/")[0])
        try:
            config = self._without_hydra(good) if mode == RunMode.RUN else None
            config = config or self.loader.load_configuration(self.config_name, good, mode)
        except Exception as error:  # whatever a file of the user's can bring about
            faults.append(hydra_faults.broken_file(error, good, self.loader))
            everything = frozenset(sections.top_level())
            return Files(config=OmegaConf.create({}), faults=tuple(faults), incomplete=everything)
        if "experiment" in incomplete:
            # What it would have chosen is not known: a key may be right for that and wrong for this.
            incomplete |= {"parallel", "peft"}
        hydra = None
        if "hydra" in config:
            hydra = OmegaConf.masked_copy(config, "hydra")
            with open_dict(config):
                del config["hydra"]
        return Files(
            config=config,
            hydra=hydra,
            plain=None if faults else _independent(config),
            faults=tuple(faults),
            incomplete=frozenset(incomplete),
        )

    def _without_hydra(self, choices: Sequence[str]) -> DictConfig | None:
        """The same config less Hydra's own part, whose ten files take as long to compose as all of ours.

        None where that part matters, or where anything is wrong: Hydra's whole way says what.
        """
        try:
            parsed, repository = self.loader._parse_overrides_and_create_caching_repo(
                self.config_name, list(choices)
            )
            if any(override.is_hydra_override() for override in parsed):
                return None
            defaults = create_defaults_list(repository, self.config_name, parsed, False, False)
            config = self.loader._compose_config_from_defaults_list(defaults.defaults, repository)
        except Exception:
            return None
        config.pop("hydra", None)  # settings in files for Hydra's own part
        text = json.dumps(OmegaConf.to_container(config, resolve=False), default=str)
        if defaults.config_overrides or "${hydra" in text:
            return None
        OmegaConf.set_struct(config, True)
        return config

    def compose(self, overrides: Sequence[Override]) -> Composed:
        """The config that these overrides make; none of them may be a sweep."""
        choices = [override for override in overrides if self.is_choice(override)]
        values = [override for override in overrides if not self.is_choice(override)]
        files = self.files(choices)
        plain = None if files.plain is None else _replaced(files.plain, values)
        return Composed(plain=plain) if plain is not None else self._compose(files, values)

    def _compose(self, files: Files, values: Sequence[Override]) -> Composed:
        """The general way: OmegaConf sets each value and resolves the whole."""
        faults, incomplete = list(files.faults), set(files.incomplete)
        config = copy.deepcopy(files.config)
        # Where the files can't be composed there is nothing that a value could be judged by.
        for override in values if len(files.config) else ():
            fault = self._set(config, override)
            if fault is not None and override.key_or_group.split(".")[0] not in files.incomplete:
                faults.append(fault)
                incomplete.add(override.key_or_group if "." not in override.key_or_group else "")
        HydraConfig.instance().cfg = files.hydra  # type: ignore[assignment]
        plain, unresolved = interpolations.resolved(config)
        faults += unresolved
        incomplete |= {fault.key.split(".")[0] for fault in unresolved}
        faults += self._misplaced(plain)
        return Composed(plain=plain, faults=tuple(faults), incomplete=frozenset(incomplete - {""}))

    def changed(self, plain: dict[str, Any], values: Sequence[Override]) -> Composed:
        """A config that is there already, with these values in it; what they don't touch stays as it is."""
        touched = {"name", *(override.key_or_group.split(".")[0] for override in values)}
        config = OmegaConf.create({name: plain[name] for name in touched if name in plain})
        OmegaConf.set_struct(config, True)
        composed = self._compose(Files(config=config), values) if values else Composed(plain={})
        return dataclasses.replace(composed, plain={**plain, **composed.plain})

    def spelled_out(self, texts: Sequence[str]) -> list[str]:
        """The overrides as Hydra itself would have them: a plus where only the spec knows the key.

        Raises:
            ConfigError: some of them are wrong.
        """
        overrides, faults = self.parse(texts)
        whole = [override for override in overrides if not override.is_sweep_override()]
        faults += self.compose(whole).faults
        if faults:
            raise ConfigError(faults)
        config = copy.deepcopy(self.files([o for o in whole if self.is_choice(o)]).config)
        lines = []
        for override in overrides:
            value = not override.is_sweep_override() and not self.is_choice(override)
            new = value and override.type == OverrideType.CHANGE and self._is_new(override, config)
            lines.append("++" * new + str(override.input_line))
            if value:
                self._set(config, override)
        return lines

    def _set(self, config: DictConfig, override: Override) -> Fault | None:
        known = sections.type_of(override.key_or_group)
        override = _as_text(override) if known is not None and _is_text(known) else override
        if override.type == OverrideType.CHANGE and self._is_new(override, config):
            if known is None:
                return hydra_faults.unknown_key(override, config, self.loader)
            # A key of the spec that a file leaves to its default needs no plus.
            override = dataclasses.replace(override, type=OverrideType.FORCE_ADD)
        try:
            self.loader._apply_overrides_to_config([override], config)
        except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
            return hydra_faults.unfit(override, config, error)
        return None

    @staticmethod
    def _is_new(override: Override, config: DictConfig) -> bool:
        """Whether the override sets a key that the config doesn't have: itself, or within its value."""
        inside = isinstance(override.value(), dict) and sections.type_of(override.key_or_group) is not None
        return inside or not hydra_faults.has(config, override.key_or_group)

    def _misplaced(self, plain: dict[str, Any]) -> Iterator[Fault]:
        """An experiment without its first line lies under `experiment:`, and changes nothing."""
        if isinstance(plain.get("experiment"), dict):
            yield hydra_faults.lacks_package(plain.pop("experiment"))


def _independent(config: DictConfig) -> dict[str, Any] | None:
    """The config as plain data, if no value in it is made from another one."""
    text = json.dumps(OmegaConf.to_container(config, resolve=False), default=str)
    without_environment = re.sub(r"\$\{oc\.env:[^${}]*\}", "", text)
    if "${" in without_environment or "???" in text or "experiment" in config:
        return None
    plain, faults = interpolations.resolved(config)
    return None if faults else plain


def _replaced(plain: dict[str, Any], values: Sequence[Override]) -> dict[str, Any] | None:
    """The quick way, for what sweeps mostly do: one simple value in place of another.

    Shares with `plain` what it doesn't change. None where an override is anything else: OmegaConf knows.
    """
    made = dict(plain)
    for override in values:
        value = override.value()
        simple = value is None or isinstance(value, bool | int | float) or _is_word(value)
        if override.type != OverrideType.CHANGE or override.package is not None or not simple:
            return None
        *parents, last = override.key_or_group.split(".")
        node = made
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                return None
            node[parent] = node = dict(node[parent])
        if last not in node or isinstance(node[last], dict | list):
            return None
        if isinstance(value, int | float) and _is_text(sections.type_of(override.key_or_group)):
            value = _as_text(override).value()
        node[last] = value
    return made


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and "${" not in value and value != "???"


def _is_text(hint: Any) -> bool:
    return words.parts_of(hint)[0] == [str]


def _as_text(override: Override) -> Override:
    """The override with a number given back the spelling it had: the job id 123_4 is not 1234."""
    value = override._value
    if isinstance(value, int | float) and not isinstance(value, bool) and "=" in str(override.input_line):
        spelled = QuotedString(text=override.get_value_string().strip(), quote=hydra_faults.QUOTE)
        return dataclasses.replace(override, _value=spelled)
    return override
