"""Scripts for the login node. ssh hands one string to whatever shell the user has there, and joins words with spaces.

So the string holds nothing that any of them (bash, zsh, dash, csh, fish) reads otherwise: the script travels in base64
between single quotes. It is run by a login bash, since that is where sites put sbatch and modules on PATH, and what a
profile prints on the way goes to standard error, so that standard output is the script's alone.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable

MARK = "\x1ehpcdl\x1e"
"""Printed before a script's own output: what stands before it was printed by the shell's start-up files."""
ANSWER = "\x1eanswer\x1e"
"""Between the text that is for people and the record that is for us."""
NO_PYTHON, OLD_PYTHON, NO_CODE = 203, 202, 201
"""Exit codes of our scripts, which no command of hpcdl has."""


def enveloped(script: str) -> str:
    """The one word that ssh is given for a script."""
    whole = f"exec >&9 9>&-\n{script}"
    packed = base64.b64encode(whole.encode("utf-8", "surrogateescape")).decode()
    return f"exec sh -c 'exec 9>&1 >&2; s=$(echo {packed} | base64 -d); exec bash -lc \"$s\"'"


def words(items: Iterable[str]) -> str:
    """Words for the script, each as it is."""
    return " ".join(shlex.quote(item) for item in items)


def marked(script: str) -> str:
    """A script whose own output begins after the mark."""
    return f"printf '\\036hpcdl\\036'\n{script}"


def after_mark(output: str) -> tuple[str, str]:
    """What start-up files printed, and what the script did."""
    before, mark, after = output.partition(MARK)
    return (before, after) if mark else ("", output)


def python(wanted: str | None) -> str:
    """Lines that set `$py` to the Python there, or end with NO_PYTHON."""
    given = shlex.quote(wanted or "")
    return (
        f"py={given}\n"
        '[ -n "$py" ] || py=python3\n'
        'case $py in "~/"*) py=$HOME/${py#"~/"};; esac\n'
        f'command -v -- "$py" >/dev/null || exit {NO_PYTHON}\n'
    )


BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from hpcdl.there import main; sys.exit(main(sys.argv[2:]))"
)


def command(code: str, *arguments: str) -> str:
    """The line that runs the copy of hpcdl in the folder `code` with `$py`: -P, so that no folder comes before it."""
    return f'"$py" -P -X utf8 -c {words([BOOT, code, *arguments])}'
