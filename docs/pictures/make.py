"""The README's pictures: the live view as SVG, a run's report as PNG.

    python docs/pictures/make.py RUNS_DIR RUN        # RUN: whose report; RUNS_DIR: what `hpcdl top` shows

Writes top.svg and report.png beside this file. The report's picture needs chromium.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from hpcdl.report import files, make
from hpcdl.report.cost import Prices
from hpcdl.top.app import TopApp
from hpcdl.top.watch import Wanted, Watch

HERE = Path(__file__).parent
SIZE = (112, 24)
"""Columns and lines of the terminal."""
PAGE = (1000, 1150)
"""Pixels of the report's picture: its upper part."""


async def live_view(runs_dir: Path) -> str:
    """What `hpcdl top` shows of the runs, as SVG."""
    app = TopApp(Watch(Wanted(folder=runs_dir, queries=(), everything=True)))
    async with app.run_test(size=SIZE) as pilot:
        while not app.looked:
            await asyncio.sleep(0.1)
        await pilot.press("down")
        await pilot.pause(1.5)
        # The letters of the machine that shows it: none are fetched from elsewhere.
        return re.sub(r"@font-face \{.*?\}\s*", "", app.export_screenshot(title="hpcdl top"), flags=re.DOTALL)


def report(runs_dir: Path, run: str, picture: Path) -> None:
    """The run's page as a browser draws it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("the report's picture needs chromium")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        files.write(
            make.report([run], runs_dir, Prices(cpu_hour=None, gpu_hour=None)), files.wanted(None, str(page))
        )
        options = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
            f"--window-size={PAGE[0]},{PAGE[1]}", f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
        subprocess.run([browser, *options], check=True, capture_output=True, timeout=300)


def main() -> None:
    """Both pictures."""
    runs_dir, run = Path(sys.argv[1]).resolve(), sys.argv[2]
    (HERE / "top.svg").write_text(asyncio.run(live_view(runs_dir)), encoding="utf-8")
    report(runs_dir, run, HERE / "report.png")


if __name__ == "__main__":
    main()
