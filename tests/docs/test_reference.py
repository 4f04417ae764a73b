"""The reference of config keys says all there is, and nothing that is not so."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess

import pytest

from hpcdl import cli
from hpcdl.experiment import reference, reference_text, sections, words
from hpcdl.launch.compose import Composer


def spec_keys() -> set[str]:
    """Every dotted key that a config may have, walked by hand: sections, and what one level below them."""
    found = set()
    for name, hint in sections.top_level().items():
        if not dataclasses.is_dataclass(hint):
            found.add(name)
            continue
        folder = sections.FOUND_BY_NAME.get(hint)
        for cls in [folder.get(n).Config for n in folder.names()] if folder else [hint]:
            found |= {f"{name}.{field.name}" for field in dataclasses.fields(cls)}
    return found


def test_every_key_is_there_with_what_it_takes_its_default_and_its_meaning() -> None:
    keys = reference.all_keys()
    assert spec_keys() <= {key.key for key in keys}
    assert [key.key for key in keys if not (key.meaning and key.allowed)] == []
    page, man = reference_text.markdown(), reference_text.man()
    for key in keys:
        assert f"`{key.key}` {{ #" in page
        assert f".B {key.key}\n" in man.replace(r"\-", "-")
        said = dict(reference_text.facts(key))
        assert said["default"] and said["takes"] == key.allowed
    assert page.count("*takes*") == page.count("*default*") == len(keys)


def test_defaults_are_those_of_a_composed_config() -> None:
    plain = Composer().compose([]).plain
    checked = 0
    for section in reference.all_sections():
        chosen = plain if section.name == reference.GENERAL else plain[section.name]
        for key in section.keys:
            inside = key.key.split(".")[-1]
            of_this = not key.options or chosen.get("name", chosen.get("scheme")) in key.options
            if key.key.count(".") > 1 or not of_this or "${" in key.default:
                continue
            assert words.typed(chosen[inside], 200) == key.default, key.key
            checked += 1
    assert checked > 120


def test_what_differs_between_strategies_stands_there_for_each() -> None:
    found = {key.options: key for key in reference.find("parallel.dp_shard")}
    assert found[("fsdp",)].default == "-1"
    assert "ddp" in next(options for options, key in found.items() if key.default == "1")
    (allow,) = reference.find("parallel.allow")
    assert allow.options == ("auto",)
    assert [key.key for key in reference.find("gpu_mem_gb")] == [
        "cluster.gpu_mem_gb",
        "cluster.partitions.NAME.gpu_mem_gb",
    ]


@pytest.mark.parametrize(
    ("words_typed", "said"),
    [
        (["max_steps"], ["trainer.max_steps", "a whole number of at least 1", "smoke: 3"]),
        (["optim"], ["optim.lr = 0.001", "Peak learning rate.", "optim=adamw|adamw8bit|sgd"]),
        ([], ["trainer", "parallel=ddp|"]),
        (["parallel.name", "--json"], ['"allowed": "one of auto,']),
    ],
)
def test_in_a_terminal(words_typed: list[str], said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", *words_typed]) == 0
    out = capsys.readouterr().out
    assert [text for text in said if text not in out] == []


def test_a_slip_of_the_pen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "trainer.max_stps"]) == 2
    assert "nearest name: trainer.max_steps" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
def test_the_man_page_is_one() -> None:
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww"], input=reference_text.man(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "trainer.max_steps" in done.stdout
