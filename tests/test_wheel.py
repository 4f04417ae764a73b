"""The wheel carries its configs and templates, and the launcher works where torch is not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.making import make_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def login_node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and the launcher's own dependencies: a login node."""
    folder = tmp_path_factory.mktemp("login")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder / "dist", ROOT], check=True)
    (wheel,) = (folder / "dist").glob("hpcdl-*.whl")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "-q", "--disable-pip-version-check", "install", wheel], check=True)
    return folder / "venv" / "bin"


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)


def test_the_launcher_installs_and_runs_without_torch(login_node: Path, tmp_path: Path) -> None:
    mine = tmp_path / "my_conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(
        "# @package _global_\ndefaults:\n  - pretrain_tiny\n  - _self_\nname: mine\ntrainer:\n  max_steps: 7\n"
    )
    assert run(login_node / "python", "-c", "import torch", cwd=tmp_path).returncode != 0
    dry = run(
        login_node / "python", "-m", "hpcdl.launch", "--config-dir", "my_conf", "+experiment=mine",
        "cluster=slurm", "dry_run=true", cwd=tmp_path,
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    assert "#SBATCH" in dry.stdout and "srun" in dry.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my_conf"]


def test_the_console_script_says_what_it_can(login_node: Path, tmp_path: Path) -> None:
    done = run(login_node / "hpcdl", "--help", cwd=tmp_path)
    assert done.returncode == 0
    for verb in ("launch", "status", "logs", "cancel"):
        assert verb in done.stdout


def test_a_report_finds_its_templates(login_node: Path, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, state="FAILED", kind="local", submission=None).path
    done = run(login_node / "hpcdl", "report", run_dir, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")


def test_training_without_torch_says_what_to_install(login_node: Path, tmp_path: Path) -> None:
    done = run(login_node / "hpcdl", "launch", "+experiment=pretrain_tiny", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "hpcdl[train]" in done.stderr and "Traceback" not in done.stderr
