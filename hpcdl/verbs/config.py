"""`hpcdl config`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hpcdl.verbs._common import print_json, say

if TYPE_CHECKING:
    from hpcdl.experiment import reference

HELP = "what a config key means, takes, and is by default; all keys of a section"


def add(parser: argparse.ArgumentParser) -> None:
    """Its words and options."""
    parser.add_argument(
        "keys",
        nargs="*",
        metavar="KEY",
        help="trainer.max_steps, max_steps, or a section: trainer; none: the list of sections",
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="the same for scripts")
    shape.add_argument("--markdown", action="store_true", help="everything, as the site's page has it")
    shape.add_argument("--man", action="store_true", help="everything: hpcdl config --man | man -l -")


def run(options: argparse.Namespace) -> int:
    """Does it; returns the exit code."""
    from hpcdl.experiment import reference, reference_text

    if options.markdown or options.man:
        say((reference_text.markdown() if options.markdown else reference_text.man()).rstrip("\n"))
    elif options.json:
        print_json(_plain(options.keys))
    elif options.keys:
        for number, word in enumerate(options.keys):
            _show(word, first=number == 0)
    else:
        for section in reference.all_sections():
            files = f"{section.name}={'|'.join(section.files)}" if section.files else ""
            say(f"{section.name:10}{len(section.keys):4} keys   {files}".rstrip())
        say("\nhpcdl config SECTION or KEY says more; hpcdl launch --cfg job shows a composed config.")
    return 0


def _show(word: str, *, first: bool) -> None:
    """One section or key."""
    import shutil

    from hpcdl.experiment import reference, reference_text

    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    section = next((s for s in reference.all_sections() if s.name == word), None)
    if section is not None:
        blocks = [reference_text.section_lines(section, width)]
    else:
        blocks = [reference_text.key_lines(key, width) for key in _found(word)]
    for number, lines in enumerate(blocks):
        if number or not first:
            say("")
        for line in lines:
            say(line)


def _found(word: str) -> list[reference.Key]:
    """Keys of that name.

    Raises:
        UsageError: there is none.
    """
    from hpcdl.errors import UsageError, nearest_name
    from hpcdl.experiment import reference

    found = reference.find(word)
    if found:
        return found
    keys = reference.all_keys()
    known = [*(s.name for s in reference.all_sections()), *(k.key for k in keys), *(k.last for k in keys)]
    nearest = nearest_name(word, known)
    hint = f"; nearest name: {nearest}" if nearest else ""
    raise UsageError(f"no config key or section is called {word}{hint}\nhpcdl config lists the sections")


def _plain(wanted: list[str]) -> list[dict[str, object]]:
    """What was asked for, or all of it."""
    import dataclasses

    from hpcdl.experiment import reference

    keys: list[reference.Key] = []
    for word in wanted:
        section = next((s for s in reference.all_sections() if s.name == word), None)
        keys += section.keys if section is not None else _found(word)
    return [dataclasses.asdict(key) for key in (keys if wanted else reference.all_keys())]
