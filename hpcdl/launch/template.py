"""Where the sbatch templates are: `python -m hpcdl.launch.template` prints the path."""

from __future__ import annotations

from functools import cache
from pathlib import Path

NAME = "torchrun.sbatch"
MARKER = "# ---- hpcdl: the body of every job ----"
"""The line in the template from which on it is the same for everybody."""

_PACKAGE = Path(__file__).resolve().parent.parent


def path() -> Path:
    """The template: in a checkout `slurm/`, in an installed wheel `hpcdl/slurm_templates/`.

    Raises:
        FileNotFoundError: neither is there; the installation is broken.
    """
    places = (_PACKAGE / "slurm_templates" / NAME, _PACKAGE.parent / "slurm" / NAME)
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"the template is neither {places[0]} nor {places[1]}: install hpcdl again")


@cache
def body() -> str:
    """The template's text from the marker line on."""
    text = path().read_text(encoding="utf-8")
    assert text.count(f"\n{MARKER}\n") == 1, f"{path()} has not exactly one marker line"
    return text[text.index(f"\n{MARKER}\n") + 1 :]


if __name__ == "__main__":
    print(path())
