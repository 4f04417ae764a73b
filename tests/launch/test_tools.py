"""Commands on a model: what MODEL stands for, and which experiment the compute side is given."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import ConfigError, UsageError
from hpcdl.launch import tools
from hpcdl.spec.plain import load_yaml


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, Any]]]:
    """The commands that would be started on the compute side, and the experiments they would read."""
    seen: list[tuple[list[str], dict[str, Any]]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        seen.append((command, load_yaml(Path(command[4]))))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(tools.subprocess, "run", run)
    return seen


def folder(where: Path, **config: Any) -> Path:
    where.mkdir(parents=True)
    (where / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return where


def test_quantize_keeps_the_rest_in_16_bits_unless_told_otherwise(given: Any, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert tools.main("quantize", ["smollm2_135m", "quant=int8", "--out", out]) == 0
    command, spec = given.pop()
    assert command[1:4] == ["-m", "hpcdl.worker.tools", "quantize"]
    assert command[command.index("--out") + 1] == out
    assert spec["quant"]["scheme"] == "int8" and spec["trainer"]["precision"] == "bf16"
    assert tools.main("quantize", ["smollm2_135m", "quant=int8", "trainer.precision=fp32", "--out", out]) == 0
    assert given.pop()[1]["trainer"]["precision"] == "fp32"


def test_what_is_there_is_not_written_over_unasked(given: Any, tmp_path: Path) -> None:
    argv = ["smollm2_135m", "quant=int8", "--out", str(tmp_path)]
    with pytest.raises(UsageError, match="is there already: another folder, or --force"):
        tools.main("quantize", argv)
    assert tools.main("quantize", [*argv, "--force"]) == 0


def test_a_folder_of_bytes_has_its_tokenizer(given: Any, tmp_path: Path) -> None:
    made = folder(tmp_path / "my model")
    assert tools.main("eval", [str(made)]) == 0
    assert given.pop()[1]["model"]["tokenizer"] == "auto"
    (made / "byte_tokenizer.json").write_text("{}")
    assert tools.main("eval", [str(made)]) == 0
    model = given.pop()[1]["model"]
    assert model["tokenizer"] == "byte" and model["path"] == str(made) and model["name"] == "my model"


def test_an_adapter_stands_for_its_base_with_it(given: Any, tmp_path: Path) -> None:
    base, adapter = folder(tmp_path / "base"), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (adapter / "byte_tokenizer.json").write_text("{}")
    assert tools.main("eval", [str(adapter)]) == 0
    command, spec = given.pop()
    assert command[command.index("--adapter") + 1].startswith(str(adapter))
    assert spec["model"]["path"] == str(base) and spec["model"]["tokenizer"] == "byte"


def test_a_folder_says_how_it_is_held(given: Any, tmp_path: Path) -> None:
    keys = {"scheme": "int4", "group_size": 32}
    held = folder(tmp_path / "held", hpcdl_quantization=keys)
    assert tools.main("eval", [str(held)]) == 0
    spec = given.pop()[1]
    assert spec["quant"]["scheme"] == "int4" and spec["quant"]["group_size"] == 32
    with pytest.raises(ConfigError, match="holds its weights as int4 already"):
        tools.main("eval", [str(held), "quant=int8"])
    unknown = folder(tmp_path / "unknown", hpcdl_quantization={"scheme": "int3"})
    with pytest.raises(ConfigError, match="is none that this version of hpcdl knows"):
        tools.main("eval", [str(unknown)])


def test_nothing_is_called_so(given: Any) -> None:
    with pytest.raises(UsageError, match="no model is called smollm2_135; nearest name: smollm2_135m"):
        tools.main("eval", ["smollm2_135"])
