"""What Hydra's users are used to: --cfg, --help, --info, tab completion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hpcdl.launch.__main__ import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def test_cfg_shows_the_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = yaml.safe_load(shown(capsys, "--cfg", "job", "+experiment=lora_llama", "optim.lr=0.5"))
    assert (plain["name"], plain["optim"]["lr"], plain["peft"]["rank"]) == ("lora_llama", 0.5, 16)
    assert not list(folder.iterdir()), "no outputs/ as Hydra would make"


def test_cfg_of_a_part_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "+experiment=lora_llama", "seed=${trainer.max_steps}", "--cfg", "job", "--resolve")
    assert yaml.safe_load(text)["seed"] == 20
    part = shown(capsys, "--cfg", "job", "--package", "optim", "+experiment=lora_llama")
    assert part.startswith("# @package optim\n") and "lora_llama" not in part


@pytest.mark.parametrize("kind", ["hydra", "all"])
def test_cfg_of_hydra_itself(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "sweeper" in shown(capsys, "--cfg", kind)


def test_cfg_takes_keys_that_only_the_spec_knows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c" / "cluster").mkdir(parents=True)
    (folder / "c" / "cluster" / "bare.yaml").write_text("kind: slurm\n")
    text = shown(
        capsys, "--config-dir", "c", "--cfg", "job", "-p", "cluster", "cluster=bare", "cluster.nodes=3"
    )
    assert yaml.safe_load(text) == {"kind": "slurm", "nodes": 3}


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_says_what_there_is(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, flag)
    for part in (
        "+experiment=lora_llama", "experiment: cartpole, cartpole_reinforce, distill_pruned",
        "cluster: kubernetes, local", "dry_run=true",
        "parsable=true", "force=true", "-m", "--config-dir", "$(python -m hpcdl.launch -sc install=bash)", "Exit codes",
    ):  # fmt: skip
        assert part in text, part
    assert "Powered by Hydra" not in text
    assert len(text.splitlines()) < 75


def test_help_lists_ones_own_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "c" / "experiment").mkdir(parents=True)
    (folder / "c" / "experiment" / "mine.yaml").write_text("# @package _global_\n")
    assert "lora_llama, mine, pretrain_tiny" in shown(capsys, "--config-dir", "c", "--help")


def test_hydra_help_and_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert "hydra" in shown(capsys, "--hydra-help").lower()
    main(["--info", "defaults", "+experiment=lora_llama"])
    out, err = capsys.readouterr()
    assert "model/smollm2_135m" in out + err


def complete(line: str, shell_script: str, folder: Path) -> set[str]:
    """What bash offers after `line`, with the completion installed."""
    words = line.split(" ")
    script = (
        f"{shell_script}\nCOMP_LINE='{line}' COMP_POINT={len(line)} COMP_WORDS=({' '.join(words)})\n"
        '_hpcdl_launch_complete\nprintf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, cwd=folder, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("command", ["{python} -m hpcdl.launch", "{folder}/hpcdl launch"])
def test_tab_completion(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "hpcdl").write_text(f'#!/bin/bash\nexec {sys.executable} -m hpcdl "$@"\n')
    (folder / "hpcdl").chmod(0o755)
    program = command.format(python=sys.executable, folder=folder)
    script = shown(capsys, "-sc", "install=bash")
    equals = "COMP_WORDBREAKS=${COMP_WORDBREAKS//=}\n"  # some users set bash so; by default it holds =
    assert complete(f"{program} model=", equals + script, folder) >= {
        "model=llama_tiny",
        "model=smollm2_135m",
    }
    assert complete(f"{program} model=", script, folder) >= {"llama_tiny", "smollm2_135m"}
    assert complete(f"{program} +experiment=l", script, folder) == {"lora_llama"}
    assert complete(f"{program} -m seed=1 trainer.max_s", script, folder) == {"trainer.max_steps="}
    assert complete(f"{program} clus", script, folder) >= {"cluster="}


def test_completion_leaves_other_commands_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = shown(capsys, "-sc", "install=bash")
    assert complete("python -m http.server ", script, folder) == set()
    assert "bashcompinit" in shown(capsys, "-sc", "install=zsh")
    assert "complete -r" in shown(capsys, "-sc", "uninstall=bash")


def test_completion_for_another_shell_is_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-sc", "install=fish"]) == 2
    assert "bash or zsh" in capsys.readouterr().err


def test_flags_may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "+experiment=pretrain_tiny", "-m", "seed=1,2", "cluster=slurm", "dry_run=true")
    assert "--array=0-1" in text


def test_an_option_with_an_equals_sign_is_mended_within_its_list(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+experiment=pretrain_tiny", "cluster=slurm", "dry_run=true"]
    assert main([*words, "cluster.extra=[--nodelist=c1,--nice=5]"]) == 2
    fix = 'cluster.extra=["--nodelist=c1","--nice=5"]'
    assert f"'{fix}'" in capsys.readouterr().err
    assert main([*words, fix]) == 0
    assert "#SBATCH --nodelist=c1\n#SBATCH --nice=5\n" in capsys.readouterr().out
