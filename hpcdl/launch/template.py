"""Where the sbatch templates are: `python -m hpcdl.launch.template` prints the path."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from hpcdl.spec import ClusterSpec

NAME = "torchrun.sbatch"
MARKER = "# ---- hpcdl: the body of every job ----"
"""The line in the template from which on it is the same for everybody."""
END_OF_FRAME = "# ---- hpcdl: on Slurm's nodes ----"
"""The line up to which it needs no Slurm: setup lines, teardown lines, and the code that stands."""

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


def frame() -> str:
    """The body's beginning, which local scripts share."""
    return body().partition(f"\n{END_OF_FRAME}\n")[0]


def frame_arrays(cluster: ClusterSpec) -> list[str]:
    """What the frame takes: the cluster's own lines."""
    return [*array("HPCDL_SETUP", cluster.setup), *array("HPCDL_TEARDOWN", cluster.teardown)]


def array(name: str, items: Sequence[str]) -> list[str]:
    """A bash array as lines of a script, every item quoted."""
    if not items:
        return [f"{name}=()"]
    return [f"{name}=(", *(f"    {shlex.quote(item)}" for item in items), ")"]


if __name__ == "__main__":
    print(path())
