"""`hpcdl eval`: the same loss as a training's own evaluation, sizes by hand, adapters, what is said of faults."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.worker.conftest import Finished, Workers
from tests.worker.tools import called, tool

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SMALL = {"trainer__eval_samples": 7, "trainer__micro_batch_size": 2}


@pytest.fixture(scope="module")
def trained(workers: Workers) -> Finished:
    return workers.train(1, **SMALL)


@pytest.fixture(scope="module")
def adapted(workers: Workers) -> Finished:
    return workers.train(1, **SMALL, peft__name="lora", peft__rank=4)


def at(folder: str | Path) -> dict[str, Any]:
    return {"model": {"name": "trained", "path": str(folder), "tokenizer": "byte"}}


def test_random_weights_have_the_loss_that_a_run_begins_with(workers: Workers, trained: Finished) -> None:
    found = tool(workers, "eval", **SMALL)
    assert found["eval_loss"] == pytest.approx(trained.result()["eval_loss_before"], rel=1e-9)
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert found["disk_bytes"] is None and found["peak_gpu_bytes"] is None
    assert found["parameters"] == trained.result()["parameters"]
    # fp32; the rotary embedding's 4 frequencies, twice, are buffers; the tied head counts once
    assert 0 <= found["weights_bytes"] - 4 * found["parameters"] <= 64
    assert found["weights_bytes"] < found["peak_rss_bytes"] < 2**32
    assert found["eval_tokens_per_s"] > found["decode_tokens_per_s"] > 0


def test_what_a_run_has_left_has_the_loss_that_it_ended_with(workers: Workers, trained: Finished) -> None:
    folder = trained.result()["model"]
    found = tool(workers, "eval", **at(folder), **SMALL)
    assert found["eval_loss"] == pytest.approx(trained.result()["eval_loss_after"], rel=1e-6)
    assert found["disk_bytes"] == (Path(folder) / "model.safetensors").stat().st_size


def test_an_adapter_goes_on_top(workers: Workers, adapted: Finished) -> None:
    result = adapted.result()
    base = adapted.run.path / "base"
    found = tool(workers, "eval", "--adapter", result["adapter"], **at(base), **SMALL)
    assert found["eval_loss"] == pytest.approx(result["eval_loss_after"], rel=1e-6)
    bare = tool(workers, "eval", **at(base), **SMALL)
    assert bare["eval_loss"] == pytest.approx(result["eval_loss_before"], rel=1e-6)
    assert found["weights_bytes"] > bare["weights_bytes"] and found["disk_bytes"] > bare["disk_bytes"]


def test_a_folder_that_is_no_adapter(workers: Workers, adapted: Finished, tmp_path: Path) -> None:
    base = adapted.run.path / "base"
    found = called(workers, "eval", "--adapter", str(tmp_path), ok=False, **at(base), **SMALL)
    assert found.codes != [0]
    assert f"hpcdl: {tmp_path} doesn't go on this model" in found.log
