"""`hpcdl edge-chain`, `hpcdl export`, `hpcdl bench-edge` on the login node: what they ask for, what they say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpcdl.cli import main
from hpcdl.errors import UsageError
from hpcdl.launch import edge, exporting
from hpcdl.spec.plain import dump_yaml


def run(folder: Path, result: dict[str, Any] | None = None, **spec: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "spec.yaml").write_text(dump_yaml(spec))
    state = {"run_id": folder.name, "name": folder.parent.name, "state": "COMPLETED", "kind": "local"}
    (folder / "state.json").write_text(json.dumps(state))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_the_table_of_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCDL_RUNS", str(tmp_path))
    chain = run(tmp_path / edge.CHAIN / "aaaaaaaaaaaa", task={"name": "distill"})
    last = run(tmp_path / edge.EXPORT / "bbbbbbbbbbbb", task={"name": "export", "run": str(chain)})
    found = edge.rows(str(last), None)
    assert [row["stage"] for row in found] == ["source, 16 bit", "pruned", "pruned, distilled", "exported"]
    assert not any(value for row in found for key, value in row.items() if key != "stage")
    out = Console(width=80, record=True)
    edge.show(out, found, str(last))
    assert "not done yet: hpcdl edge-chain --table" in out.export_text()

    run(tmp_path / edge.SOURCE / "cccccccccccc", {"eval_perplexity_after": 12.5}, task={"name": "eval"})
    figures = {"eval_perplexity_before": 40.0, "eval_perplexity_after": 20.0}
    (chain / "result.json").write_text(json.dumps(figures))
    made = {"bytes": 67 << 20, "source_bytes": 269 << 20, "eval_perplexity_after": 21.5, "tokens_per_s": 88.0,
            "export_peak_rss_bytes": 150 << 20}  # fmt: skip
    (last / "result.json").write_text(json.dumps(made))
    out = Console(width=80, record=True)
    edge.show(out, edge.rows(str(last), None), str(last))
    lines = [line.split() for line in out.export_text().splitlines()]
    assert lines[1] == ["source,", "16", "bit", "269", "MiB", "12.50", "-", "-"]
    assert lines[4] == ["exported", "67", "MiB", "21.50", "150", "MiB", "88.00"]
    with pytest.raises(UsageError, match="is no run of edge_export"):
        edge.rows(str(chain), None)


def test_what_export_is_asked_wrongly_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (
            ["llama_tiny", "--to", "ggfu"],
            "--to ggfu: there is no such one; nearest: gguf\nallowed: executorch, gguf, onnx, safetensors",
        ),
        (["llama_tiny", "--to", "gguf", "--quant", "q8"], "--quant q8: there is no such one; nearest: q8_0"),
        (["llama_tiny", "--to", "onnx"], "--out DIR: llama_tiny is no run"),
        (["llama_tiny", "--to", "onnx", "--out", str(tmp_path)], f"{tmp_path} is there already"),
        (["llama_tiny", "--to", "onnx", "--check", str(tmp_path)], "there is no model.onnx in"),
        (
            ["llama_tiny", "--to", "onnx", "--check", "x", "--accept-loss"],
            "--check judges an export that is there",
        ),
    ):
        assert main(["export", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_runs_own_text_becomes_overrides(tmp_path: Path) -> None:
    data = {"kind": "jsonl", "paths": ["a b.jsonl"], "dataset": None, "packing": False, "workers": 0}
    made = run(
        tmp_path / "x" / "dddddddddddd", data=data, seed=7, task={"name": "sft"}, trainer={"eval_samples": 5}
    )
    assert exporting.run_of(str(made)) == made and exporting.run_of(str(tmp_path)) is None
    found = exporting.own_text(made)
    assert found[:2] == ("data=jsonl", "task=sft") and "data.paths=['a b.jsonl']" in found
    assert {"data.dataset=null", "data.packing=false", "seed=7", "trainer.eval_samples=5"} < set(found)
    assert not any("workers" in each for each in found)


def test_exports_are_found_by_folder_and_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    (tmp_path / "export.json").write_text(json.dumps({"format": "onnx", "name": "tiny", "quant": "f32"}))
    for given in (tmp_path, tmp_path / "model.onnx"):
        export = exporting.find(str(given))
        assert export is not None and export.runtime == "onnxruntime" and export.card["quant"] == "f32"
    assert exporting.find(str(tmp_path / "nothing")) is None
    assert main(["bench-edge", str(tmp_path / "nothing")]) == 2
    assert "is no export: a folder that hpcdl export wrote" in capsys.readouterr().err
    cores = len(os.sched_getaffinity(0))
    for threads in ("0", "x", str(cores + 1)):
        assert main(["bench-edge", str(tmp_path), "--threads", threads]) == 2
        assert f"numbers from 1 to {cores}" in capsys.readouterr().err
