"""Where a report is written to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hpcdl.errors import UsageError, nearest_name
from hpcdl.report import page
from hpcdl.report.make import Made
from hpcdl.runs.files import write_atomic

_ENDINGS = {".html": "html", ".htm": "html", ".md": "md", ".json": "json"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What shall be written."""

    formats: tuple[str, ...]
    output: Path | None = None
    is_folder: bool = False


def wanted(formats: str | None, output: str | None) -> Wanted:
    """What `--format` and `--output` ask for; looked at before any run is read.

    Args:
        formats: names with commas between; None: by the output's ending, else html.
        output: a file or a folder; None: where it is by default.

    Raises:
        UsageError: there is no such format, or no such folder.
    """
    path = Path(output).expanduser() if output else None
    names = [name.strip() for name in formats.split(",")] if formats is not None else []
    for name in names:
        if name not in page.FORMATS:
            nearest = nearest_name(name, page.FORMATS)
            hint = f"; nearest name: {nearest}" if nearest else ""
            raise UsageError(
                f"--format {formats}: no format is called {name!r}{hint}\nformats: {', '.join(page.FORMATS)}"
            )
    is_folder = path is not None and (path.is_dir() or str(output).endswith(os.sep))
    if not names:
        names = ["html" if path is None or is_folder else _ENDINGS.get(path.suffix.lower(), "html")]
    folder = path if is_folder else path.parent if path is not None else None
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--output {output}: there is no folder {folder}; make it first: mkdir -p {folder}")
    return Wanted(formats=tuple(dict.fromkeys(names)), output=path, is_folder=is_folder)


def write(made: Made, asked: Wanted) -> list[Path]:
    """Writes the report; returns the files.

    Raises:
        UsageError: it can't be written there.
    """
    written = []
    for form in asked.formats:
        path = _place(made, asked, form)
        try:
            write_atomic(path, page.render(made.report, form), durable=False)
        except OSError as error:
            raise UsageError(
                f"{path}: can't be written ({error.strerror}); --output FILE names another place"
            ) from error
        written.append(path)
    return written


def _place(made: Made, asked: Wanted, form: str) -> Path:
    if asked.output is None:
        return made.home.with_name(f"{made.home.name}.{form}")
    if asked.is_folder:
        return asked.output / f"{made.name}.{form}"
    if len(asked.formats) == 1:
        return asked.output
    stem = asked.output.stem if asked.output.suffix.lower() in _ENDINGS else asked.output.name
    return asked.output.with_name(f"{stem}.{form}")
