"""The pages in a real browser: nothing asked of any host, no complaint, plots drawn, and a phone can show them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdl import cli
from tests.report import chromium
from tests.report.chromium import Browser
from tests.report.making import full_run, sweep

REQUIRED = os.environ.get("HPCDL_REQUIRE_CLUSTER") == "1"
"""In CI: a machine that .ci/setup has made ready."""

DRAWN = """(() => [...document.querySelectorAll("figure.plot")].map((figure) => {
  const area = figure.querySelector("svg").getBoundingClientRect();
  const paths = [...figure.querySelectorAll("path.line, path.dots, path.band")];
  const sizes = paths.map((path) => path.getBoundingClientRect());
  return { title: figure.querySelector("strong").textContent, width: area.width, height: area.height,
           drawn: sizes.some((size) => size.width > area.width / 3 || size.height > area.height / 3),
           seen: paths.every((path) => getComputedStyle(path).stroke !== "none" || path.classList.contains("band")) };
}))()"""
OVERLAPS = """(() => [...document.querySelectorAll(".frame")].flatMap((frame) => {
  const found = [];
  for (const kind of ["x", "y"]) {
    const ticks = [...frame.querySelectorAll(`span.${kind}`)];
    const boxes = ticks.map((each) => [each.textContent, each.getBoundingClientRect()]);
    boxes.forEach(([text, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
      if (a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom) found.push([text, other]);
    }));
  }
  return found;
}))()"""
WIDTHS = "[document.scrollingElement.scrollWidth, window.innerWidth]"
SORTED = """(() => {
  const heads = [...document.querySelectorAll("#runs thead button")];
  heads.find((button) => button.textContent === "loss").click();
  const column = heads.findIndex((button) => button.textContent === "loss");
  const cells = [...document.querySelectorAll("#runs tbody tr")].map((row) => Number(row.cells[column].dataset.v));
  const field = document.querySelector("input[data-table=runs]");
  field.value = "FAILED";
  field.dispatchEvent(new Event("input"));
  const shown = [...document.querySelectorAll("#runs tbody tr")].filter((row) => !row.hidden);
  return { cells, shown: shown.length, said: document.getElementById("runs-count").textContent };
})()"""
HOVER = """(() => {
  const frame = document.querySelector(".frame"), area = frame.getBoundingClientRect();
  const at = { clientX: area.left + area.width / 2, clientY: area.top + area.height / 2, bubbles: true };
  frame.dispatchEvent(new PointerEvent("pointermove", at));
  return document.querySelector(".hover")?.textContent;
})()"""
INJECTED = """(async () => {
  const script = document.createElement("script");
  script.textContent = "window.injected = true";
  document.body.append(script);
  const image = new Image();
  const ended = new Promise((end) => { image.onload = () => end("loaded"); image.onerror = () => end("refused"); });
  image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACw=";
  return [await ended, window.injected === true, await fetch("data:,x").then(() => "fetched", () => "refused")];
})()"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run's page and a sweep's."""
    if chromium.find() is None:
        assert not REQUIRED, "there is no chromium here: .ci/setup installs it"
        pytest.skip("there is no chromium on this machine (apt-get install chromium)")
    runs_dir = tmp_path_factory.mktemp("runs")
    made = {}
    run = full_run(runs_dir, word="</script><b>a_name_without_any_place_to_break_" + "x" * 120, name="n" * 60)
    for kind, name in (("run", run.path.name), ("sweep", sweep(runs_dir, 62))):
        made[kind] = runs_dir / f"{kind}.html"
        assert cli.main(["report", "--runs-dir", str(runs_dir), name, "--output", str(made[kind])]) == 0
    return made


@pytest.fixture(scope="module")
def browser(pages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium.browser(tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.mark.parametrize("kind", ["run", "sweep"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_page_is_drawn_and_asks_nobody(
    browser: Browser, pages: dict[str, Path], kind: str, width: int
) -> None:
    browser.open(pages[kind], width)
    plots = browser.ask(DRAWN)
    assert len(plots) >= 6
    assert [plot for plot in plots if not (plot["drawn"] and plot["seen"] and plot["width"] > 200)] == []
    content, window = browser.ask(WIDTHS)
    assert content <= window == width
    assert browser.ask(OVERLAPS) == []
    assert browser.requests() == [pages[kind].as_uri()]
    assert browser.complaints() == []


def test_dark_is_dark(browser: Browser, pages: dict[str, Path]) -> None:
    colours = []
    for dark in (False, True):
        browser.open(pages["run"], dark=dark)
        colours.append(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_tables_sort_and_filter_and_plots_say_values(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["sweep"])
    found = browser.ask(SORTED)
    assert len(found["cells"]) == 62 and found["cells"] == sorted(found["cells"])
    assert (found["shown"], found["said"]) == (1, "1 of 62")
    browser.open(pages["run"])
    assert browser.ask(HOVER).startswith("step 1")
    assert browser.complaints() == []


def test_what_is_put_into_a_page_can_do_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    assert browser.ask(INJECTED) == ["refused", False, "refused"]
    assert [url for url in browser.requests() if not url.startswith("data:")] == [pages["run"].as_uri()]
