"""Models read tensor by tensor: the same as quantized in memory, from any files; what broken files say."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import HpcdlError
from tests.factory import tiny_spec

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.torch

FAMILIES = ("llama", "llama tied", "llama MHA", "mistral", "qwen2", "qwen3")


def model_of(family: str) -> Any:
    """A tiny random model of a family; Qwen2 has biases, Qwen3 norms of queries and keys."""
    import transformers

    kind = {"mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}.get(family, "Llama")
    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4 if family == "llama MHA" else 2, "head_dim": 16, "vocab_size": 300,
        "max_position_embeddings": 64, "tie_word_embeddings": family == "llama tied",
    }  # fmt: skip
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def save(model: Any, folder: Path, *, shard: str = "50KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    assert (folder / "model.safetensors.index.json").exists() == (shard != "1GB")
    return folder


def loaded(folder: Path, **dotted: Any) -> Any:
    from hpcdl.compress import quant
    from hpcdl.worker import model

    spec = tiny_spec(**{"model__path": str(folder), "quant__scheme": "nf4", "peft__name": "lora", **dotted})
    return quant.hold(spec, model.load(spec, str(folder)))


def in_memory(folder: Path, dtype: Any = None, **dotted: Any) -> Any:
    """Loaded whole by transformers, then quantized."""
    from transformers import AutoModelForCausalLM

    from hpcdl.compress import quant

    spec = tiny_spec(**{"quant__scheme": "nf4", "peft__name": "lora", **dotted})
    return quant.hold(spec, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32))


def assert_same(found: Any, expected: Any) -> None:
    theirs = expected.state_dict()
    ours = found.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HPCDL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_is_the_one_quantized_in_memory(family: str, tmp_path: Path) -> None:
    folder = save(model_of(family), tmp_path / "model")
    expected = in_memory(folder)
    assert_same(loaded(folder), expected)
    assert_same(loaded(folder), expected)  # from the cache


@pytest.mark.parametrize(
    ("embedding", "head"), [("int8", "nf4"), ("nf4", "none"), ("none", "int8"), ("fp4", "fp4")]
)
@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_edges_are_held_as_asked_for(family: str, embedding: str, head: str, tmp_path: Path) -> None:
    from hpcdl.distributed.decoder import is_tied
    from hpcdl.distributed.held import HeldEmbedding, HeldLinear

    tied = family == "llama tied"
    keys = {"quant__scheme": "fp4", "quant__embedding": "none" if tied else embedding, "quant__head": head}
    folder = save(model_of(family), tmp_path / "model", shard="1GB")
    found = loaded(folder, **keys)
    assert_same(found, in_memory(folder, **keys))
    kinds = [
        getattr(getattr(m, "matrix", None), "kind", "none")
        for m in (found.get_input_embeddings(), found.get_output_embeddings())
    ]
    assert kinds == ([head, head] if tied else [embedding, head])
    assert is_tied(found) == tied
    if tied and head != "none":
        assert isinstance(found.get_input_embeddings(), HeldEmbedding)
        assert isinstance(found.get_output_embeddings(), HeldLinear)
        assert found.get_input_embeddings().matrix is found.get_output_embeddings().matrix


@pytest.mark.parametrize(
    ("source", "dtype"), [("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "bfloat16")]
)
def test_the_dtype_is_the_base_s_whatever_the_files_have(source: str, dtype: str, tmp_path: Path) -> None:
    folder = save(model_of("llama").to(getattr(torch, source)), tmp_path / "model")
    precision = {"trainer__precision": "bf16" if dtype == "bfloat16" else "fp32"}
    expected = in_memory(folder, getattr(torch, dtype), **precision)
    assert_same(loaded(folder, **precision), expected)


def test_the_model_is_never_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' loader isn't called, and everything but buffers lies in the file."""
    import transformers

    folder = save(model_of("llama"), tmp_path / "model")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    model = loaded(folder)
    (file,) = (tmp_path / "cache" / "quantized").glob("*/weights.safetensors")
    first = {t.untyped_storage().data_ptr() for t in model.parameters()}
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    assert all(any(a <= at < b for a, b in spans) for at in first)


def test_what_cannot_be_streamed_is_loaded_whole_and_says_so(tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "model"
    model_of("llama").save_pretrained(folder)
    spec = {"quant__backend": "torchao"}
    pytest.importorskip("torchao")
    loaded(folder, **spec)
    assert (
        "the model is loaded whole first: torchao's tensors are made from a whole model"
        in capsys.readouterr().out
    )


def test_another_file_is_another_entry_of_the_cache(tmp_path: Path) -> None:
    folder = save(model_of("llama"), tmp_path / "model", shard="1GB")
    before = loaded(folder).state_dict()
    changed = model_of("llama")
    for parameter in changed.parameters():
        parameter.data.mul_(2)
    save(changed, folder, shard="1GB")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    after = loaded(folder).state_dict()
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 2 + 2  # and their locks


# --- broken files --------------------------------------------------------------------------------------------


def rewrite(file: Path, change: Any) -> None:
    """Changes a file's tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


NAME = "model.layers.1.mlp.down_proj.weight"


def truncated(file: Path) -> str:
    os.truncate(file, file.stat().st_size - 10)
    return r"is cut short: .* has [\d,]+ of its [\d,]+ bytes"


def cut_in_the_header(file: Path) -> str:
    os.truncate(file, 40)
    return "cut short within its header"


def empty(file: Path) -> str:
    os.truncate(file, 0)
    return "0 bytes"


def garbage(file: Path) -> str:
    file.write_bytes(struct.pack("<Q", 16) + b"not json at all!")
    return "no safetensors header"


def missing(file: Path) -> str:
    file.unlink()
    return r"is missing: model.safetensors.index.json says that it has "


def lost(file: Path) -> str:
    rewrite(file, lambda t: t.pop(NAME))
    return f"lacks {NAME}, which"


def one_more(file: Path) -> str:
    rewrite(file, lambda t: t.update({"model.layers.1.mlp.odd.weight": torch.ones(2)}))
    return r"model.layers.1.mlp.odd.weight in .*no such tensor"


def other_shape(file: Path) -> str:
    rewrite(file, lambda t: t.update({NAME: torch.ones(64, 64)}))
    return rf"{NAME} in .* is \(64, 64\), and \(64, 96\)"


def other_dtype(file: Path) -> str:
    rewrite(file, lambda t: t.update({NAME: torch.ones(64, 96, dtype=torch.int8)}))
    return f"{NAME} in .* is of I8"


def no_number(file: Path) -> str:
    rewrite(file, lambda t: t[NAME][3].fill_(float("nan")))
    return f"{NAME} in .*infinite or no numbers"


@pytest.mark.parametrize(
    "breaks",
    [
        truncated,
        cut_in_the_header,
        empty,
        garbage,
        missing,
        lost,
        one_more,
        other_shape,
        other_dtype,
        no_number,
    ],
)
def test_a_broken_file_is_named_with_its_tensor(breaks: Any, tmp_path: Path, fresh_cache: Path) -> None:
    folder = save(model_of("llama"), tmp_path / "model")
    file = shard_of(folder, NAME)
    said = breaks(file)
    with pytest.raises(HpcdlError, match=said) as caught:
        loaded(folder)
    assert str(file) in str(caught.value)
    left = [path for path in (fresh_cache / "quantized").glob("*") if not path.name.endswith(".lock")]
    assert left == []  # nothing half-made stays


@pytest.mark.parametrize("breaks", [truncated, missing])
def test_a_broken_file_is_named_without_quantization_too(breaks: Any, tmp_path: Path) -> None:
    folder = save(model_of("llama"), tmp_path / "model")
    file = shard_of(folder, NAME)
    said = breaks(file)
    with pytest.raises(HpcdlError, match=said) as caught:
        loaded(folder, quant={"scheme": "none"})
    assert str(file) in str(caught.value)


def test_a_tensor_that_no_file_has_is_named(tmp_path: Path) -> None:
    folder = save(model_of("llama"), tmp_path / "model", shard="1GB")
    rewrite(folder / "model.safetensors", lambda t: t.pop(NAME))
    with pytest.raises(HpcdlError, match=f"lacks {NAME}, which .*config.json asks for"):
        loaded(folder)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    folder = save(model_of("llama"), tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(HpcdlError, match=r"index.json is no index of a checkpoint"):
        loaded(folder)


def test_a_tied_head_beside_its_embedding_is_passed_over(tmp_path: Path) -> None:
    folder = save(model_of("llama tied"), tmp_path / "model", shard="1GB")
    expected = in_memory(folder)
    rewrite(
        folder / "model.safetensors",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    assert_same(loaded(folder), expected)


def test_what_is_written_is_read_by_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from hpcdl.distributed import shards

    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.tensor(7.0),
        "c": torch.arange(9, dtype=torch.uint8).bfloat16(),
    }
    with shards.Writer(tmp_path / "x.safetensors", 6) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    again = load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(again[name], tensor)
    (piece,) = [p for p in shards.header(tmp_path / "x.safetensors").values() if p.name == "a"]
    assert torch.equal(torch.cat(list(piece.parts(4))), tensors["a"].flatten())


def test_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    """`resident: layer` changes no number; copies, whose memory is no file's, are left alone."""
    import copy

    folder = save(model_of("llama"), tmp_path / "model")
    keys = {"quant__head": "nf4"}
    found, expected = loaded(folder, quant__resident="layer", **keys), loaded(folder, **keys)
    moved = copy.deepcopy(found)
    ids = torch.arange(60).view(2, 30)
    for _ in range(2):
        for model in (found, moved):
            assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert len(list((tmp_path / "cache" / "quantized").iterdir())) == 1 + 1  # the same entry, and its lock


def test_mapped_pages_leave_the_memory(tmp_path: Path) -> None:
    """As the kernel counts it, for a matrix of some megabytes."""
    from hpcdl.compress.quant import _hold
    from hpcdl.distributed import shards
    from hpcdl.distributed.held import HeldLinear
    from hpcdl.worker import streaming

    weight = torch.randn(4096, 1024)
    with shards.Writer(tmp_path / "x.safetensors", 8) as writer:
        for name, tensor in _hold.pack_as("int8", weight).items():
            writer.add(name, tensor)
    matrix = _hold.from_tensors("int8", (4096, 1024), dict(streaming._mapped(tmp_path / "x.safetensors")))

    def resident_kib() -> int:
        text = Path("/proc/self/smaps").read_text()
        mine = text[text.index(str(tmp_path / "x.safetensors")) :]
        return int(mine[mine.index("Rss:") :].split()[1])

    layer, x = HeldLinear(matrix), torch.randn(2, 1024)
    before = layer(x)
    assert resident_kib() > 4000
    matrix.give_back_after_use()
    assert torch.equal(layer(x), before)
    assert resident_kib() < 100
    assert torch.equal(layer(x), before)
