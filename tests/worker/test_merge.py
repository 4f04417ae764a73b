"""`hpcdl merge`: what comes out, several adapters with weights, dtypes, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpcdl.distributed import shards
from hpcdl.errors import HpcdlError
from hpcdl.launch import tools
from hpcdl.worker import adapters, merging
from hpcdl.worker.adapters import Adapter, Update
from hpcdl.worker.tools import Request, merge
from tests.factory import tiny_spec
from tests.worker.conftest import Finished, Workers
from tests.worker.tools import tool

pytestmark = pytest.mark.torch

LORA: dict[str, Any] = {
    "peft__rank": 4, "optim__lr": 0.05, "trainer__max_steps": 6, "optim__schedule": "constant",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(workers: Workers) -> Path:
    """A tiny trained Llama: fp32, one file."""
    return Path(workers.train(1, trainer__max_steps=3).result()["model"])


@pytest.fixture(scope="module")
def tuned(workers: Workers, base: Path) -> dict[str, Finished]:
    """Adapters of it, of every method."""
    return {
        name: workers.train(1, **{**LORA, **more}, peft__name=name, model__path=str(base), model__shape=None)
        for name, more in {"lora": {}, "rslora": {"optim__lr": 0.02}, "dora": {}}.items()
    }


def folder(run: Finished) -> Path:
    return Path(run.result()["adapter"])


def at(base: Path) -> dict[str, Any]:
    return {"model__path": str(base), "model__shape": None}


def in_16_bits(base: Path, to: Path, files: int = 2) -> Path:
    """The base in bf16, in several files with an index."""
    shutil.copytree(base, to)
    held = {name: tensor.bfloat16() for name, tensor in load_file(to / "model.safetensors").items()}
    (to / "model.safetensors").unlink()
    where = {name: f"model-{i % files}.safetensors" for i, name in enumerate(held)}
    for file in set(where.values()):
        save_file({n: t for n, t in held.items() if where[n] == file}, to / file, metadata={"format": "pt"})
    (to / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return to


# --- what comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_the_merged_model_is_the_trained_one(
    workers: Workers, base: Path, tuned: dict[str, Finished], name: str, tmp_path: Path
) -> None:
    run = tuned[name]
    out = tmp_path / "merged"
    found = tool(workers, "merge", "--adapter", str(folder(run)), "--out", str(out), **at(base))
    assert (found["checked"], found["matrices"], found["dtype"]) == ("yes", 14, "float32")
    assert found["logits_difference"] < 1e-5 < 0.01 < found["adapters_effect"]
    # Its loss is the run's: the same rows and arithmetic, without peft.
    same = tool(workers, "eval", **at(out))
    assert same["eval_loss"] == pytest.approx(run.result()["eval_loss_after"], rel=1e-5)
    assert (out / "byte_tokenizer.json").exists()
    assert json.loads((out / "merge.json").read_text())["adapters"] == {str(folder(run)): 1.0}
    # Names, shapes and files are the base's; what no adapter trains is the same to the last bit.
    before, after = (load_file(place / "model.safetensors") for place in (base, out))
    same_bits = {name for name in before if torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert len(before) - len(same_bits) == 14 and not any("proj" in name for name in same_bits)


def test_into_sixteen_bits_in_shards(
    workers: Workers, base: Path, tuned: dict[str, Finished], tmp_path: Path
) -> None:
    small = in_16_bits(base, tmp_path / "small")
    out = tmp_path / "merged"
    found = tool(workers, "merge", "--adapter", str(folder(tuned["lora"])), "--out", str(out), **at(small))
    assert (found["files"], found["dtype"], found["checked"]) == (2, "bfloat16", "yes")
    assert found["logits_difference"] < 2e-2 < found["adapters_effect"]
    update = Update(Adapter(path=folder(tuned["lora"])))
    before = shards.pieces(small)
    for name, piece in shards.pieces(out).items():
        wanted = before[name].read()
        if name in update.modules:  # rounded once
            wanted = (wanted.float() + update.of(name, wanted.float())).bfloat16()
        assert torch.equal(piece.read(), wanted), name


def test_several_with_weights(
    workers: Workers, base: Path, tuned: dict[str, Finished], tmp_path: Path
) -> None:
    """0.7 and 0.3 of two methods; the sum of the updates is what peft computes with both active."""
    first, second, out = folder(tuned["lora"]), folder(tuned["rslora"]), tmp_path / "merged"
    both = ["--adapter", f"{first}=0.7", "--adapter", f"{second}=-0.3"]
    found = tool(workers, "merge", *both, "--out", str(out), **at(base))
    assert found["checked"] == "yes" and found["logits_difference"] < 1e-5 < found["adapters_effect"]
    before, after = (load_file(place / "model.safetensors") for place in (base, out))
    name = "model.layers.1.mlp.down_proj.weight"
    parts = [load_file(place / "adapter_model.safetensors") for place in (first, second)]
    a, b = (
        [part[f"base_model.model.model.layers.1.mlp.down_proj.lora_{x}.weight"] for part in parts]
        for x in "AB"
    )
    wanted = before[name] + 0.7 * 32 / 4 * b[0] @ a[0] - 0.3 * 32 / 2 * b[1] @ a[1]
    torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-6)
    merged = tool(workers, "eval", **at(out))
    unmerged = tool(workers, "eval", *both, **at(base))
    assert unmerged["eval_loss"] == pytest.approx(merged["eval_loss"], rel=1e-5)


def test_adapters_by_name(base: Path, tuned: dict[str, Finished]) -> None:
    from transformers import AutoModelForCausalLM

    chosen = adapters.named([(folder(tuned["lora"]), 1.0), (folder(tuned["dora"]), 1.0)])
    assert [each.name for each in chosen] == ["tiny", "tiny_2"]
    model = adapters.put_on(AutoModelForCausalLM.from_pretrained(base), chosen)
    ids = torch.arange(12)[None]

    def loss() -> float:
        return model(ids, labels=ids).loss.item()

    together = loss()
    each = []
    for one in chosen:
        model.set_adapter(one.name)
        each.append(loss())
    assert len({together, *each}) == 3


# --- refused ----------------------------------------------------------------------------------------------


def test_a_wrong_merge_leaves_nothing(
    base: Path, tuned: dict[str, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits' check is no decoration: here the merge forgets the updates of one block."""
    right = Update.of

    def forgetful(self: Update, matrix: str, held: torch.Tensor) -> torch.Tensor:
        return right(self, matrix, held) * (".layers.1." not in matrix)

    monkeypatch.setattr(Update, "of", forgetful)
    spec = tiny_spec(**at(base), trainer__threads_per_process=1)
    request = Request(spec=spec, adapters=((folder(tuned["lora"]), 1.0),), out=tmp_path / "merged")
    with pytest.raises(HpcdlError, match="the merged model's logits differ"):
        merge.run(request)
    assert not list(tmp_path.iterdir())


def test_a_torn_shard_names_file_and_tensor(base: Path, tuned: dict[str, Finished], tmp_path: Path) -> None:
    small = in_16_bits(base, tmp_path / "small")
    file = small / "model-1.safetensors"
    last = max(shards.header(file).values(), key=lambda piece: piece.first).name
    whole = file.read_bytes()
    update, out = Update(Adapter(path=folder(tuned["lora"]))), tmp_path / "out"
    out.mkdir()
    for cut, words in (
        (3, last),
        (len(whole) - 100, "within its header"),
        (len(whole) - 4, "within its header"),
    ):
        file.write_bytes(whole[:-cut])
        with pytest.raises(HpcdlError, match="cut short") as error:
            merging.merge(small, [update], out)
        assert str(file) in str(error.value) and words in str(error.value)
    file.unlink()
    with pytest.raises(HpcdlError, match=r"model-1.safetensors is missing: .* says that it has "):
        merging.merge(small, [update], out)
    assert not list(out.iterdir())


def changed(adapter: Path, to: Path, **config: Any) -> Adapter:
    shutil.copytree(adapter, to)
    file = to / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return Adapter(path=to)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"bias": "all"}, "trains biases"),
        ({"init_lora_weights": "pissa"}, "has changed its base"),
        ({"modules_to_save": ["lm_head"]}, "whole modules"),
        ({"peft_type": "IA3"}, "no LoRA but IA3"),
        ({"use_dora": True}, "lacks lengths of model.layers"),
    ],
)
def test_updates_that_cannot_be_merged(
    tuned: dict[str, Finished], tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(HpcdlError, match=words):
        Update(changed(folder(tuned["lora"]), tmp_path / "a", **config))


def test_bases_that_nothing_is_merged_into(base: Path, tuned: dict[str, Finished], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    update = Update(Adapter(path=folder(tuned["lora"])))
    quantized = tmp_path / "quantized"
    shutil.copytree(base, quantized)
    config = json.loads((base / "config.json").read_text())
    (quantized / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "x"}})
    )
    with pytest.raises(HpcdlError, match="is quantized"):
        merging.merge(quantized, [update], out)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    held = load_file(base / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight"]
    save_file(held, other / "model.safetensors")
    with pytest.raises(HpcdlError, match=r"has no model.layers.1.mlp.up_proj.weight, .*another model"):
        merging.merge(other, [update], out)
    with pytest.raises(HpcdlError, match="no part of it can be taken"):
        Update(Adapter(path=folder(tuned["dora"]), weight=0.5))


def test_the_command_finds_adapters(
    tuned: dict[str, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = folder(tuned["lora"])
    monkeypatch.setenv("HPCDL_RUNS", str(lora.parents[2]))
    model = tools.find_model(str(lora))
    assert model.adapter == lora
    run = folder(tuned["dora"]).parent.name
    assert tools.chosen_adapters(model, [f"{run}=0.25", str(lora)]) == [
        (lora, 1.0), (folder(tuned["dora"]), 0.25), (lora, 1.0),
    ]  # fmt: skip
    with pytest.raises(tools.UsageError, match=r"no run in .* is called so"):
        tools.chosen_adapters(model, ["nothing=2"])
