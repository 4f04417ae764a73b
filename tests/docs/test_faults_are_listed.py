"""Chapter 11 has every fault, in both languages, in the words that are printed."""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from hpcdl import errors
from hpcdl.launch import __main__ as launch
from hpcdl.launch import requeue
from hpcdl.runs import judge, kinds
from tests.docs import pages, stories

HPCDL = pages.ROOT / "hpcdl"
CHAPTERS = ("11-when-it-breaks.md", "11-when-it-breaks.ko.md")
MESSAGES, REASONS = ("message", "메시지"), ("Slurm's reason", "Slurm의 이유")
ELSEWHERE = frozenset({"kubernetes.py", "remote.py", "containers.py"})
"""Files whose faults chapter 10 tells of."""


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def texts(node: ast.AST) -> Iterator[str]:
    """The strings that an expression may be, `…` where something is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts(value)


@cache
def all_texts() -> str:
    """Every string of hpcdl's code, a line each, and the job script."""
    script = (pages.ROOT / "slurm" / "torchrun.sbatch").read_text(encoding="utf-8")
    return re.sub(r"\$\{?\w+\}?", "…", script) + "\n".join(
        text.replace("\n", " ")
        for path in HPCDL.rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Constant | ast.JoinedStr)
        for text in texts(node)
    )


def problems(path: Path) -> Iterator[str]:
    """What a file gives as a Fault's problem, by keyword or by a variable of that name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.keyword) and node.arg == "problem":
            yield from texts(node.value)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names, values = [target], [node.value]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    names, values = target.elts, node.value.elts
                for name, value in zip(names, values, strict=True):
                    if isinstance(name, ast.Name) and name.id == "problem":
                        yield from texts(value)


def said(path: Path, *functions: str, least: int = 3) -> Iterator[str]:
    """What the named functions of a file put into words: their strings of so many words and more."""
    for function in ast.walk(tree(path)):
        if isinstance(function, ast.FunctionDef) and function.name in functions:
            for statement in function.body[bool(ast.get_docstring(function)) :]:
                for node in ast.walk(statement):
                    if isinstance(node, ast.Constant | ast.JoinedStr):
                        yield from (text for text in texts(node) if len(text.split()) >= least)


def rows(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """First cell of the table's head, and the cells of each row."""
    head = ""
    lines = (pages.GUIDE / name).read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        cells = tuple(cell.strip() for cell in line.strip("|").split("|")) if line.startswith("|") else ()
        if cells and not before.startswith("|"):
            head = cells[0]
        elif cells and set(line) - set("|-"):
            yield head, cells


@cache
def listed(name: str) -> tuple[str, ...]:
    """The messages in the chapter's tables."""
    return tuple(
        "".join(span)
        for head, cells in rows(name)
        if head in MESSAGES
        for span in re.findall(r"``\s?(.+?)\s?``|`([^`]+)`", cells[0])
    )


def bare(text: str) -> str:
    """Less what is filled in at its ends."""
    return text.strip("… :;,")


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_message_that_is_listed_is_one_of_the_code(name: str) -> None:
    unknown = [message for message in listed(name) if bare(message) not in all_texts()]
    assert len(listed(name)) > 150
    assert not unknown


def test_both_languages_list_the_same() -> None:
    assert listed(CHAPTERS[0]) == listed(CHAPTERS[1])


def wanted() -> Iterator[str]:
    """What must be listed: all faults of a config, and what decides how a run starts, fails and ends."""
    for folder in ("experiment", "launch"):
        for path in sorted((HPCDL / folder).glob("*.py")):
            if path.name not in ELSEWHERE:
                yield from problems(path)
    yield from judge_words()
    preflight = HPCDL / "launch" / "preflight.py"
    yield from said(preflight, "_own_disk", "_memory", "_left_behind", least=5)
    yield from said(HPCDL / "launch" / "gpus.py", "problems", "warnings", least=5)
    yield from said(HPCDL / "launch" / "progress.py", "verdict", "_used_up", least=4)
    yield from said(HPCDL / "launch" / "causes.py", "of_exit", least=5)
    yield from said(HPCDL / "launch" / "ending.py", "decide", "_ended_by_slurm", least=5)
    yield from said(HPCDL / "worker" / "resume.py", "choose", least=5)


def judge_words() -> Iterator[str]:
    return said(HPCDL / "runs" / "judge.py", "_by_end", "forgotten", "never_started", least=5)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_fault_is_listed(name: str) -> None:
    found = [bare(message) for message in listed(name)]
    every = {text for text in wanted() if len(bare(text)) > 3}
    assert len(every) > 120
    missing = sorted(
        text for text in every if not any(one in text or bare(text) in one for one in found if len(one) > 3)
    )
    assert not missing


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_kind_of_failure_reason_of_slurm_and_exit_code_is_listed(name: str) -> None:
    kept = list(rows(name))
    cells = [cells for _, cells in kept]
    assert not [
        kind for kind, word in kinds.WORDS.items() if not any(c[:2] == (f"`{kind}`", word) for c in cells)
    ]
    queue = {c[0].strip("`") for head, c in kept if head in REASONS}
    assert queue == {f"{word}: {meaning}" for word, meaning in queue_words().items()}
    codes = {0, launch.INTERRUPTED, requeue.HANDED_OVER, kinds.NEVER_RESTART} | {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.HpcdlError)
    }
    assert {f"`{code}`" for code in codes} <= {c[0] for c in cells}
    text = (pages.GUIDE / name).read_text(encoding="utf-8")
    assert not [
        one for one in (kinds.HANG, kinds.NODE_LOST, kinds.PREFLIGHT, "ExitCode") if f"`{one}`" not in text
    ]


def queue_words() -> dict[str, str]:
    words = {word: meaning for word, meaning in judge.QUEUE_WORDS.items() if meaning}
    return words | {"BeginTime": "Slurm starts a requeued job about two minutes later"}


def test_what_is_refused_is_refused_in_these_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The chapter's launches that fail, provoked for real."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPCDL_RUNS", str(tmp_path / "runs"))
    blocks = pages.read(pages.GUIDE / CHAPTERS[0]).blocks
    compared = 0
    for block, output in itertools.pairwise(blocks):
        if block.kind == "fails" and output.is_output:
            (command,) = block.commands
            assert launch.main(pages.words_of(command)[0][2:]) == int(block.words)
            stories.compare(output, capsys.readouterr().err)
            compared += 1
    assert compared >= 2
