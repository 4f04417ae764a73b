"""`python -m hpcdl.worker.tools TOOL SPEC_FILE [--json] [--adapter DIR=WEIGHT …] [--out DIR] [--options JSON]`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from hpcdl.compress import quant
from hpcdl.errors import HpcdlError
from hpcdl.runs.spec import read_spec
from hpcdl.worker.process import kill_with_parent
from hpcdl.worker.tools import Request


def main() -> int:
    """Runs the tool and prints what it found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tool")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--adapter", action="append", default=[], type=_adapter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--options", type=json.loads, default={})
    given = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    request = Request(
        spec=read_spec(given.spec), adapters=tuple(given.adapter), out=given.out, options=given.options
    )
    quant.hide_unused(quant.needs(request.spec, request.options.get("to")))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what is said on the way is no part of the answer
            tool = importlib.import_module(f"{__package__}.{given.tool}")
            found = tool.run(request)
    except HpcdlError as error:
        print(f"hpcdl: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    show = getattr(tool, "as_text", as_text)
    print(json.dumps(found, indent=1, ensure_ascii=False) if given.json else show(found))
    return 0


def _adapter(given: str) -> tuple[Path, float]:
    path, separator, weight = given.rpartition("=")
    return (Path(path), float(weight)) if separator else (Path(given), 1.0)


def as_text(found: dict[str, Any]) -> str:
    """Keys and values, a line each."""
    width = max(map(len, found), default=0)
    return "\n".join(f"{key:<{width}}  {_shown(key, value)}" for key, value in found.items())


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            return f"{value:.2e}"
        return f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    kill_with_parent()
    sys.exit(main())
