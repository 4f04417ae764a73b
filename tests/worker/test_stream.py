"""offload=stream: a layer in memory at a time, and the very training that ordinary training is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.worker.conftest import Finished, Workers

pytestmark = pytest.mark.torch

COMMON: dict[str, Any] = {
    "trainer__max_steps": 5,
    "trainer__global_batch_size": 6,
    "trainer__micro_batch_size": 2,
    "trainer__eval_every": 2,
    "trainer__eval_samples": 14,
    "task__name": "sft",  # every sequence has another number of targets
    "data__packing": False,
    "data__seq_len": 64,
    "optim__lr": 0.003,
    "optim__eps": 1e-6,
    "optim__weight_decay": 0.1,
    "model__shape__num_hidden_layers": 3,
}
UNTIED = {"model__shape__tie_word_embeddings": False, "model__shape__vocab_size": 261}
SGD = {"optim__name": "sgd", "optim__lr": 0.02}
STREAM = {"offload__name": "stream"}
CASES: dict[str, dict[str, Any]] = {
    "tied-adamw-clipped": {"trainer__max_grad_norm": 0.5},
    "untied-sgd": {**UNTIED, **SGD, "trainer__max_grad_norm": None},
    "untied-adamw-activations_on_disk": {**UNTIED, "offload__activations": "disk"},
    "tied-sgd_without_state-host": {**SGD, "optim__momentum": 0.0, "offload__device": "host"},
}


def weights(finished: Finished) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder = finished.run.path / "model"
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("case", CASES)
def test_it_is_ordinary_training(workers: Workers, case: str) -> None:
    given = {**COMMON, **CASES[case]}
    plain = workers.train(**{key: value for key, value in given.items() if not key.startswith("offload")})
    streamed = workers.train(**{**given, **STREAM})
    assert streamed.losses() == pytest.approx(plain.losses(), rel=1e-5)
    assert streamed.evaluations() == pytest.approx(plain.evaluations(), rel=1e-5)
    norms = [[m["grad_norm"] for m in f.run.metrics() if "loss" in m] for f in (plain, streamed)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    ours, theirs = weights(streamed), weights(plain)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
