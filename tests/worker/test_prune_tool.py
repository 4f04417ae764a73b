"""`hpcdl prune`: a folder that from_pretrained reads, with zeros in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import HpcdlError
from tests.factory import tiny_spec

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from hpcdl.compress.prune import _masks  # noqa: E402
from hpcdl.worker.tools import Request, prune  # noqa: E402


def run(out: Path, **dotted: Any) -> dict[str, Any]:
    spec = tiny_spec(**{"peft__name": "lora", "trainer__threads_per_process": 1, **dotted})
    return prune.run(Request(spec=spec, out=out))


def test_a_pruned_folder_loads_and_says_what_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = run(
        tmp_path / "half", prune__name="sparsegpt", prune__pattern="2:4", prune__calibration_samples=4
    )
    assert found["sparsity"] == 0.5 and found["matrices"] == 14
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for layer in _masks.linears(model).values():
        assert ((layer.weight == 0).view(-1, 4).sum(-1) == 2).all()
    told = json.loads((tmp_path / "half" / "prune.json").read_text())
    assert told["name"] == "sparsegpt" and told["sparsity"] == 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["half"]


def test_a_folder_in_16_bits_stays_in_16_bits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from hpcdl.worker.model import from_shape

    shape = tiny_spec().model.shape
    assert shape is not None
    from_shape(shape, "sdpa", 0).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    run(tmp_path / "out", prune__name="magnitude", prune__sparsity=0.25, model__path=str(tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    assert _masks.sparsity(_masks.linears(model)) == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ({}, "prune=none takes nothing out: prune=METHOD, one of magnitude, neurons, obd, sparsegpt, wanda"),
        ({"prune__name": "magnitude", "quant__scheme": "nf4"}, "prune first, quantize what comes out"),
        ({"prune__name": "magnitude", "prune__schedule": "cubic"}, "while a model is trained"),
    ],
)
def test_what_makes_no_sense_is_said(tmp_path: Path, dotted: dict[str, Any], message: str) -> None:
    with pytest.raises(HpcdlError, match=message):
        run(tmp_path / "out", **dotted)
    assert not list(tmp_path.iterdir())
