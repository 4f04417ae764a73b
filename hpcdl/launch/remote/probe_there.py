"""What a login node has, as one line of JSON. It is sent as text, and run there by any Python from 3.11 on.

Arguments: the folder of all runs, `write` or `look`, names of packages.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path


def written(folder: Path) -> str:
    """Why nothing can be written there; empty if something can."""
    try:
        os.umask(0o077)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 65536)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return ""


def codes(folder: Path) -> list[str]:
    """The copies of hpcdl that are there, the newest first."""
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
        return [path.name for path in sorted(found, key=lambda path: -path.stat().st_mtime)]
    except OSError:
        return []


def main(given: str, how: str, packages: list[str]) -> None:
    """Prints it."""
    folder = Path(os.path.normpath(Path.home() / Path(given).expanduser()))
    refused = written(folder) if how == "write" else ""
    standing = next(path for path in (folder, *folder.parents) if path.is_dir())
    found = {
        "python": sys.executable,
        "folder": str(folder),
        "missing": [name for name in packages if importlib.util.find_spec(name) is None],
        "refused": refused,
        "free": shutil.disk_usage(standing).free,
        "codes": codes(folder / ".code"),
        "rsync": shutil.which("rsync"),
        "sbatch": shutil.which("sbatch"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
