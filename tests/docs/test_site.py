"""The guide as a site: it builds without a warning, needs no network, and each page leads to the other language's."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcdl.experiment import reference
from tests.docs import pages

pytest.importorskip("material", reason="the docs extra is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` builds it, warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "-d", str(folder)],
        cwd=pages.ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    return folder


def test_every_page_is_there_twice_and_leads_to_the_other(site: Path) -> None:
    for page in pages.pages("en"):
        name = f"{page.path.stem}.html"
        english = (site / "guide" / name).read_text()
        korean = (site / "ko" / "guide" / name).read_text()
        assert 'lang="en"' in english and 'lang="ko"' in korean
        assert f'href="../ko/guide/{name}" hreflang="ko"' in english
        assert f'href="../../guide/{name}" hreflang="en"' in korean


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    """No letters from Google, no scripts from a content network: what a page loads lies in the site."""
    loads = re.compile(
        r'<(?:script|img|iframe)[^>]* src="(https?:)?//|<link[^>]* rel="stylesheet"[^>]* href="https?:'
    )
    assert [str(p) for p in site.rglob("*.html") if loads.search(p.read_text())] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"@import[^;]*https?:|url\(['\"]?https?:", styles) == []


def test_each_config_key_is_on_its_page(site: Path) -> None:
    for path in (site / "reference" / "config.html", site / "ko" / "reference" / "config.html"):
        text = path.read_text()
        missing = [key.key for key in reference.all_keys() if f'id="{key.key}"' not in text]
        assert missing == []


def test_the_search_knows_korean(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert {"en", "ko"} <= set(index["config"]["lang"])
    assert [doc for doc in index["docs"] if doc["location"].startswith("ko/guide/01-threads.html")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_words_are_found(site: Path) -> None:
    """By the theme's own search: a Korean noun whatever particle it has, a key by its last word, an English word."""
    script = Path(__file__).with_name("search.js")
    asked = ["기울기", "체크포인트", "max_steps", "gradient"]
    done = subprocess.run(
        ["node", str(script), str(site), *asked], capture_output=True, text=True, check=True, timeout=300
    )
    gradient, checkpoint, key, english = (json.loads(line) for line in done.stdout.splitlines())
    assert any(page.startswith("ko/guide/02-gpus.html") for page in gradient)
    assert any(page.startswith("ko/guide/04-strategies.html") for page in checkpoint)
    assert any(page.startswith("guide/01-threads.html") for page in key)
    assert any(page.startswith("guide/") for page in english)
