"""Checkpoints, models and adapters that would run code: each would leave a file behind, and none does."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import HpcdlError
from hpcdl.spec.checkpoint import TRAINER, crc32_of, seal
from tests.factory import tiny_spec
from tests.worker.conftest import Workers

pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

METADATA = "torch.distributed.checkpoint.metadata"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What a bomb makes; it isn't there after the test."""
    path = tmp_path / "code-has-run"
    pickle.loads(pickle.dumps(Bomb(path)))
    path.rmdir()  # the bombs do work
    yield path
    assert not path.exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensors in torch's distributed format."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    path = tmp_path_factory.mktemp("saved")
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    save(state, storage_writer=FileSystemWriter(path), no_dist=True)
    return path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "step-00000002"))


def load(path: Path) -> dict[str, Any]:
    """As hpcdl loads it: the index first; what went wrong then is raised without torch's frame around it."""
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from hpcdl.worker.reading import saved_tensors
    from hpcdl.worker.unpickle import SafeReader

    assert set(saved_tensors(path)) >= {"a", "b"}
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
    try:
        load(state, storage_reader=SafeReader(path), no_dist=True)
    except CheckpointException as error:
        ((cause, _),) = error.failures.values()
        raise cause from error
    return state


def change(path: Path, how: Callable[[Any], None]) -> None:
    """Changes the index as torch itself reads it."""
    with (path / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    how(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def test_an_index_is_read_as_torch_reads_it(checkpoint: Path) -> None:
    from hpcdl.worker.unpickle import read_metadata

    found = read_metadata(checkpoint / ".metadata")
    with (checkpoint / ".metadata").open("rb") as file:
        expected = pickle.load(file)
    for field in ("state_dict_metadata", "planner_data", "storage_data", "version"):
        assert getattr(found, field) == getattr(expected, field)
    assert load(checkpoint)["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_an_index_that_would_run_code(checkpoint: Path, marker: Path) -> None:
    def everywhere(metadata: Any) -> list[Callable[[], None]]:
        info = next(iter(metadata.storage_data.values()))
        return [
            lambda: setattr(metadata, "planner_data", Bomb(marker)),
            lambda: setattr(metadata.storage_meta, "modules", [Bomb(marker)]),
            lambda: metadata.state_dict_metadata.update(x=Bomb(marker)),
            lambda: setattr(info, "relative_path", Bomb(marker)),
        ]

    original = (checkpoint / ".metadata").read_bytes()
    for number in range(4):
        (checkpoint / ".metadata").write_bytes(original)
        change(checkpoint, lambda metadata, n=number: everywhere(metadata)[n]())
        with pytest.raises(HpcdlError, match=r"was not executed: it names \w+\.mkdir"):
            load(checkpoint)


RAW = {
    "exec": b"cbuiltins\nexec\n(S'raise SystemExit'\ntR.",
    "dotted": b"\x80\x04\x8c\x08builtins\x8c\x0dexec.__call__\x93.",
    "through an allowed module": b"ctorch\nload\n.",
    "through torch.serialization": b"ctorch.serialization\nload\n.",
    "a class changed": f"c{METADATA}\nMetadata\n(N}}S'version'\nI7\nstb.".encode(),
    "a method replaced": f"c{METADATA}\nMetadata\n(N}}S'__setstate__'\nc{METADATA}\nMetadata\nstb.".encode(),
    "torch.Size changed": b"ctorch\nSize\n(N}S'numel'\nI7\nstb.",
    "a dtype changed": b"ctorch\nfloat32\n(N}S'itemsize'\nI7\nstb.",
    "a persistent id": b"S'x'\nQ.",
    "nothing": b"N.",
    "half": b"\x80\x04\x95\x00",
    "a list for a tuple": f"c{METADATA}\nMetadata\n)\x81]b.".encode("latin1"),
    "empty": f"c{METADATA}\nMetadata\n)\x81}}b.".encode("latin1"),
}


@pytest.mark.parametrize("raw", RAW)
def test_an_index_made_by_hand(raw: str, checkpoint: Path) -> None:
    import torch
    from torch.distributed.checkpoint.metadata import Metadata

    before = dict(vars(Metadata)), torch.Size([2]).numel()
    (checkpoint / ".metadata").write_bytes(RAW[raw])
    with pytest.raises(HpcdlError, match=r"\.metadata is not what hpcdl writes, and was not executed"):
        load(checkpoint)
    assert (dict(vars(Metadata)), torch.Size([2]).numel()) == before


def test_an_object_instead_of_a_tensor(checkpoint: Path, marker: Path) -> None:
    """What torch's own loader unpickles freely: the index calls the tensor an object, whose bytes are a bomb."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    buffer = io.BytesIO()
    import torch

    torch.save(Bomb(marker), buffer)
    data = buffer.getvalue()

    def swap(metadata: Any) -> None:
        metadata.state_dict_metadata["a"] = BytesStorageMetadata()
        index = next(key for key in metadata.storage_data if key.fqn == "a")
        info = metadata.storage_data.pop(index)
        info.relative_path, info.offset, info.length = "bomb", 0, len(data)
        metadata.storage_data[type(index)("a")] = info

    (checkpoint / "bomb").write_bytes(data)
    change(checkpoint, swap)
    with pytest.raises(HpcdlError, match=r"it names .*BytesStorageMetadata"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("path", "said"), [("../secret", "outside of the checkpoint"), ("/etc/passwd", "outside")]
)
def test_a_tensor_from_elsewhere(path: str, said: str, checkpoint: Path) -> None:
    change(checkpoint, lambda m: [setattr(info, "relative_path", path) for info in m.storage_data.values()])
    with pytest.raises(HpcdlError, match=said):
        load(checkpoint)


def test_tensors_and_random_states_that_would_run_code(
    checkpoint: Path, marker: Path, tmp_path: Path
) -> None:
    import torch

    from hpcdl.worker import rng

    torch.save(Bomb(marker), tmp_path / "rng-00000.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        rng.load(tmp_path / "rng-00000.pt")
    data = (tmp_path / "rng-00000.pt").read_bytes()

    def swap(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.relative_path, info.offset, info.length = "bomb", 0, len(data)

    (checkpoint / "bomb").write_bytes(data)
    change(checkpoint, swap)
    with pytest.raises(
        (pickle.UnpicklingError, ValueError, OSError, HpcdlError), match="Weights only load failed"
    ):
        load(checkpoint)


def test_a_run_goes_on_from_a_bomb(workers: Workers, marker: Path) -> None:
    """The whole way: another's run, its record and checksums in order."""
    theirs = (
        workers.train(trainer__max_steps=2, trainer__checkpoint_every=2).run.checkpoints / "step-00000002"
    )
    change(theirs, lambda metadata: setattr(metadata, "planner_data", Bomb(marker)))
    record = json.loads((theirs / TRAINER).read_text())
    record.pop("seal", None)
    record["files"][".metadata"] = (theirs / ".metadata").stat().st_size
    record["crc32"][".metadata"] = f"{crc32_of(theirs / '.metadata'):08x}"
    (theirs / TRAINER).write_text(json.dumps(seal(record)))
    run = workers.make(trainer__max_steps=3, trainer__resume_from=str(theirs))
    done = workers.go(run, ok=False)
    assert done.codes != [0] and "was not executed: it names" in done.log


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hpcdl.worker import model

    path = tmp_path_factory.mktemp("model")
    model.load(tiny_spec(), None).save_pretrained(path)
    return path


def test_a_models_own_code(model_folder: Path, tmp_path: Path, marker: Path) -> None:
    import torch

    from hpcdl.worker import model, streaming
    from hpcdl.worker.tokenizer import HfTokenizer

    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass C: pass\n")
    code = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoModel"), "evil.C")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": code}))
    tokenizer = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    spec = tiny_spec(model__path=str(folder))
    with pytest.raises(HpcdlError, match="contains custom code"):
        model.load(spec, str(folder))
    with pytest.raises(HpcdlError, match="contains custom code"):
        streaming.skeleton(str(folder), "sdpa", torch.float32)
    with pytest.raises(HpcdlError):
        assert HfTokenizer(str(folder)).eos_id


def test_pickled_weights_that_would_run_code(model_folder: Path, tmp_path: Path, marker: Path) -> None:
    import torch

    from hpcdl.worker import model

    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb(marker)}, folder / "pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, OSError, HpcdlError), match=r"[Ww]eights.only"):
        model.load(tiny_spec(model__path=str(folder)), str(folder))


def test_an_adapters_own_code(model_folder: Path, tmp_path: Path, marker: Path) -> None:
    import torch

    from hpcdl.worker import adapters, model

    base = model.load(tiny_spec(model__path=str(model_folder)), str(model_folder))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj"]}
    evil = {**config, "megatron_config": {"x": 1}, "megatron_core": "evil"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(evil))
    (adapter,) = adapters.named([(tmp_path, 1.0)])
    with pytest.raises(HpcdlError, match="names a Python module that is to be imported"):
        adapters.put_on(base, [adapter])
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"base_model.model.x": Bomb(marker)}, tmp_path / "adapter_model.bin")
    with pytest.raises((pickle.UnpicklingError, ValueError, OSError, HpcdlError), match=r"[Ww]eights.only"):
        adapters.put_on(base, [adapter])


def test_what_a_rank_leaves_of_an_error_has_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcdl import secrets
    from hpcdl.runs.store import RunDir
    from hpcdl.sync.story import without_secrets
    from hpcdl.worker import errors
    from hpcdl.worker.process import from_environment

    monkeypatch.setenv("WANDB_API_KEY", "sesame sesame 1")
    secrets.of_this_process.cache_clear()
    run = RunDir(tmp_path)
    who = from_environment()
    try:
        raise ValueError("401 for sesame sesame 1")
    except ValueError as error:
        errors.report(run, who, 3, error)
    (file,) = run.errors.iterdir()
    assert "sesame" not in file.read_text() and "401 for [hidden]" in file.read_text()
    plain = {"a": ["sesame sesame 1", "curl --token abc"], "b": 3}
    assert without_secrets(plain) == {"a": ["[hidden]", "curl --token [hidden]"], "b": 3}
    secrets.of_this_process.cache_clear()
