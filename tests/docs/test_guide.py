"""What the guide says is so: its commands are taken, both languages say the same, all of hpcdl is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdl import cli
from hpcdl.launch.compose import Composer
from tests.docs import commands, pages, stories

ENGLISH, KOREAN = pages.pages("en"), pages.pages("ko")
NAMES = [page.path.stem for page in ENGLISH]


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all pages: the composer keeps what it has read, this folder among it."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("page", ENGLISH, ids=NAMES)
def test_every_command_is_taken(
    page: pages.Page, composer: Composer, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPCDL_RUNS", str(runs))
    faults = []
    for block, command in page.commands:
        try:
            commands.check(block, command, composer)
        except AssertionError as error:
            faults.append(str(error))
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("number", range(len(ENGLISH)), ids=NAMES)
def test_both_languages_say_the_same(number: int) -> None:
    english, korean = ENGLISH[number], KOREAN[number]
    assert korean.path.name == f"{english.path.stem}.ko.md"
    assert [(level, own) for level, _, own in korean.headings] == [
        (level, own) for level, _, own in english.headings
    ]
    for ours, theirs in zip(english.blocks, korean.blocks, strict=True):
        assert (ours.language, ours.kind, ours.words, ours.is_output) == (
            theirs.language,
            theirs.kind,
            theirs.words,
            theirs.is_output,
        ), f"{ours.where} and {theirs.where}"
        assert ours.compared == theirs.compared, f"{ours.where} and {theirs.where}"
    assert korean.tables == english.tables
    assert korean.pictures == english.pictures
    assert korean.links == english.links


def test_every_command_and_every_experiment_is_in_the_guide() -> None:
    typed = [word for page in ENGLISH for _, command in page.commands for word in pages.words_of(command)]
    verbs = {words[1] for words in typed if words[0] == "hpcdl" and len(words) > 1}
    every = {name.replace("_", "-") for name in (*cli.names(), *cli.TOOLS, "launch")}
    assert sorted(every - verbs) == []
    chosen = {
        word.removeprefix("+experiment=") for words in typed for word in words if "+experiment=" in word
    }
    files = {path.stem for path in (pages.ROOT / "conf" / "experiment").glob("*.yaml")}
    assert sorted(files - chosen) == []


def test_the_cheap_commands_do_what_is_shown(tmp_path: Path) -> None:
    """For real, through the true command line: blocks with `test: ci`, a folder a page."""
    for page in ENGLISH:
        stories.tell(page, page.blocks, tmp_path / page.path.stem, only="ci")


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", ENGLISH, ids=NAMES)
def test_the_page_word_by_word(page: pages.Page, tmp_path: Path) -> None:
    """Every block in order, in one folder, as somebody would who follows the page."""
    stories.tell(page, page.blocks, tmp_path / page.path.stem)
