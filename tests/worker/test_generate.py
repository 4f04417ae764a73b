"""`hpcdl generate`: how a model goes on, with a run's adapter on its base held as the run held it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.worker.conftest import Finished, Workers
from tests.worker.tools import tool

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

PROMPT = "def f"
ASKED = {"prompt": PROMPT, "chat": False, "tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0}
QLORA: dict[str, Any] = {
    "peft__name": "lora", "peft__rank": 4, "quant__scheme": "nf4", "trainer__max_steps": 8,
    "task__sample_prompt": PROMPT, "task__sample_tokens": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(workers: Workers) -> Finished:
    return workers.train(1, **QLORA)


def written(workers: Workers, trained: Finished, *flags: str, **changes: Any) -> dict[str, Any]:
    base = {"name": "base", "path": str(trained.run.path / "base"), "tokenizer": "byte"}
    options = json.dumps({**ASKED, **changes})
    return tool(workers, "generate", "--options", options, *flags, **QLORA, model=base)


def test_the_adapter_on_its_quantized_base_writes_what_the_run_wrote(
    workers: Workers, trained: Finished
) -> None:
    sample = trained.result()["sample"]
    assert sample["before"] != sample["after"]
    found = written(workers, trained, "--adapter", trained.result()["adapter"])
    assert found["text"] == sample["after"] and found["prompt"] == PROMPT
    assert 1 < found["tokens"] <= 12 and found["tokens_per_s"] > 0 < found["load_s"]
    assert found["peak_rss_bytes"] > 100 << 20 and found["peak_gpu_bytes"] is None
    assert written(workers, trained)["text"] == sample["before"]


def test_what_is_drawn_depends_on_the_seed_alone(workers: Workers, trained: Finished) -> None:
    greedy = written(workers, trained)["text"]
    first, again, other = (
        written(workers, trained, temperature=1.5, top_p=0.95, seed=seed)["text"] for seed in (1, 1, 2)
    )
    assert first == again and len({first, other, greedy}) == 3
    # nothing but the likeliest token makes up so little of the probability
    assert written(workers, trained, temperature=1.5, top_p=1e-6, seed=1)["text"] == greedy


def test_the_text_as_it_is_read(trained: Finished) -> None:
    from hpcdl.worker.tools.generate import as_text

    found = {"prompt": "a", "text": "b", "tokens": 1, "load_s": 0.25, "tokens_per_s": None,
             "peak_rss_bytes": 3 << 29, "peak_gpu_bytes": None}  # fmt: skip
    assert as_text(found) == "a▸b\n\n1 tokens, loaded in 0.2 s, peak memory 1.5 GiB"


def test_a_runs_settings_become_overrides(trained: Finished, tmp_path: Path) -> None:
    from hpcdl.launch.tools import held_as_trained

    found = held_as_trained(Path(trained.result()["adapter"]))
    assert (
        found[0] == "quant=nf4" and "quant.head='none'" in found and found[-1] == "trainer.precision='fp32'"
    )
    assert held_as_trained(tmp_path / "adapter") == ()
