"""In a forked process that has torch: what tests do to exports besides the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpcdl.runs.store import RunDir
from tests.worker.conftest import Workers


def made(workers: Workers, do: str, **asked: Any) -> dict[str, Any]:
    """What the function `do` of this file found."""
    run = workers.make()
    (run.path / "asked.json").write_text(json.dumps({"do": do, **asked}))
    workers.go(run, module="tests.worker.exporting")
    return dict(json.loads((run.path / "found.json").read_text()))


def main(run: RunDir) -> None:
    asked = json.loads((run.path / "asked.json").read_text())
    found = globals()[asked.pop("do")](run.path, **asked)
    (run.path / "found.json").write_text(json.dumps(found))


def model(path: Path, folder: str, **changes: Any) -> dict[str, Any]:
    """A tiny decoder of transformers with a byte vocabulary, saved; wide enough for blocks of 32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config

    from hpcdl.export import bytewise

    kind = {"qwen2": Qwen2Config}.get(changes.pop("kind", "llama"), LlamaConfig)
    shape = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 272, "max_position_embeddings": 128, "tie_word_embeddings": True,
        "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(kind(**{**shape, **changes}))
    with torch.no_grad():  # larger than they start: so that attention attends to something
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    built.save_pretrained(folder)
    if changes.get("vocab_size") == 512:
        sentencepiece(Path(folder))
    else:
        bytewise.write(Path(folder))
    return {"folder": folder}


def sentencepiece(folder: Path) -> None:
    """A vocabulary as Llama 2's: merges over whole text, `▁` for spaces, bytes where nothing else fits."""
    from tokenizers import Tokenizer, decoders, normalizers, trainers
    from tokenizers.models import BPE

    made = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=special, show_progress=False, max_token_length=8
    )
    made.train_from_iterator(
        ["the cat and the dog sat on the mat, and then they ran to the other end"] * 20, trainer
    )
    whole = json.loads(made.to_str())
    learned = sorted(whole["model"]["vocab"].items(), key=lambda item: item[1])[len(special) :]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *(word for word, _ in learned)]
    whole["model"]["vocab"] = {word: number for number, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def written(path: Path, folder: str, to: str, quant: str) -> dict[str, Any]:
    """An export without its gate, and whether another reader of its format finds the model's logits in it."""
    import torch
    from transformers import AutoModelForCausalLM

    from hpcdl.export import formats
    from hpcdl.export.source import Source

    source = Source(
        folder=Path(folder), tokenizer=Path(folder), name="tiny", eos_id=257, pad_id=258, prefix=(256,)
    )
    form = formats.get(to)
    out = path / "out"
    out.mkdir()
    form.write(source, quant, out, {})
    worst = max(
        float(abs(found - source.pieces()[name].read().float().numpy()).max())
        for name, found in form.weights(source, out)
    )
    tokens = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(str(place), dtype=torch.float32, **how)(input_ids=tokens).logits
        for place, how in ((folder, {}), (out, {"gguf_file": form.FILE}))
    )
    return {"logits": float((ours - theirs).abs().max()), "spread": float(ours.std()), "weights": worst}


def refused(path: Path, folder: str, break_: str, accept_loss: bool = False) -> dict[str, Any]:
    """What the gate says of a file whose writer and reader share a fault, or of a bound that nothing keeps."""
    from hpcdl.export import Bound
    from hpcdl.export.formats import gguf, onnx

    if break_ == "rope":
        gguf.interleaved = lambda name, whole, source, undo=False: whole
        return export(path, folder, "gguf", "f32")
    onnx.QUANTS["f32"] = Bound(perplexity=0.5, logits=1e-3, weights=1e-6)
    return export(path, folder, "onnx", "f32", accept_loss=accept_loss)


def damaged_program(path: Path, folder: str) -> dict[str, Any]:
    """What the gate says of an ExecuTorch program with a tensor's signs turned, cut off, and whole again."""
    from hpcdl.export.formats import executorch

    export(path, folder, "executorch", "f32")
    file = path / "out" / executorch.FILE
    whole = file.read_bytes()
    (told,) = (
        each
        for each in json.loads((file.parent / executorch.PLACES).read_text())
        if each["name"] == "model.layers.1.mlp.up_proj.weight"
    )
    lies = executorch._Stored(file).at(told["place"])
    turned = bytearray(lies)
    for at in range(3, len(turned), 4):
        turned[at] ^= 0x80
    assert whole.count(lies) == 1
    found = {}
    for name, damaged in (
        ("turned", whole.replace(lies, bytes(turned))),
        ("cut", whole[:-5000]),
        ("whole", whole),
    ):
        file.write_bytes(damaged)
        found[name] = str(
            export(path, folder, "executorch", "f32", check=str(file.parent)).get("error", "ok")
        )
    return found


def export(
    path: Path, folder: str, to: str, quant: str, *, accept_loss: bool = False, check: str | None = None
) -> dict[str, Any]:
    """What the whole command says, in this process."""
    from hpcdl.errors import HpcdlError
    from hpcdl.worker.tools import Request
    from hpcdl.worker.tools.export import run
    from tests.factory import tiny_spec

    spec = tiny_spec(
        model={"name": "tiny", "path": folder, "tokenizer": "auto"}, trainer__eval_samples=4,
        trainer__threads_per_process=1,
    )  # fmt: skip
    asked = {"to": to, "quant": quant, "accept_loss": accept_loss, "check": check, "embedding_quant": None}
    try:
        return run(Request(spec=spec, options=asked, out=path / "out"))
    except HpcdlError as error:
        return {"error": str(error), "left": sorted(each.name for each in path.glob("out*"))}
