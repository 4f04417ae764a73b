"""The keys of a config as text: for a terminal, as a page of the site, as a man page."""

from __future__ import annotations

import re
import textwrap

from hpcdl.experiment.reference import Key, Section, all_sections

OTHERS_SHOWN = 8
"""Files with another default that are named; the group's other files say theirs themselves."""


def facts(key: Key) -> list[tuple[str, str]]:
    """What is said of a key beside its meaning, each with its name."""
    found = [("takes", key.allowed)]
    default = key.default if key.default or not key.default_in else '""'
    found.append(("default", default or "none: it must be given"))
    if key.others:
        shown = [f"{name}: {value}" for name, value in key.others[:OTHERS_SHOWN]]
        more = len(key.others) - len(shown)
        found.append(("elsewhere", "; ".join(shown) + (f"; and {more} more" if more else "")))
    if key.options:
        found.append(("of", ", ".join(key.options)))
    return found


def section_lines(section: Section, width: int) -> list[str]:
    """A section on a terminal: what it is, its files, a line or two a key."""
    lines = textwrap.wrap(f"{section.name}: {section.meaning}", width)
    if section.files:
        lines += _hanging(f"{section.name}=", "|".join(section.files), width)
    for key in section.keys:
        of = f"   [{', '.join(key.options)}]" if key.options else ""
        lines += ["", f"{key.key} = {key.default or '?'}{of}", *_hanging("    ", key.meaning, width)]
    return lines


def key_lines(key: Key, width: int) -> list[str]:
    """One key on a terminal, all of it."""
    said = [*facts(key), *([("file", f"conf/{key.default_in}")] if key.default_in else [])]
    lines = [key.key, *_hanging("    ", key.meaning, width)]
    return lines + [line for name, value in said for line in _hanging(f"    {name + ':':11}", value, width)]


def _hanging(first: str, text: str, width: int) -> list[str]:
    """Lines that go on below where the text begins."""
    rest = " " * len(first)
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def markdown() -> str:
    """All sections as a page: a heading a section, a term a key (`{#trainer.max_steps}` is its anchor)."""
    return "\n".join(line for section in all_sections() for line in _section_markdown(section)) + "\n"


def _section_markdown(section: Section) -> list[str]:
    lines = [f"## {section.name} {{ #{section.name} }}", "", _plain(section.meaning), ""]
    if section.files:
        files = ", ".join(f"`{name}`" for name in section.files)
        lines += [f"`{section.name}=FILE`, one of {files}; the first is the default.", ""]
    seen: set[str] = set()
    for key in section.keys:
        anchor = key.key if key.key not in seen else f"{key.key}-{key.options[0] if key.options else 'more'}"
        seen.add(key.key)
        said = " · ".join(f"*{name}* {_value(name, value)}" for name, value in facts(key))
        lines += [f"`{key.key}` {{ #{anchor} }}", f":   {_plain(key.meaning)}", "", f"    {said}", ""]
    return lines


def _value(name: str, value: str) -> str:
    if name == "takes" or value.startswith("none: "):
        return _plain(value)
    return ", ".join(f"`{each}`" for each in value.split(", ")) if name == "of" else f"`{value}`"


def _plain(text: str) -> str:
    """Text in which nothing but backticks means something."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([*<\[\]|\\])", r"\\\1", part) for part in parts
    )


def man() -> str:
    """All sections as a man page (`hpcdl config --man | man -l -`)."""
    lines = [
        ".TH HPCDL-CONFIG 5",
        ".SH NAME",
        r"hpcdl-config \- every key of an experiment's config",
        ".SH SYNOPSIS",
        r"hpcdl launch [\fIGROUP\fR=\fIFILE\fR ...] [\fIKEY\fR=\fIVALUE\fR ...]",
    ]
    for section in all_sections():
        lines += [f".SH {section.name.upper()}", _roff(section.meaning)]
        if section.files:
            lines += [".PP", _roff(f"{section.name}=FILE: {', '.join(section.files)}")]
        for key in section.keys:
            lines += [".TP", rf".B {_roff(key.key)}", _roff(key.meaning)]
            lines += [line for name, value in facts(key) for line in (".br", rf"\fI{name}\fR {_roff(value)}")]
    return "\n".join(lines) + "\n"


def _roff(text: str) -> str:
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("`", "")
    return rf"\&{text}" if text.startswith((".", "'")) else text
