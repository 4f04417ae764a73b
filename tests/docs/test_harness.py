"""The guide's test can fail: what it calls wrong, and what it calls the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcdl.launch.compose import Composer
from tests.docs import commands, pages, stories

COMPOSER = Composer()
PAGE = """# One

<!-- test: slow trainer.max_steps=2 -->
```bash
# a comment
hpcdl launch +experiment=pretrain_tiny \\
    optim.lr=1e-3   # why
hpcdl launch seed=1 | tail -n 3
hpcdl status
```

<!-- output -->
```text
COMPLETED after 0:12
…
loss  5.1 MiB  and so…
```

## Two { #two }

| a | 1 |
|---|---|
[x](02.md) ![p](img/a.png)
"""


def page(tmp_path: Path, text: str) -> pages.Page:
    path = tmp_path / "01-a.md"
    path.write_text(text, encoding="utf-8")
    return pages.read(path)


def test_a_page_is_read(tmp_path: Path) -> None:
    found = page(tmp_path, PAGE)
    block, output = found.blocks
    assert found.headings == ((1, "One", ""), (2, "Two", "two"))
    assert block.commands == (
        "hpcdl launch +experiment=pretrain_tiny optim.lr=1e-3",
        "hpcdl launch seed=1 | tail -n 3",
        "hpcdl status",
    )
    assert block.as_run() == [
        "hpcdl launch +experiment=pretrain_tiny optim.lr=1e-3 trainer.max_steps=2",
        "hpcdl launch seed=1 trainer.max_steps=2 | tail -n 3",
        "hpcdl status",
    ]
    assert output.is_output and found.pictures == ("img/a.png",) and found.links == {"02.md"}


@pytest.mark.parametrize(
    ("kind", "as_run"),
    [
        ("gpu", ["hpcdl plan seed=1"]),
        ("cluster", ["hpcdl launch seed=1 dry_run=true"]),
        ("never no network here", []),
        ("ci", ["hpcdl launch seed=1", "hpcdl top"]),
    ],
)
def test_how_a_block_is_run(tmp_path: Path, kind: str, as_run: list[str]) -> None:
    text = f"<!-- test: {kind} -->\n```bash\nhpcdl launch seed=1\nhpcdl top\n```\n"
    (block,) = page(tmp_path, text).blocks
    assert block.as_run() == as_run


@pytest.mark.parametrize(
    "text",
    [
        "<!-- test: sometimes -->\n```bash\nls\n```\n",
        "<!-- test: gpu -->\n\n```bash\nls\n```\n",
        "```sh\nls\n```\n",
    ],
)
def test_what_is_not_written_as_agreed_is_a_fault(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssertionError, match=r"01-a\.md:"):
        page(tmp_path, text)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("hpcdl launch +experiment=pretrain_tiny trainer.max_stps=2", "there is no such key"),
        ("hpcdl plan parallel=fspd", "fspd"),
        ("hpcdl status --jsn", "--jsn"),
        ("hpcdl quantize smollm2_135m quant=int5 --out x", "int5"),
        ("hpcdl statsu", "statsu"),
        ("make demmo", "demmo"),
        ("docker/cluster upp", "no such word"),
        ("python benchmarks/nothing.py", "not there"),
        ("hpcdI launch", "no program"),
        ("HPCDL_RUNS=x hpcdl status | hpcdl wc", "wc"),
    ],
)
def test_a_wrong_command_is_found(tmp_path: Path, command: str, said: str) -> None:
    block = pages.Block("01-a.md", 3, "bash", (command,))
    with pytest.raises(AssertionError, match=r"01-a\.md:3") as caught:
        commands.check(block, command, COMPOSER)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        "hpcdl launch -m +experiment=pretrain_tiny optim.lr=1e-3,3e-3 model.path=/not/here",
        "hpcdl plan +experiment=lora_llama --search --json > plan.json",
        "hpcdl compare sweep-1a2b3c4d --plot out.png",
        "CLUSTER_CGROUPS=1 docker/cluster up",
        "hpcdl eval smollm2_135m quant=nf4 && hpcdl generate smollm2_135m --prompt 'The Python statement'",
    ],
)
def test_a_right_command_is_taken(command: str) -> None:
    commands.check(pages.Block("01-a.md", 3, "bash", (command,)), command, COMPOSER)


def test_outputs_are_compared_by_their_words(tmp_path: Path) -> None:
    output = page(tmp_path, PAGE).blocks[1]
    stories.compare(output, "other\nCOMPLETED after 11:59\nmore\nloss 700 GiB and so it goes\n")
    with pytest.raises(AssertionError, match="not printed"):
        stories.compare(output, "FAILED after 1\nloss 5 MiB and so it goes\n")
    with pytest.raises(AssertionError, match="loss"):
        stories.compare(output, "loss 5 MiB and so\nCOMPLETED after 1\n")


def test_a_story_stops_where_a_command_fails(tmp_path: Path) -> None:
    told = page(tmp_path, "```bash\ntrue\nfalse\n```\n")
    with pytest.raises(AssertionError, match="exit code 1"):
        stories.tell(told, told.blocks, tmp_path / "story")
    told = page(tmp_path, "<!-- test: fails 3 -->\n```bash\ntest -e Makefile\nexit 3\n```\n")
    stories.tell(told, told.blocks, tmp_path / "other")
