"""The guide's pages as data: headings, blocks with how they are tested, tables, pictures, links.

docs/guide/WRITING.md says how pages are written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "guide"
KINDS = ("run", "ci", "slow", "gpu", "cluster", "never", "fails")
"""What `<!-- test: KIND … -->` may say; `run` where nothing does."""
LANGUAGES = ("bash", "text", "yaml", "python")

_FENCE = re.compile(r"^( *)```(\w*)\s*$")
_COMMENT = re.compile(r"^ *<!-- *(test: *(?P<test>\w+) *(?P<words>.*?)|output) *-->\s*$")
_HEADING = re.compile(r"^(#{1,6}) +(.*?)(?: *\{ *#([\w.-]+) *\})? *$")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_LAUNCH = re.compile(
    r"^((?:\w+=\S+ +)*(?:hpcdl (?:launch|plan)|python -m hpcdl\.launch)\b[^|>&;]*?)(\s*(?:[|>&;].*)?)$"
)
"""A launch or a plan, and what comes behind it in the shell."""


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]
    kind: str = "run"
    words: str = ""
    """What stands behind the kind: overrides to append, an exit code, a reason."""
    is_output: bool = False
    """Compared with what the commands of the block before it print."""

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @cached_property
    def commands(self) -> tuple[str, ...]:
        """Shell lines without comments, continued ones joined."""
        found, held = [], ""
        for line in self.lines:
            if not held and line.lstrip().startswith("#"):
                continue
            held += line.strip() if held else line.rstrip()
            if held.endswith("\\"):
                held = f"{held[:-1].rstrip()} "
                continue
            words = _without_comment(held)
            found += [words] if words else []
            held = ""
        return tuple(found)

    @property
    def compared(self) -> tuple[str, ...]:
        """What must be the same in both languages: outputs as they are, the rest without comments."""
        if self.language == "bash":
            return self.commands
        if self.language == "text":
            return self.lines
        return tuple(code for line in self.lines if (code := _without_comment(line).rstrip()))

    def as_run(self) -> list[str]:
        """Its commands as the slow test runs them."""
        if self.kind in ("slow", "ci"):
            return [appended(command, self.words) for command in self.commands]
        if self.kind == "cluster":
            return [appended(command, "dry_run=true") for command in self.commands if is_launch(command)]
        if self.kind == "gpu":
            launched = [
                command.replace("python -m hpcdl.launch", "hpcdl launch") for command in self.commands
            ]
            return [c.replace("hpcdl launch", "hpcdl plan", 1) for c in launched if is_launch(c)]
        return [] if self.kind == "never" else list(self.commands)


def is_launch(command: str) -> bool:
    """Whether it is a launch or a plan."""
    return _LAUNCH.match(command) is not None


def appended(command: str, words: str) -> str:
    """A launch or a plan with words of the test's; any other command as it is."""
    found = _LAUNCH.match(command)
    if not words or found is None or (words.startswith("dry_run") and "hpcdl plan" in command):
        return command
    return f"{found[1].rstrip()} {words}{found[2]}"


def _without_comment(line: str) -> str:
    """The line without what stands behind a # of its own."""
    return re.sub(r"(^|\s+)#(\s.*)?$", "", line)


@dataclass(frozen=True)
class Page:
    """One page of the guide."""

    path: Path
    headings: tuple[tuple[int, str, str], ...]
    """Level, text, own id."""
    blocks: tuple[Block, ...]
    tables: tuple[tuple[int, tuple[str, ...]], ...]
    """Columns of each row, and the numbers in it."""
    pictures: tuple[str, ...]
    links: frozenset[str]

    @property
    def commands(self) -> list[tuple[Block, str]]:
        return [(b, command) for b in self.blocks if b.language == "bash" for command in b.commands]


def read(path: Path) -> Page:
    """A page; what can't be read as WRITING.md has it is an AssertionError that names the line."""
    blocks, rest = _blocks(path)
    headings = [found for line in rest if (found := _HEADING.match(line))]
    text = "\n".join(rest)
    tables = [line for line in rest if line.lstrip().startswith("|")]
    return Page(
        path=path,
        headings=tuple((len(found[1]), found[2], found[3] or "") for found in headings),
        blocks=tuple(blocks),
        tables=tuple((line.count("|"), tuple(sorted(_NUMBER.findall(line)))) for line in tables),
        pictures=tuple(re.findall(r"!\[[^]]*\]\(([^)\s]+)", text)),
        links=frozenset(re.findall(r"(?<!!)\[[^]]*\]\(([^)\s]+)", re.sub(r"!\[[^]]*\]\([^)]*\)", "", text))),
    )


def _blocks(path: Path) -> tuple[list[Block], list[str]]:
    """The fenced blocks, and all other lines."""
    blocks: list[Block] = []
    rest: list[str] = []
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    marker: re.Match[str] | None = None
    for number, line in lines:
        fence = _FENCE.match(line)
        if fence is None:
            assert marker is None, (
                f"{path.name}:{number}: nothing may stand between a test's comment and its fence"
            )
            marker = _COMMENT.match(line)
            assert marker or "<!-- test" not in line, f"{path.name}:{number}: no such comment: {line.strip()}"
            rest.append(line)
            continue
        inside = tuple(_until_fence(lines, len(fence[1])))
        blocks.append(_block(path, number, fence[2], inside, marker))
        marker = None
    return blocks, rest


def _until_fence(lines: Iterator[tuple[int, str]], indent: int) -> Iterator[str]:
    for _, line in lines:
        if line.strip() == "```":
            return
        yield line[indent:] if not line[:indent].strip() else line


def _block(
    path: Path, number: int, language: str, inside: tuple[str, ...], marker: re.Match[str] | None
) -> Block:
    where = f"{path.name}:{number}"
    assert language in LANGUAGES, f"{where}: a block is one of {', '.join(LANGUAGES)}"
    if marker is None:
        return Block(path.name, number, language, inside)
    if marker["test"] is None:
        assert language == "text", f"{where}: an output is a text block"
        return Block(path.name, number, language, inside, is_output=True)
    assert language == "bash" and marker["test"] in KINDS, f"{where}: a bash block, one of {', '.join(KINDS)}"
    return Block(path.name, number, language, inside, marker["test"], marker["words"])


def pages(language: str = "en") -> list[Page]:
    """The chapters in order."""
    found = sorted(GUIDE.glob("[0-9][0-9]-*.md"))
    return [read(path) for path in found if path.name.endswith(".ko.md") == (language == "ko")]


def words_of(command: str) -> list[list[str]]:
    """A shell line as lists of words, a list for each command in it; assignments before it are left out."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    found: list[list[str]] = [[]]
    skipping = False
    for word in lexer:
        if set(word) <= set("|&;"):
            found.append([])
        elif set(word) <= {">"}:
            skipping = True  # the next word is a file
        elif skipping:
            skipping = False
        elif found[-1] or not re.fullmatch(r"\w+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]
