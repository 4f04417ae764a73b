"""`hpcdl export`: files that their own runtimes open, and a gate that finds what is wrong with one."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.worker.conftest import Workers
from tests.worker.exporting import made
from tests.worker.tools import called

pytest.importorskip("torch")
REQUIRED = os.environ.get("HPCDL_REQUIRE_EXPORT", "").split(",")


def runtime(package: str) -> pytest.MarkDecorator:
    """Left out where the runtime isn't installed; HPCDL_REQUIRE_EXPORT=onnxruntime,llama_cpp makes that a failure."""
    absent = importlib.util.find_spec(package) is None and package not in REQUIRED
    return pytest.mark.skipif(
        absent, reason=f"{package} is not installed (pip install 'hpcdl[export,gguf,executorch]')"
    )


pytestmark = pytest.mark.torch
onnx, llama_cpp, executorch = runtime("onnxruntime"), runtime("llama_cpp"), runtime("executorch")
ASKED = {"accept_loss": False, "check": None, "embedding_quant": None}
TRAINED = {"peft__name": "lora", "peft__rank": 4, "trainer__max_steps": 8, "trainer__eval_samples": 4}


@pytest.fixture(scope="module")
def models(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders: a tied Llama; one with a head of its own and another vocabulary; llama3's and qwen2's kinds."""
    folder = tmp_path_factory.mktemp("models")
    llama3 = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    kinds: dict[str, dict[str, Any]] = {
        "tied": {},
        "untied": {"tie_word_embeddings": False, "vocab_size": 301, "hidden_size": 96, "num_attention_heads": 3,
                   "num_key_value_heads": 1, "rope_parameters": llama3},
        "qwen2": {"kind": "qwen2"},
        "sentencepiece": {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2},
    }  # fmt: skip
    return {
        name: made(workers, "model", folder=str(folder / name), **kinds[name])["folder"] for name in kinds
    }


def test_another_reader_finds_the_models_logits_in_a_gguf_file(
    workers: Workers, models: dict[str, str]
) -> None:
    """transformers' own reader of GGUF, which knows nothing of this writer."""
    found = made(workers, "written", folder=models["tied"], to="gguf", quant="f32")
    assert found["logits"] < 1e-4 * found["spread"] and found["weights"] == 0


@llama_cpp
@pytest.mark.parametrize(
    ("name", "quant"),
    [("tied", "q8_0"), ("untied", "f32"), ("untied", "q4_0"), ("qwen2", "f16"), ("sentencepiece", "f16")],
)
def test_llama_cpp_proves_gguf(workers: Workers, models: dict[str, str], name: str, quant: str) -> None:
    found = made(workers, "export", folder=models[name], to="gguf", quant=quant)
    assert "error" not in found, found
    assert found["faults"] is None and "llama.cpp" in found["runtime"] and found["tokens_per_s"] > 0
    assert found["perplexity_after"] < found["perplexity_before"] * (1.25 if quant == "q4_0" else 1.01)
    if quant == "f32":
        assert found["logits_difference"] < 0.01


@llama_cpp
def test_rows_in_the_wrong_order_are_refused(workers: Workers, models: dict[str, str]) -> None:
    """Writer and reader agree, every weight is in the file: only the runtime's logits tell."""
    found = made(workers, "refused", folder=models["untied"], break_="rope")
    assert "log-probabilities differ by" in found["error"] and "--accept-loss" in found["error"]
    assert found["left"] == ["out.rejected"]


@onnx
@pytest.mark.parametrize(
    ("name", "quant", "most"), [("untied", "f32", 1e-4), ("tied", "int8", 0.06), ("qwen2", "int4", 0.45)]
)
def test_onnxruntime_proves_onnx(
    workers: Workers, models: dict[str, str], name: str, quant: str, most: float
) -> None:
    found = made(workers, "export", folder=models[name], to="onnx", quant=quant)
    assert "error" not in found, found
    assert found["faults"] is None and "onnxruntime" in found["runtime"]
    assert found["logits_difference"] < most and 10 << 20 < found["peak_rss_bytes"] < 300 << 20


@executorch
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quant", "most"), [("untied", "f32", 1e-4), ("tied", "int8", 0.15), ("qwen2", "int4", 0.5)]
)
def test_executorch_proves_its_program(
    workers: Workers, models: dict[str, str], name: str, quant: str, most: float
) -> None:
    found = made(workers, "export", folder=models[name], to="executorch", quant=quant)
    assert "error" not in found, found
    assert found["faults"] is None and "ExecuTorch" in found["runtime"]
    assert found["logits_difference"] < most and found["tokens_per_s"] > 0


@executorch
@pytest.mark.slow
def test_a_damaged_program_is_found(workers: Workers, models: dict[str, str]) -> None:
    """A tensor's signs turned, and a file that ends too early."""
    found = made(workers, "damaged_program", folder=models["tied"])
    assert "model.layers.1.mlp.up_proj.weight differs from the source's by 2 of its size" in found["turned"]
    assert "model.pte" in found["cut"]
    assert found["whole"] == "ok"


@onnx
def test_a_runs_adapter_is_merged_and_a_damaged_file_is_found(workers: Workers, tmp_path: Path) -> None:
    trained = workers.train(1, **TRAINED)
    result = trained.result()
    base = {"name": "base", "path": str(trained.run.path / "base"), "tokenizer": "byte"}
    out = tmp_path / "made"
    same = {**TRAINED, "model": base}

    def export(*flags: str, ok: bool = True, **asked: Any) -> Any:
        options = json.dumps({**ASKED, "to": "onnx", "quant": "f32", **asked})
        return called(workers, "export", "--options", options, "--out", str(out), *flags, ok=ok, **same)

    adapter = ("--adapter", result["adapter"])
    export(*adapter)
    card = json.loads((out / "export.json").read_text())
    gate = card["gate"]
    assert gate["perplexity_before"] == pytest.approx(result["eval_perplexity_after"], rel=1e-4)
    assert gate["perplexity_after"] == pytest.approx(result["eval_perplexity_after"], rel=1e-4)
    assert card["adapters"] == {result["adapter"]: 1.0} and not gate["faults"]
    assert f"| held-out perplexity | {gate['perplexity_before']:.3f}" in (out / "card.md").read_text()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # nothing half made is left
    export(*adapter, check=str(out))

    # the base without its adapter is another model
    failed = export(check=str(out), ok=False)
    assert failed.codes == [1] and "it is not its source" in failed.log

    # one tensor's sign
    data = out / "model.onnx.data"
    whole = data.read_bytes()
    import onnx as library

    graph = library.load(out / "model.onnx", load_external_data=False).graph
    (tensor,) = (each for each in graph.initializer if each.name == "model.layers.1.mlp.up_proj.weight")
    told = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    flipped = bytearray(whole)
    for at in range(told["offset"] + 3, told["offset"] + told["length"], 4):
        flipped[at] ^= 0x80
    data.write_bytes(flipped)
    failed = export(*adapter, check=str(out), ok=False)
    assert "model.layers.1.mlp.up_proj.weight differs from the source's by 2 of its size" in failed.log
    data.write_bytes(whole[:-5000])
    assert export(*adapter, check=str(out), ok=False).codes == [1]
    data.write_bytes(whole)

    # another vocabulary
    words = (out / "tokenizer.json").read_text()
    vocabulary = json.loads(words)
    turned = vocabulary["model"]["vocab"]
    vocabulary["model"]["vocab"] = {word: 255 - number for word, number in turned.items()}
    (out / "tokenizer.json").write_text(json.dumps(vocabulary))
    failed = export(*adapter, check=str(out), ok=False)
    assert "lines of text become other tokens than the source's" in failed.log


@onnx
def test_a_loss_is_accepted_where_its_user_says_so(workers: Workers, models: dict[str, str]) -> None:
    found = made(workers, "refused", folder=models["tied"], break_="bound")
    assert "perplexity" in found["error"] and found["left"] == ["out.rejected"]
    found = made(workers, "refused", folder=models["tied"], break_="bound", accept_loss=True)
    assert found["accepted_loss"] is True and "perplexity" in found["faults"]


@onnx
def test_pruned_neurons_are_left_out_by_a_run_that_exports_another(workers: Workers) -> None:
    """A chain of two runs: pruned and trained, then exported; the narrow model computes what the pruned one did."""
    pruned = workers.train(
        1, prune__name="neurons", prune__sparsity=0.5, prune__calibration_samples=4, trainer__max_steps=3,
        trainer__eval_samples=4,
    )  # fmt: skip
    assert pruned.result()["sparsity"] > 0.2
    exported = workers.train(
        1, task__name="export", task__run=str(pruned.run.path), task__to="onnx", task__quant="f32",
        trainer__eval_samples=4,
    )  # fmt: skip
    result = exported.result()
    card = json.loads((exported.run.path / "export" / "export.json").read_text())
    assert card["neurons"] == [32, 64] and result["faults"] == [] and exported.outcome()
    for key in ("eval_perplexity_before", "eval_perplexity_after"):
        assert result[key] == pytest.approx(pruned.result()["eval_perplexity_after"], rel=1e-4)


def test_what_a_run_may_ask_of_an_export_is_what_there_is() -> None:
    from hpcdl.export import formats
    from hpcdl.tasks.export import KINDS

    assert {name: tuple(formats.get(name).QUANTS) for name in formats.names()} == KINDS
