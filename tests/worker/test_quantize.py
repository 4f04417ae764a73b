"""`hpcdl quantize`: folders that load again with the same loss, here and in transformers; what is said of faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import ConfigError, HpcdlError
from tests.factory import tiny_plain
from tests.worker.conftest import Workers
from tests.worker.tools import called, tool

pytest.importorskip("torch")
pytestmark = pytest.mark.torch

KEYS: dict[str, Any] = {"peft__name": "lora", "trainer__eval_samples": 6}
SCHEMES = ("int8", "int8_dynamic", "int4", "nf4", "fp4")


def scheme(name: str, **more: Any) -> dict[str, Any]:
    if name in ("nf4", "fp4"):
        pytest.importorskip("bitsandbytes")
    group = {"quant__group_size": 32} if name == "int4" else {}
    return {"quant__scheme": name, **group, **{f"quant__{key}": value for key, value in more.items()}}


def at(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """The keys that a launch on a folder resolves to: `quant` is what the folder says."""
    return {"model": {"name": "held", "path": str(folder), "tokenizer": "byte"}, **keys, **KEYS}


@pytest.fixture(scope="module")
def plain(workers: Workers) -> Path:
    """The tiny model as a folder of fp32 weights."""
    return Path(workers.train(1, trainer__max_steps=3, model__shape__num_key_value_heads=4).result()["model"])


class Made:
    """Folders that `hpcdl quantize` has written, each once."""

    def __init__(self, workers: Workers, plain: Path, where: Path) -> None:
        self._workers = workers
        self._plain = plain
        self._where = where
        self._told: dict[str, dict[str, Any]] = {}

    def folder(self, name: str) -> Path:
        self.told(name)
        return self._where / name

    def told(self, name: str) -> dict[str, Any]:
        """What the command said."""
        if name not in self._told:
            out = str(self._where / name)
            self._told[name] = tool(self._workers, "quantize", "--out", out, **at(self._plain, scheme(name)))
        return self._told[name]


@pytest.fixture(scope="module")
def made(workers: Workers, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(workers, plain, tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_folder_has_the_loss_of_the_model_that_was_held_in_memory(
    workers: Workers, plain: Path, made: Made, name: str
) -> None:
    keys = scheme(name)
    out, found = made.folder(name), made.told(name)
    assert found["disk_bytes"] == (out / "model.safetensors").stat().st_size
    assert found["disk_bytes"] < found["disk_bytes_before"]
    in_memory = tool(workers, "eval", **at(plain, keys))
    on_disk = tool(workers, "eval", **at(out, keys))
    assert on_disk["eval_loss"] == pytest.approx(in_memory["eval_loss"], rel=1e-6)
    assert on_disk["weights_bytes"] == in_memory["weights_bytes"]
    assert on_disk["parameters"] == in_memory["parameters"]
    assert on_disk["disk_bytes"] == found["disk_bytes"]
    assert not [path.name for path in out.parent.iterdir() if path.name not in SCHEMES]  # nothing half-made


def test_an_embedding_and_a_head_in_few_bits(workers: Workers, plain: Path, tmp_path: Path) -> None:
    keys = scheme("int4", head="int8")
    found = tool(workers, "quantize", "--out", str(tmp_path / "held"), **at(plain, keys))
    assert found["read_by"] == "hpcdl"
    in_memory = tool(workers, "eval", **at(plain, keys))
    on_disk = tool(workers, "eval", **at(tmp_path / "held", keys))
    assert on_disk["eval_loss"] == pytest.approx(in_memory["eval_loss"], rel=1e-6)
    assert on_disk["weights_bytes"] == in_memory["weights_bytes"] < on_disk["parameters"] * 1.1


def test_lora_is_trained_on_a_folder_and_evaluated_on_it(workers: Workers, made: Made) -> None:
    from hpcdl.worker import check_adapter

    keys, folder = scheme("int4"), made.folder("int4")
    run = workers.train(1, **at(folder, keys), peft__rank=4, optim__lr=0.003)
    result = run.result()
    assert result["eval_loss_after"] < result["eval_loss_before"]
    adapter = json.loads((Path(result["adapter"]) / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder)
    found = tool(workers, "eval", "--adapter", result["adapter"], **at(folder, keys))
    assert found["eval_loss"] == pytest.approx(result["eval_loss_after"], rel=1e-6)
    assert check_adapter.main(run.run) == 0


# --- calibration -----------------------------------------------------------------------------------------------


def test_calibrated_rounding_is_kept_and_the_same_everywhere(
    workers: Workers, plain: Path, tmp_path: Path
) -> None:
    keys = scheme("int4", calibration_samples=8)
    first = tool(workers, "quantize", "--out", str(tmp_path / "one"), **at(plain, keys))
    again = called(workers, "quantize", "--out", str(tmp_path / "two"), **at(plain, keys))
    assert "calibrating: 14 of 14 layers" not in again.log  # from the cache
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1] and len(files[0]) == first["disk_bytes"]
    told = json.loads((tmp_path / "one" / "config.json").read_text())["hpcdl_quantization"]
    assert told["calibration_samples"] == 0  # nothing is left to do
    on_disk = tool(workers, "eval", **at(tmp_path / "one", scheme("int4")))
    in_memory = tool(workers, "eval", **at(plain, keys))
    nearest = tool(workers, "eval", **at(plain, scheme("int4")))
    assert on_disk["eval_loss"] == pytest.approx(in_memory["eval_loss"], rel=1e-6)
    assert on_disk["eval_loss"] != pytest.approx(nearest["eval_loss"], rel=1e-5)


# --- transformers ------------------------------------------------------------------------------------------------


def plain_loss(folder: Path, **more: Any) -> float:
    """Mean loss of a fixed text in transformers' own words."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **more).eval()
    ids = torch.arange(60).remainder(250)[None]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def held_loss(folder: Path) -> float:
    import torch

    from hpcdl.worker import quantized

    config = quantized.scheme_of(folder)
    model = quantized.load(folder, config, "sdpa", torch.float32)
    ids = torch.arange(60).remainder(250)[None]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["int8", "int8_dynamic", "int4"])
def test_transformers_reads_it_through_compressed_tensors(made: Made, name: str) -> None:
    pytest.importorskip("compressed_tensors")
    folder = made.folder(name)
    more: dict[str, Any] = {}
    if (
        name == "int4"
    ):  # compressed-tensors 0.20 makes no room for packed zero points but where it unpacks at once
        from transformers import CompressedTensorsConfig

        more["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    assert plain_loss(folder, **more) == pytest.approx(held_loss(folder), rel=1e-4)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_transformers_reads_it_through_bitsandbytes(made: Made, name: str) -> None:
    assert plain_loss(made.folder(name)) == pytest.approx(held_loss(made.folder(name)), rel=1e-2)


# --- faults --------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(made: Made) -> Path:
    return made.folder("int4")


def opened(folder: Path) -> Any:
    import torch

    from hpcdl.worker import quantized

    return quantized.load(folder, quantized.scheme_of(folder), "sdpa", torch.float32)


def test_a_file_that_is_cut_short_is_named(held: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(held, tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HpcdlError, match=r"broken/model.safetensors is cut short: \S+ has"):
        opened(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight_scale"),
            r"lacks model.layers.1.mlp.up_proj.weight_scale",
        ),
        (lambda t: t.pop("model.norm.weight"), r"lacks model.norm.weight"),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5].clone()}),
            r"model.norm.weight in .*model.safetensors is \(5,\), and \(32,\) by .*config.json",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * float("nan")}),
            r"model.norm.weight in .*model.safetensors has numbers that are infinite or none",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()}),
            r"model.norm.weight in .*model.safetensors is of I32, and should be floating point",
        ),
    ],
)
def test_a_tensor_that_is_wrong_is_named_with_its_file(
    held: Path, tmp_path: Path, change: Any, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(held, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    change(tensors)
    save_file(tensors, broken / "model.safetensors")
    with pytest.raises(HpcdlError, match=message):
        opened(broken)


def test_what_cannot_be_quantized(workers: Workers, plain: Path, tmp_path: Path) -> None:
    found = called(workers, "quantize", "--out", str(tmp_path / "no"), ok=False, **at(plain, {}))
    assert "hpcdl: how? quant=int4" in found.log
    assert not (tmp_path / "no").exists()


def test_what_was_there_stays_until_the_new_folder_is_whole(tmp_path: Path) -> None:
    from hpcdl.worker.cache import anew

    out = tmp_path / "out"
    anew(out, lambda folder: (folder / "a").write_text("1"))  # type: ignore[arg-type,return-value]

    def fails(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise HpcdlError("the disk is full")

    with pytest.raises(HpcdlError, match="full"):
        anew(out, fails)
    assert (out / "a").read_text() == "1"
    anew(out, lambda folder: (folder / "b").write_text("2"))  # type: ignore[arg-type,return-value]
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def resolved(folder: Path, **dotted: Any) -> Any:
    from hpcdl import experiment

    model = {"name": "held", "path": str(folder), "tokenizer": "byte"}
    return experiment.load(tiny_plain(model=model, **dotted))[0]


def test_a_launch_takes_the_scheme_from_the_folder(held: Path) -> None:
    spec = resolved(held, peft__name="lora")
    assert spec.quant.scheme == "int4" and spec.quant.group_size == 32
    assert resolved(held, peft__name="lora", **scheme("int4")).quant == spec.quant


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "which can't take updates, and peft=none trains them"),
        ({"peft__name": "lora", "quant__scheme": "int8"}, "holds its weights as int4 already"),
        (
            {"peft__name": "lora", **{"quant__scheme": "int4", "quant__group_size": 64}},
            "holds its weights as int4",
        ),
    ],
)
def test_a_launch_that_wants_it_otherwise_is_refused(
    held: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        resolved(held, **changes)
