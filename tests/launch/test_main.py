"""`hpcdl launch` as a whole: what it prints, its exit code, what lies on the disk afterwards."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcdl.launch.__main__ import main
from hpcdl.plan import nodes
from hpcdl.runs.store import RunDir
from tests.fake_slurm import FakeSlurm

TINY = ("+experiment=pretrain_tiny", "cluster=slurm")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to launch in."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def lines(text: str) -> list[tuple[str, str, Path]]:
    """The runs that `parsable=true` names."""
    found = [line.split("\t") for line in text.splitlines()]
    assert all(len(words) == 3 for words in found), text
    return [(run_id, job_id, Path(run_dir)) for run_id, job_id, run_dir in found]


def launch(capsys: pytest.CaptureFixture[str], *words: str) -> list[tuple[str, str, Path]]:
    assert main([*TINY, *words, "parsable=true"]) == 0
    return lines(capsys.readouterr().out)


def set_state(run: Path, **changes: Any) -> None:
    RunDir(run).update(**changes)


BROKEN: list[tuple[list[str], list[str]]] = [
    (["cluster=slrum"], ["cluster = slrum", "no such option", "nearest: slurm", "fix:     cluster=slurm"]),
    (["+experiment=lora_lama"], ["lora_llama", "+experiment=lora_llama"]),
    (["experiment=lora_llama"], ["with the plus", "+experiment=lora_llama"]),
    (["modle=llama_tiny"], ["nearest: model", "fix:     model=llama_tiny"]),
    (["model=Llama_tiny"], ["model=llama_tiny"]),
    (["trainer.max_stesp=3"], ["trainer.max_steps=3"]),
    (["max_steps=3"], ["nearest: trainer.max_steps"]),
    (["lr=0.1"], ["optim.lr=0.1"]),
    (["trainer.lr=0.1"], ["optim.lr=0.1"]),
    (["modle.path=/x"], ["no section modle", "model.path"]),
    (["trainer.max_steps=ten"], ["trainer.max_steps = ten", "whole number"]),
    (["trainer.max_steps=true"], ["not a whole number"]),
    (["trainer.max_steps=1.5"], ["not a whole number"]),
    (["trainer.max_steps=0"], ["too small", "at least 1"]),
    (["trainer.max_steps=null"], ["is null"]),
    (["trainer.max_steps="], ["not a whole number"]),
    (["trainer.max_steps=[1]"], ["not a whole number"]),
    (["trainer={max_steps:x}"], ["trainer.max_steps"]),
    (["+trainer.foo=1"], ["trainer.foo", "no such key"]),
    (["+foo=1"], ["foo", "no such key"]),
    (["+optim.lr=1"], ["has it already", "optim.lr=1"]),
    (["~optim.lrr"], ["can't be taken away", "~optim.lr"]),
    (["--config-dir", "~nobody/x"], ["no such folder"]),
    (["~trainer.max_steps"], ["trainer.max_steps", "is missing"]),
    (["~model"], ["model", "missing"]),
    (["optim.lr=1,2"], ["needs -m"]),
    (["-m", "optim.lr=interval(0,1)"], ["interval"]),
    (["-m", "model=glob(zzz*)"], ["matches nothing"]),
    (["-m", "optim.lr=1,-2,ten"], ["optim.lr = -2", "optim.lr = ten", "in:      optim.lr=-2"]),
    (["-m", "model=llama_tiny,lama"], ["model = lama", "in:      model=lama"]),
    (["-m", "wait=true,false"], ["can't differ"]),
    (["name=[1"], ["bracket"]),
    (["name='a"], ["quote"]),
    (["name=a b/c"], ["safe as the name", "name=a_b_c"]),
    (["trainer.max_steps==3"], ["trainer.max_steps=3"]),
    (["foo"], ["no = in it"]),
    (["=3"], ["no key before it"]),
    (["=" + "a" * 300], ["no key before it"]),
    (["model=" + "a" * 3000], ["no such option", "smollm2_135m"]),
    (["cluster=slurm", "cluster={null:2}"], ["null can't be a key"]),
    (["~"], ["nothing was submitted"]),
    (["--trainer.max_steps=3"], ["no such flag", "trainer.max_steps=3"]),
    (["--multrun"], ["nearest: --multirun"]),
    (["--cfg", "jobs"], ["jobs"]),
    (["--cfg", "job", "--multirun"], ["only one"]),
    (["--resolve"], ["belongs to --cfg"]),
    (["--config-dir", "nowhere"], ["--config-dir = nowhere", "no such folder"]),
    (["--config-name", "confg"], ["nearest: config"]),
    (["--cfg", "job", "cluster=slrum"], ["cluster=slurm"]),
    (["--cfg", "job", "--package", "modle"], ["nearest: model"]),
    (["data.paths=${nope}"], ["not there", "data.paths = ${nope}"]),
    (["seed=${trainer.max_step}"], ["nearest: ${trainer.max_steps}"]),
    (["seed=${seed}"], ["itself"]),
    (["name=${oc.env:NO_SUCH_VARIABLE}"], ["NO_SUCH_VARIABLE"]),
    (["name=${foo:1}"], ["resolved"]),
    (["optim.lr=???"], ["must be given"]),
    (["optim.lr.x=1"], ["optim.lr is one value", "fix:     optim.lr=1"]),
    (["model.shape.rope_scaling.factor=2"], ["model.shape"]),
    (["trainer.global_batch_size=7"], ["multiple of 4"]),
    (["cluster=local", "cluster.nodes=2"], ["this machine"]),
    (["data.seq_len=99999"], ["max_position_embeddings 1024", "data.seq_len=1024"]),
    (["task=sft"], ["no answers"]),
    (["data=text"], ["data.paths"]),
    (["data=jsonl", "data.paths=[nothing.jsonl]"], ["data.paths.0 = nothing.jsonl"]),
    (["model.path=/no/model"], ["model.path = /no/model"]),
    (["model=custom"], ["no weights"]),
    (["peft=lora", "peft.rank=-1", "peft.alpha=x"], ["peft.rank = -1", "peft.alpha = x"]),
    (["peft.rank=8"], ["lora, dora, rslora have it", "peft=lora peft.rank=8"]),
    (["+optim=sgd"], ["chosen already", "fix:     optim=sgd"]),
    (["parallel.tp=2"], ["processes_per_node"]),
    (["cluster=slurm_docker", "cluster.partition=hihg"], ["nearest: high"]),
    (["cluster=slurm_docker", "cluster.nodes=9", "cluster.mem_gb=64"], ["4 nodes", "5.85 GiB"]),
    (["after=no_such_run"], ["after = no_such_run"]),
    (["tracker=wandbb"], ["tracker=wandb"]),
    (["tracker.tags=x"], ["not a list", "tracker.tags=[x]"]),
    (["optim@foo=adamw"], ["optim"]),
    (["foo@bar=1"], ["foo"]),
    (["hydra.foo=1"], ["hydra.foo"]),
    (["hydra/launcher=submitit"], ["submitit"]),
    (["model=[llama_tiny,nope]"], ["model = nope"]),
    (["model=3"], ["model = 3"]),
    (["model=null"], ["model"]),
    (["cluster.extra=['--array=1-3']"], ["array_parallelism"]),
    (["seed=" + "9" * 5000], ["too many digits"]),
    (["name=" + "[" * 2000 + "]" * 2000], ["nested too deep", "at most 50"]),
    (["name='\udcff'"], ["not in UTF-8"]),
    (["a\nb=\x1b[31m"], ["a\\nb = \\x1b[31m", "no key that Hydra can read"]),
    (["~nope.x=1\t2"], ["~nope.x = 1\\t2", "leave ~nope.x out"]),
    (["name='" + "x" * 9000 + "'y"], ["… ("]),
    (["-m", "seed=range(1,1000000000)"], ["sweep of 1e+09 points", "at most 100000"]),
    (["-m", "seed=range(1000)", "optim.lr=range(1000)"], ["sweep of 1e+06 points"]),
    (["-m", "seed=range(1.0,2.0,0)"], ["without end"]),
    (["-m", "seed=range(nan,1)"], ["without end"]),
    (["cluster.setup=['a\\nb']", "cluster.env={1:[]}"], ["cluster.env.1"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), BROKEN, ids=lambda value: " ".join(value))
def test_a_broken_config_is_one_page(
    words: list[str], parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lead = [] if any(word.startswith(("experiment", "+experiment", "cluster")) for word in words) else TINY
    assert main([*lead, *words]) == 2
    out, err = capsys.readouterr()
    assert not out
    for part in (*parts, "nothing was submitted"):
        assert part in err, err
    for never in ("Traceback", "pydantic", "http", "omegaconf", "Exception"):
        assert never not in err
    assert not list(folder.iterdir()), "a broken config makes nothing"


FILES: list[tuple[str, list[str]]] = [
    ("a: [1\nb: 2\n", ["mine.yaml, line", "no YAML"]),
    ("\ttab: 1\n", ["mine.yaml, line 2", "no YAML"]),
    ("a: 1\na: 2\n", ["mine.yaml, line", "duplicate"]),
    ("- a\n- b\n", ["nothing was submitted"]),
    ("just text\n", ["nothing was submitted"]),
    ("trainer:\n  max_steps: ten\n  foo: 1\n", ["trainer.max_steps = ten", "trainer.foo"]),
    ("trainer: 3\n", ["trainer", "group of keys"]),
    ("defaults:\n  - override /model: lama_tiny\n", ["lama_tiny", "nearest: llama_tiny"]),
    ("defaults:\n  - /model: llama_tiny\n", ["model"]),
    ("defaults:\n  - override /modle: llama_tiny\n", ["modle"]),
    ("defaults:\n  - pretrain_tyny\n", ["pretrain_tyny"]),
    ("defaults: 3\n", ["defaults"]),
    ("seed: ${nope.nope}\n", ["seed = ${nope.nope}"]),
    ("seed: ${\n", ["mine.yaml", "${"]),
    ("tracker:\n  foo: ???\n", ["tracker.foo = ???", "must be given"]),
    ("optim:\n  lr: 1e-3\n", ["optim.lr"]),  # YAML 1.1 reads 1e-3 as text
    ("nmae: x\n", ["nearest: name"]),
]


@pytest.mark.parametrize(("text", "parts"), FILES, ids=lambda value: repr(value)[:40])
def test_a_broken_file_is_one_page(
    text: str, parts: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = folder / "my_conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\n" + text)
    code = main(["--config-dir", "my_conf", "+experiment=mine", "cluster=slurm", "dry_run=true"])
    out, err = capsys.readouterr()
    if parts == ["optim.lr"] and code == 0:
        return  # OmegaConf reads 1e-3 as a number: right
    assert code == 2 and not out
    for part in (*parts, "nothing was submitted"):
        assert part in err, err
    assert "Traceback" not in err and "http" not in err


def test_a_file_without_its_first_line_or_not_in_utf8(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = folder / "my_conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("trainer:\n  max_steps: 3\n")
    argv = ["--config-dir", "my_conf", "+experiment=mine", "cluster=slurm", "dry_run=true"]
    assert main(argv) == 2
    assert "@package _global_" in capsys.readouterr().err
    mine.write_bytes(b"# @package _global_\nname: \xff\xfe\n")
    assert main(argv) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_several_wrong_overrides_come_together(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["+experiment=lora_lama", "cluster=slrum", "trainer.lr=1", "trainer.max_steps=ten", "a=[1", "foo"]
    assert main(words) == 2
    err = capsys.readouterr().err
    for part in ("6 faults", "lora_llama", "cluster=slurm", "optim.lr=1", "= ten", "bracket", "no = in it"):
        assert part in err, err


def test_ones_own_experiment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = folder / "my_conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(
        "# @package _global_\ndefaults:\n  - pretrain_tiny\n  - override /optim: sgd\n  - _self_\n"
        "name: mine\ntrainer:\n  max_steps: 7\n"
    )
    assert main(["--config-dir", "my_conf", "+experiment=mine", "cluster=slurm", "dry_run=true"]) == 0
    assert "--job-name=mine" in capsys.readouterr().out


# --- submission, on a fake Slurm


def test_a_dry_run_prints_what_is_submitted_and_changes_nothing(
    folder: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, "dry_run=true"]) == 0
    dry = capsys.readouterr().out
    assert not list(folder.iterdir()) and not slurm.calls("sbatch")
    ((_, _, run_dir),) = launch(capsys)
    sent = (run_dir / "job.sh").read_text()
    assert dry.startswith(sent)
    assert "torch.distributed.run" in dry[len(sent) :]
    assert slurm.calls("sbatch")[0]["script"] == sent


def test_a_dry_run_needs_no_slurm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["-m", *TINY, "seed=1,2", "cluster.cpus_per_process=1,2", "dry_run=true"]) == 0
    assert capsys.readouterr().out.count("#!/bin/bash") == 2


def test_what_a_run_directory_holds(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    ((run_id, job_id, path),) = launch(capsys)
    names = sorted(p.name for p in path.iterdir() if p.name != "code")  # of a checkout only
    assert names == ["events.jsonl", "job.sh", "spec.yaml", "state.json"]
    run = RunDir(path)
    state = run.read_state()
    assert (state.run_id, state.job_id, state.state, state.kind) == (run_id, job_id, "PENDING", "slurm")
    assert job_id.endswith("_0") and state.max_steps == 40
    assert [event["event"] for event in run.events()] == ["submitted"]
    assert (run.runs_dir / "latest").resolve() == path
    assert (path / "job.sh").stat().st_nlink >= 2, "one file under several names"
    runs = run.runs_dir / ".submissions" / str(state.submission) / "runs.txt"
    assert runs.read_text() == f"{path}\n"


def test_what_is_said(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY]) == 0
    out = capsys.readouterr().out
    for part in ("pretrain_tiny", "_0", "directory", "hpcdl status ", "hpcdl logs -f ", "hpcdl cancel "):
        assert part in out


def test_launching_again_finds_the_run(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    first = launch(capsys)
    assert launch(capsys, "cluster.time_min=5", "tracker=wandb") == first
    assert main([*TINY]) == 0
    assert "already PENDING" in capsys.readouterr().out
    (run_id, _, path) = first[0]
    set_state(path, state="COMPLETED", exit_code=0)
    assert launch(capsys)[0][0] == run_id
    assert main([*TINY]) == 0
    assert "COMPLETED" in capsys.readouterr().out
    assert len(slurm.calls("sbatch")) == 1


def test_a_failed_run_is_taken_up_again_where_it_lies(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    ((run_id, _, path),) = launch(capsys)
    (path / "STOP").write_text("cancel\n")
    set_state(path, state="FAILED", reason="boom", exit_code=1, requeues=3, agent_pid=1)
    ((again_id, job_id, again_path),) = launch(capsys, "cluster.time_min=7")
    assert (again_id, again_path) == (run_id, path)
    state = RunDir(path).read_state()
    assert (state.state, state.attempt, state.reason, state.exit_code) == ("PENDING", 1, "", None)
    assert (state.job_id, state.requeues, state.agent_pid) == (job_id, 3, None)
    assert not (path / "STOP").exists()
    assert "time_min: 7" in (path / "spec.yaml").read_text()
    assert "--time=7" in (path / "job.sh").read_text()
    assert [e["event"] for e in RunDir(path).events()] == ["submitted", "submitted"]
    assert len(slurm.calls("sbatch")) == 2


def test_force_makes_a_new_run_each_time(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [launch(capsys)[0][0], *(launch(capsys, "force=true")[0][0] for _ in range(2))]
    assert ids == [ids[0], f"{ids[0]}-2", f"{ids[0]}-3"]
    assert launch(capsys)[0][0] == ids[-1], "without force the newest is found"
    assert len(slurm.calls("sbatch")) == 3


def test_sbatch_refuses(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.set(refuse="sbatch: error: invalid partition specified: gpu")
    assert main([*TINY]) == 3
    err = capsys.readouterr().err
    assert "invalid partition specified: gpu" in err and "Traceback" not in err
    (state_file,) = Path("runs").glob("*/*/state.json")
    run = RunDir(state_file.parent.absolute())
    assert run.read_state().state == "FAILED"
    assert "invalid partition" in run.read_state().reason
    slurm.set(refuse="")
    ((run_id, job_id, _),) = launch(capsys)
    assert run_id == run.path.name and job_id != "-"
    assert run.read_state().state == "PENDING"


def test_no_slurm_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main([*TINY]) == 3
    assert "sbatch is not on this machine" in capsys.readouterr().err


# --- sweeps


def test_one_array_for_each_shape(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    runs = launch(capsys, "-m", "seed=1,2,3", "cluster.cpus_per_process=1,2", "cluster.array_parallelism=2")
    calls = slurm.calls("sbatch")
    assert len(runs) == 6 and len(calls) == 2
    assert all("--array=0-2%2" in call["script"] for call in calls)
    jobs = [job_id for _, job_id, _ in runs]
    assert [job.split("_")[1] for job in jobs] == ["0", "0", "1", "1", "2", "2"]
    (record,) = [json.loads(p.read_text()) for p in Path("runs/.sweeps").iterdir()]
    assert [point["run_id"] for point in record["points"]] == [run_id for run_id, _, _ in runs]
    assert record["points"][0]["overrides"] == "seed=1 cluster.cpus_per_process=1"
    assert json.loads((runs[0][2] / "sweep.json").read_text()) == {"sweep": record["sweep"]}
    assert len({(path / "job.sh").stat().st_ino for _, _, path in runs}) == 2


def test_an_array_that_is_too_long_is_split(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-m", "seed=range(0,7)", "cluster.max_array_size=3", "cluster.array_parallelism=3")
    runs = launch(capsys, *words)
    arrays = [
        line for call in slurm.calls("sbatch") for line in call["script"].splitlines() if "--array" in line
    ]
    assert arrays == ["#SBATCH --array=0-2%1", "#SBATCH --array=0-1%1", "#SBATCH --array=0-1%1"]
    assert len(runs) == 7


def test_an_array_is_no_longer_than_slurm_says(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    """Fact 5: MaxArraySize bounds the index, and the cluster knows it best."""
    slurm.set(defaults="MaxArraySize            = 4\n", refuse="")
    nodes.configuration.cache_clear()
    try:
        launch(capsys, "-m", "seed=range(0,9)")
    finally:
        nodes.configuration.cache_clear()
    arrays = [
        line for call in slurm.calls("sbatch") for line in call["script"].splitlines() if "--array" in line
    ]
    assert arrays == ["#SBATCH --array=0-2%3"] * 3


def test_a_limit_of_jobs_is_told_with_what_to_do(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = "job submit limit, user's size and/or time limits"
    slurm.set(refuse=f"Batch job submission failed: Job violates accounting/QOS policy ({limit})")
    assert main([*TINY, "-m", "seed=1,2,3"]) == 3
    err = capsys.readouterr().err
    assert limit in err and "the same launch submits what is missing" in err
    slurm.set(refuse="")
    assert len(launch(capsys, "-m", "seed=1,2,3")) == 3


def test_equal_points_are_one_run(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(launch(capsys, "-m", "optim.lr=0.1,1e-1,0.2", "cluster.partition=a,b")) == 2


def test_a_sweep_submits_only_what_is_new(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    first = launch(capsys, "-m", "seed=1,2")
    set_state(first[0][2], state="COMPLETED", exit_code=0)
    second = launch(capsys, "-m", "seed=1,2,3")
    assert second[:2] == first
    assert "--array=0-0" in slurm.calls("sbatch")[1]["script"]
    assert main(["-m", *TINY, "seed=1,2,3"]) == 0
    assert "done before" in capsys.readouterr().out


def test_a_sweep_in_a_file(folder: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    mine = folder / "my_conf" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text(
        "# @package _global_\ndefaults:\n  - pretrain_tiny\n  - _self_\n"
        "hydra:\n  sweeper:\n    params:\n      seed: 1,2\n      optim.lr: 0.1,0.2\n"
    )
    argv = [
        "-m",
        "--config-dir",
        "my_conf",
        "+experiment=mine",
        "cluster=slurm",
        "optim.lr=0.3",
        "parsable=true",
    ]
    assert main(argv) == 0
    runs = lines(capsys.readouterr().out)
    specs = [(path / "spec.yaml").read_text() for _, _, path in runs]
    assert len(runs) == 2 and all("lr: 0.3" in spec for spec in specs)


def test_after_a_run_or_a_job(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    ((run_id, job_id, path),) = launch(capsys)
    launch(capsys, "seed=1", f"after={run_id}")
    launch(capsys, "seed=2", f"after={job_id}")
    launch(capsys, "seed=3", "after=99999")
    scripts = [call["script"] for call in slurm.calls("sbatch")[1:]]
    assert [f"--dependency=afterok:{wanted}" in script for wanted, script in
            zip((job_id, job_id, "99999"), scripts, strict=True)] == [True] * 3  # fmt: skip
    set_state(path, state="COMPLETED", job_id=job_id)
    launch(capsys, "seed=4", "after=latest", "dry_run=false", f"after={run_id}")
    assert "--dependency" not in slurm.calls("sbatch")[-1]["script"]
    set_state(path, state="FAILED", reason="boom", job_id=job_id)
    assert main([*TINY, "seed=5", f"after={run_id}"]) == 2
    assert "boom" in capsys.readouterr().err


# --- races and deaths


def _launch_in_a_process(barrier: Any, results: Any, words: list[str]) -> None:
    barrier.wait()
    results.put(main(words))


@pytest.mark.parametrize("resumed", [False, True])
def test_two_launchers_at_once_submit_once(
    resumed: bool, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    if resumed:
        ((_, _, path),) = launch(capsys)
        set_state(path, state="FAILED", reason="boom")
    before = len(slurm.calls("sbatch"))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    words = [*TINY, "parsable=true"]
    processes = [
        context.Process(target=_launch_in_a_process, args=(barrier, results, words)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    codes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert codes == [0, 0, 0, 0]
    assert len(slurm.calls("sbatch")) == before + 1
    (state_file,) = Path("runs").glob("pretrain_tiny/*/state.json")
    state = RunDir(state_file.parent.absolute()).read_state()
    assert (state.attempt, state.state) == (int(resumed), "PENDING")
    assert state.job_id is not None


def test_deleted_runs_do_not_meet_their_old_job(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    ((run_id, first_job, path),) = launch(capsys)
    first = RunDir(path).read_state().submission
    shutil.rmtree(path.parent)
    ((again, second_job, _),) = launch(capsys)
    assert again == run_id and first_job != second_job
    assert RunDir(path).read_state().submission != first, "the old job's agent sees that it is not meant"


STEPS = ("_claim_new", "_write", "_record", "_link_latest")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_between_any_two_steps(
    step: str,
    when: str,
    slurm: FakeSlurm,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The launcher dies at a step; once its death is known, launching again leaves one job that counts."""
    from hpcdl.launch import submit
    from hpcdl.runs import submissions

    pid = os.fork()
    if pid == 0:
        real = getattr(submit, step)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if when == "after":
                real(*args, **kwargs)
            os._exit(9)

        monkeypatch.setattr(submit, step, dying)
        main([*TINY])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    monkeypatch.setattr(submissions, "SBATCH_GRACE_S", 0.0)
    ((_, job_id, path),) = launch(capsys)
    state = RunDir(path).read_state()
    assert state.state == "PENDING" and state.job_id == job_id != "-"
    assert (path / "spec.yaml").exists() and (path / "job.sh").exists()
    submission = path.parent.parent / ".submissions" / str(state.submission)
    assert (submission / "runs.txt").read_text() == f"{path}\n"
    assert len(slurm.calls("sbatch")) == 1


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("experiment", ["lora_llama", "pretrain_tiny"])
def test_the_experiments_fit_what_one_would_try(
    experiment: str, nodes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [f"cluster.nodes={nodes}", f"cluster.processes_per_node={2 if nodes < 4 else 1}"]
    words = [f"+experiment={experiment}", "cluster=slurm_docker", "trainer.max_steps=1", *sizes]
    assert main([*words, "dry_run=true"]) == 0, capsys.readouterr().err


# --- the process as a whole


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_the_login_node_imports_nothing_heavy() -> None:
    script = (
        "import sys; from hpcdl.launch.__main__ import main\n"
        "code = main(['+experiment=lora_llama', 'cluster=slurm', 'dry_run=true'])\n"
        "heavy = {'torch', 'transformers', 'peft', 'wandb', 'numpy', 'matplotlib', 'submitit', 'rich', 'psutil'}\n"
        "sys.exit(code or str(sorted(heavy & set(sys.modules)) or 0) )\n"
    )
    done = run("-c", script)
    assert done.stderr.strip() in ("", "0"), done.stderr


def test_as_a_module_and_as_a_command() -> None:
    for words in (["-m", "hpcdl.launch"], ["-m", "hpcdl", "launch"]):
        done = run(*words, "cluster=slrum")
        assert done.returncode == 2, done.stderr
        assert "nearest: slurm" in done.stderr and "Traceback" not in done.stderr


def test_a_local_run_without_torch_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hpcdl.launch import running

    monkeypatch.setattr(running.importlib.util, "find_spec", lambda name: None)
    assert main(["+experiment=pretrain_tiny"]) == 2
    assert "pip install 'hpcdl[train]'" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_one_slip_doesn_t_hide_the_faults_of_other_sections(capsys: pytest.CaptureFixture[str]) -> None:
    slips = [
        "trainer.max_stps=10",
        "cluster.nodes=5",
        "parallel.tp=2",
        "peft.rank=9000",
        "data.seq_len=99998",
    ]
    assert main(["+experiment=lora_llama", "cluster=slurm_docker", *slips]) == 2
    said = capsys.readouterr().err
    assert "has 5 faults" in said
    for key in ("trainer.max_stps", "cluster.nodes", "parallel.tp", "peft.rank", "data.seq_len"):
        assert key in said
