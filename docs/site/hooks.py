"""What mkdocs calls while it builds the site (mkdocs.yml: hooks)."""

from __future__ import annotations

from typing import Any

KEYS = "<!-- keys -->"
"""Where the reference of config keys stands in its page."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The reference is made from the code at each build: no copy of it lies anywhere."""
    if KEYS not in markdown:
        return markdown
    from hpcdl.experiment import reference_text

    return markdown.replace(KEYS, reference_text.markdown())
