"""`python -m hpcdl.export.runtimes ASKED.json TOLD.json`: opens an export in its runtime, does one thing with it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from hpcdl.export import actions, runtimes


def main() -> int:
    """What was found goes into a file: a runtime's own words go where they like."""
    asked, told = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    if asked["cores"]:
        os.sched_setaffinity(0, asked["cores"])
    started = time.perf_counter()
    try:
        module = runtimes.get(asked["runtime"])
        imported = time.perf_counter()
        before = actions.peak_bytes()
        model = module.open(Path(asked["path"]), asked["threads"], asked["context"])
        opened = time.perf_counter()
        found = getattr(actions, asked["action"])(model, asked)
    except Exception as error:
        # whatever a runtime raises is what its user is told
        found = {"error": f"{type(error).__name__}: {error}"}
    else:
        found |= {
            "about": model.about, "import_s": imported - started, "load_s": opened - imported,
            "import_rss_bytes": before, "peak_rss_bytes": actions.peak_bytes(),
        }  # fmt: skip
    told.write_text(json.dumps(found), encoding="utf-8")
    return int("error" in found)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # runtimes have threads and tear-downs of their own: nothing is left to do
