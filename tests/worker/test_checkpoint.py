"""Checkpoints: what one strategy has saved, another goes on from; saving while training goes on."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcdl.errors import UnsavedError
from hpcdl.runs.store import RunDir
from hpcdl.spec.checkpoint import Totals, newest, read
from tests import disks
from tests.checkpoints import flip
from tests.factory import tiny_spec
from tests.worker.conftest import Finished, Workers, until

pytestmark = pytest.mark.torch

STEPS = 10
COMMON: dict[str, Any] = {
    "trainer__max_steps": STEPS,
    "trainer__global_batch_size": 12,  # for 4, 3, 2 and 1 ranks
    "trainer__micro_batch_size": 1,
    "trainer__checkpoint_every": 2,
    "trainer__keep_last": 9,
    "trainer__eval_samples": 8,
    "data__seq_len": 64,
    "optim__lr": 0.003,
    "optim__eps": 1e-6,
    "optim__weight_decay": 0.1,
    "model__shape__num_hidden_layers": 4,
}
LORA = {"peft__name": "lora", "peft__rank": 4, "optim__lr": 0.002}
UNEVEN = {"task__name": "sft", "data__packing": False}
UNTIED = {"model__shape__tie_word_embeddings": False, "model__shape__vocab_size": 261}

ONE = (1, {"name": "ddp"})
DDP3 = (3, {"name": "ddp"})
DDP4 = (4, {"name": "ddp"})
FSDP2 = (2, {"name": "fsdp"})
FSDP3 = (3, {"name": "fsdp"})
FSDP4 = (4, {"name": "fsdp"})
HSDP4 = (4, {"name": "hsdp", "dp_shard": 2})
TP2 = (2, {"name": "tp", "tp": 2})
PP2 = (2, {"name": "pp", "pp": 2, "dp_replicate": 1})
CP2 = (2, {"name": "cp", "cp": 2, "dp_replicate": 1})
LOCAL3 = (3, {"name": "local_sgd", "sync_every": 3})
SERVER3 = (3, {"name": "param_server"})
CP_FSDP4 = (4, {"name": "cp", "cp": 2, "dp_replicate": 1, "dp_shard": 2})
Strategy = tuple[int, dict[str, Any]]

CHAINS: dict[str, tuple[dict[str, Any], list[Strategy]]] = {
    "ddp4-fsdp2-ddp3-one": ({}, [DDP4, FSDP2, DDP3, ONE]),
    "fsdp4-hsdp4-fsdp3-ddp2": (UNEVEN, [FSDP4, HSDP4, FSDP3, (2, {"name": "ddp"})]),
    "one-fsdp3-ddp4-fsdp2-lora": (LORA, [ONE, FSDP3, DDP4, FSDP2]),
    "pp2-fsdp3-tp2-ddp1": ({}, [PP2, FSDP3, TP2, ONE]),
    "pp2-fsdp3-tp2-ddp1-untied": (UNTIED, [PP2, FSDP3, TP2, ONE]),
    "tp2-pp2-cp2-fsdp3-lora": (LORA, [TP2, PP2, CP2, FSDP3]),
    "server3-fsdp2-server3-one": ({}, [SERVER3, FSDP2, SERVER3, ONE]),
    "cp_fsdp4-pp2-ddp3-tp2": (UNEVEN, [CP_FSDP4, PP2, DDP3, TP2]),
}


def under(strategy: Strategy) -> dict[str, Any]:
    return {f"parallel__{key}": value for key, value in strategy[1].items()}


QUICK = {"tp2-pp2-cp2-fsdp3-lora"}


@pytest.mark.parametrize(
    "chain", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CHAINS]
)
def test_a_chain_of_strategies_and_world_sizes_is_one_curve(workers: Workers, chain: str) -> None:
    """Each goes on from the checkpoint that the one before it made in the middle of its training."""
    more, strategies = CHAINS[chain]
    settings = {**COMMON, **more}
    undisturbed = workers.train(1, **settings)
    losses, weights = undisturbed.losses(), None
    for number, strategy in enumerate(strategies):
        begin = 2 * number
        resume = {} if weights is None else {"trainer__resume_from": str(weights)}
        run = workers.train(strategy[0], **{**settings, **under(strategy), **resume}).run
        lines = [m for m in run.metrics() if "loss" in m]
        assert [m["step"] for m in lines] == list(range(begin + 1, STEPS + 1))
        assert [m["loss"] for m in lines] == pytest.approx(losses[begin:], rel=1e-5)
        assert lines[-1]["tokens"] == undisturbed.result()["tokens"]
        evaluated = Finished(run, [], "").evaluations()
        assert sorted(evaluated) == [begin, STEPS], "before its first step and after its last"
        assert evaluated[STEPS] == pytest.approx(undisturbed.evaluations()[STEPS], rel=1e-5)
        resumed = [e for e in run.events() if e["event"] == "resumed"]
        assert [(e["step"], e["from"]) for e in resumed] == (
            [] if weights is None else [(begin, str(weights))]
        )
        weights = run.checkpoints / f"step-{begin + 2:08d}"


ASYNCHRONOUS = {
    "hogwild": (2, {"name": "hogwild"}),
    "param_server": (2, {"name": "param_server", "mode": "async"}),
    "diloco": (3, {"name": "diloco", "sync_every": 3}),
}


@pytest.mark.parametrize("strategy", ASYNCHRONOUS)
def test_what_has_no_curve_of_its_own_is_gone_on_from_too(workers: Workers, strategy: str) -> None:
    """Two others that go on from its checkpoint agree; it goes on itself and learns."""
    own = ASYNCHRONOUS[strategy]
    first = workers.train(own[0], **COMMON, **under(own))
    resume = {"trainer__resume_from": str(first.run.checkpoints / "step-00000004")}
    again, one, sharded = (
        workers.train(ranks, **COMMON, **under((ranks, config)), **resume)
        for ranks, config in (own, ONE, FSDP2)
    )
    assert len(one.losses()) == STEPS - 4
    assert one.losses() == pytest.approx(sharded.losses(), rel=1e-5)
    assert one.losses()[0] < first.losses()[1]
    assert again.evaluations()[4] == pytest.approx(one.evaluations()[4], rel=1e-5)
    assert again.losses()[-1] < again.losses()[0]


# --- resume_from


@pytest.fixture(scope="module")
def source(workers: Workers) -> Finished:
    """A run whose checkpoint others go on from."""
    return workers.train(2, **COMMON)


def test_the_same_world_goes_on_to_the_last_bit(workers: Workers, source: Finished) -> None:
    path = source.run.checkpoints / "step-00000004"
    run = workers.make(**COMMON, trainer__resume_from=str(path))
    workers.start(run, 2)
    until(lambda: run.step() >= 6, "the sixth step")
    run.stop_file.write_text("")
    stopped = workers.finish(run).outcome()
    assert stopped["status"] == "stopped"
    run.stop_file.unlink()
    shutil.move(path, path.with_name("hidden"))  # from now on the run's own checkpoints count
    try:
        again = workers.go(run, 2)
    finally:
        shutil.move(path.with_name("hidden"), path)
    assert [e["from"] for e in run.events() if e["event"] == "resumed"] == [
        str(path),
        str(run.checkpoints / f"step-{stopped['step']:08d}"),
    ]
    assert again.losses() == source.losses()[4:]
    result = again.result()
    assert result["eval_loss_before"] == again.evaluations()[4]
    assert result["eval_loss_after"] == source.evaluations()[STEPS]
    own = result["tokens"] - read(path).totals.tokens  # type: ignore[union-attr]
    assert result["tokens_per_s"] == pytest.approx(own / result["train_s"], rel=0.01)


def test_nothing_is_left_to_do(workers: Workers, source: Finished) -> None:
    """max_steps is the checkpoint's own: evaluated and saved as a result, under sharding too."""
    path = source.run.checkpoints / f"step-{STEPS:08d}"
    done = workers.train(2, **COMMON, parallel__name="fsdp", trainer__resume_from=str(path))
    assert done.losses() == []
    assert done.result()["eval_loss_after"] == pytest.approx(source.evaluations()[STEPS], rel=1e-6)
    assert Path(done.result()["model"]).is_dir()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "was trained on other data"),
    ({"data__seq_len": 32}, "was trained on other data"),
    ({"trainer__global_batch_size": 8}, "was saved with trainer.global_batch_size=12, and this run has 8"),
    ({"model__shape__num_hidden_layers": 5}, "lacks 27 of"),
    ({"model__shape__intermediate_size": 48}, "(64, 32) in step-00000004, and (48, 32) here"),
    ({"peft__name": "lora"}, "it is of another model, fine-tuning method or optimizer"),
    ({"optim__name": "sgd"}, "it is of another model, fine-tuning method or optimizer"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=[next(iter(c)) for c, _ in REFUSED])
def test_what_can_not_go_on_says_why(
    workers: Workers, source: Finished, change: dict[str, Any], words: str
) -> None:
    path = source.run.checkpoints / "step-00000004"
    failed = workers.go(workers.make(**{**COMMON, **change, "trainer__resume_from": str(path)}), ok=False)
    assert words in failed.log
    assert "Traceback" not in failed.log


def test_a_checkpoint_that_is_gone(workers: Workers, tmp_path: Path) -> None:
    failed = workers.go(
        workers.make(**COMMON, trainer__resume_from=str(tmp_path / "step-00000004")), ok=False
    )
    assert "is no whole checkpoint any more" in failed.log


# --- in the background


def tensors(path: Path) -> dict[str, Any]:
    """All that a checkpoint holds, whole."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in saved.items()}
    load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return state


@pytest.mark.parametrize("strategy", [DDP3, FSDP3, LOCAL3], ids=["ddp3", "fsdp3", "local3"])
def test_in_the_background_or_not_the_same_is_saved(workers: Workers, strategy: Strategy) -> None:
    one, other = (
        workers.train(strategy[0], **COMMON, **under(strategy), trainer__checkpoint_async=how).run
        for how in (True, False)
    )
    names = sorted(p.name for p in one.checkpoints.iterdir())
    assert names == [f"step-{step:08d}" for step in range(2, STEPS + 1, 2)]
    for name in names:
        ours, theirs = tensors(one.checkpoints / name), tensors(other.checkpoints / name)
        assert ours.keys() == theirs.keys() and len(ours) > 100
        assert all(ours[key].equal(theirs[key]) for key in ours), name
        a, b = (read(run.checkpoints / name) for run in (one, other))
        assert a is not None and b is not None
        assert (a.totals.step, a.totals.tokens) == (b.totals.step, b.totals.tokens)
        assert a.has_checksums and b.has_checksums
        heldout = Finished(one, [], "").evaluations().get(a.step)
        assert (a.heldout_loss, b.heldout_loss) == (heldout, heldout)
    for run in (one, other):
        events = [e for e in run.events() if e["event"] == "checkpoint"]
        assert [e["step"] for e in events] == [2, 4, 6, 8, 10]
        assert all(e["bytes"] > 26912 * 12 and 0 <= e["stalled_s"] <= e["seconds"] for e in events)
        assert events[-1]["stalled_s"] == events[-1]["seconds"], "the last one is waited for"


def limit(pid: int, size: int) -> None:
    """How long a process's files may be; EFBIG stands for ENOSPC."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def steps_of(run: RunDir, kind: str) -> list[int]:
    return [event["step"] for event in run.events() if event["event"] == kind]


def until_saved_after_failures(run: RunDir, give_room: Callable[[], None]) -> int:
    """Waits for two saves that fail, gives room, and waits for two that don't; the step of the last."""
    until(lambda: len(steps_of(run, "checkpoint_failed")) >= 2, "two saves that fail")
    give_room()
    failed = steps_of(run, "checkpoint_failed")[-1]
    until(lambda: sum(s > failed for s in steps_of(run, "checkpoint")) >= 2, "two saves that don't")
    return steps_of(run, "checkpoint")[-1]


def goes_on(workers: Workers, run: RunDir, step: int) -> None:
    """The run goes on from a step, and comes to its end two steps later without a gap."""
    text = run.spec_file.read_text().replace("max_steps: 4000", f"max_steps: {step + 2}")
    run.spec_file.write_text(text)
    assert workers.go(run, 2).outcome()["status"] == "finished"
    assert steps_of(run, "resumed") == [step]
    assert [m["step"] for m in run.metrics() if "loss" in m] == list(range(1, step + 3))
    assert sorted(p.name for p in run.checkpoints.glob("*"))[-1] == f"step-{step + 2:08d}"
    assert not list(run.checkpoints.glob(".tmp-*"))


WAYS: dict[str, dict[str, Any]] = {
    "in_background": {},
    "at_once": {"trainer__checkpoint_async": False},
    # written tensor by tensor, from where they lie; that place is no file here, which would have no room either
    "streamed": {"offload__name": "stream", "offload__device": "host"},
}
LONG = {**COMMON, "trainer__max_steps": 4000, "trainer__keep_last": 2}


@pytest.mark.parametrize("way", WAYS)
def test_a_full_disk_ends_no_training(workers: Workers, way: str) -> None:
    """Rank 1 can't write its part for a while: all ranks drop those checkpoints. Only a last one must be saved.

    Of the two that are kept the newer one is then damaged: the other one is gone on from.
    """
    run = workers.make(**LONG, **WAYS[way])
    pids = workers.start(run, 2)
    until(lambda: run.step() >= 5, "the fifth step")
    limit(pids[1], 100_000)
    until_saved_after_failures(run, lambda: limit(pids[1], resource.RLIM_INFINITY))
    limit(pids[1], 100_000)
    until(lambda: steps_of(run, "checkpoint_failed")[-1] > steps_of(run, "checkpoint")[-1], "one more")
    run.stop_file.write_text("")
    failed = workers.finish(run)
    run.stop_file.unlink()
    assert 0 not in failed.codes
    found, broken = newest(run.checkpoints)
    assert found is not None and not broken
    events = [event for event in run.events() if event["event"] == "checkpoint_failed"]
    assert [event["last"] for event in events] == [False] * (len(events) - 1) + [True]
    assert all("by rank 1: [Errno 27] File too large" in event["message"] for event in events)
    assert events[-1]["kept"] == found.step and f"{found.path.name} is kept" in events[-1]["message"]
    step = events[-1]["step"]
    records = [json.loads(path.read_text()) for path in run.errors.glob("*.json")]
    first = min(records, key=lambda record: record["time"])
    assert first["type"] == "UnsavedError"
    assert f"what was learned up to step {step} is not saved" in first["message"]
    assert f"launched again, the run goes on from step {found.step}" in first["message"]

    kept = sorted(path.name for path in run.checkpoints.iterdir())
    assert len(kept) == 2 and kept[-1] == found.path.name
    flip(found.path / "__1_0.distcp", at=5000)
    goes_on(workers, run, int(kept[0].removeprefix("step-")))
    warned = [e for e in run.events() if e["event"] == "warning" and "checkpoint" in e]
    assert [(e["checkpoint"], e["file"], e["damage"]) for e in warned] == [
        (kept[1], "__1_0.distcp", "corrupt")
    ]


def test_a_disk_that_is_full_takes_nothing_that_was_there(workers: Workers, tmp_path: Path) -> None:
    """ENOSPC itself, for all that a run writes: no line of metrics or events is lost either."""
    run = workers.make(**LONG)
    spec, log = run.spec_file.read_text(), tmp_path / "log.txt"
    with disks.small(run.path, "4m"):
        run.spec_file.write_text(spec)
        (run.path / "log.txt").write_text("")
        workers.start(run, 2, log=str(log))
        until(lambda: len(steps_of(run, "checkpoint")) >= 2, "two checkpoints")
        filler = disks.fill(run.path)
        until(lambda: log.read_text().count("warning: the checkpoint of step") >= 2, "two saves that fail")
        at = run.step()
        filler.unlink()
        step = until_saved_after_failures(run, lambda: None)
        assert [m["step"] for m in run.metrics()][1 : step + 1] == list(range(1, step + 1)) and step > at
        filler = disks.fill(run.path)
        run.stop_file.write_bytes(b"")
        codes = workers.finish(run).codes
        filler.unlink()
        run.stop_file.unlink()
        assert 0 not in codes and "No space left on device" in log.read_text()
        found, broken = newest(run.checkpoints)
        assert found is not None and found.step >= step and not broken
        assert f"{found.path.name} is kept" in log.read_text()
        goes_on(workers, run, found.step)


def test_a_result_that_finds_no_room_leaves_the_old_one(workers: Workers, source: Finished) -> None:
    run = source.run
    before = {path: path.read_bytes() for path in (run.result_file, run.path / "model" / "model.safetensors")}
    names = sorted(path.name for path in run.path.iterdir())
    pids = workers.start(run, 2)
    limit(pids[0], 60_000)
    failed = workers.finish(run)
    assert 0 not in failed.codes
    assert f"the result can't be written to {run.path}" in failed.log
    assert "step-00000010 is kept, so that only the result is left to do" in failed.log
    assert {path: path.read_bytes() for path in before} == before
    assert sorted({*names, "errors"}) == sorted(path.name for path in run.path.iterdir())
    assert workers.go(run, 2).outcome()["status"] == "finished"


def test_the_best_is_kept_beside_the_last(workers: Workers) -> None:
    """Held-out losses are noted in the records, the last evaluation's too, which comes after the last save."""
    keep = {"trainer__keep_last": 1, "trainer__keep_best": 1, "trainer__eval_every": 2}
    done = workers.train(**{**COMMON, **keep, "optim__lr": 2.0, "optim__warmup_steps": 9})
    evaluations = {step: loss for step, loss in done.evaluations().items() if step}
    best = min(evaluations, key=lambda step: (evaluations[step], -step))
    assert best < STEPS, "else this shows little: take another learning rate"
    kept = [read(path) for path in sorted(done.run.checkpoints.iterdir())]
    assert [found and (found.step, found.heldout_loss) for found in kept] == [
        (step, evaluations[step]) for step in (best, STEPS)
    ]


def test_a_rank_that_dies_while_it_saves(workers: Workers) -> None:
    """The others end with it, at once, and what was whole before stays."""
    run = workers.make(**{**COMMON, "trainer__max_steps": 300, "trainer__checkpoint_every": 1})
    pids = workers.start(run, 3)
    until(lambda: (run.checkpoints / "step-00000003").exists(), "three checkpoints")
    until(lambda: any(run.checkpoints.glob(".tmp-step-*")), "a save under way")
    os.kill(pids[2], signal.SIGKILL)
    assert -signal.SIGKILL in workers.finish(run).codes
    found, torn = newest(run.checkpoints)
    assert found is not None and found.step >= 3 and not torn
    run.spec_file.write_text(
        run.spec_file.read_text().replace("max_steps: 300", f"max_steps: {found.step + 2}")
    )
    again = workers.go(run, 2)
    assert [m["step"] for m in run.metrics() if "loss" in m] == list(range(1, found.step + 3))
    assert again.outcome()["status"] == "finished"
    assert not list(run.checkpoints.glob(".tmp-step-*"))


# --- one rank, in this process


@dataclass
class Alone:
    """A Checkpointer over two tensors."""

    saver: Any
    state: dict[str, Any]
    run: RunDir


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Callable[..., Alone]]:
    import torch
    import torch.distributed as dist

    from hpcdl.worker.checkpoint import Checkpointer
    from hpcdl.worker.keeping import Keeper
    from hpcdl.worker.process import from_environment

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made: list[Any] = []

    def make(**dotted: Any) -> Alone:
        run = RunDir(tmp_path / "run")
        run.path.mkdir(exist_ok=True)
        state = {"model.a": torch.zeros(8), "model.b": torch.zeros(3, 4)}
        engine = SimpleNamespace(
            state=lambda: dict(state), device=torch.device("cpu"), staged=True, let_go=lambda tensor: None
        )
        spec = tiny_spec(**{"trainer__checkpoint_every": 1, "trainer__keep_last": 9, **dotted})
        who = from_environment()
        keeper = Keeper(run, who, spec.trainer)
        made.append(Checkpointer(run, who, engine, spec, keeper, data_digest="d"))  # type: ignore[arg-type]
        return Alone(made[-1], state, run)

    yield make
    for saver in made:
        saver.drain()
    dist.destroy_process_group()


def slow(monkeypatch: pytest.MonkeyPatch, method: str) -> threading.Event:
    """Has the background wait in a method of the planner until the event is set."""
    from hpcdl.worker.staging import StagedPlanner

    gate, real = threading.Event(), getattr(StagedPlanner, method)

    def gated(self: Any, argument: Any) -> Any:
        assert gate.wait(60)
        return real(self, argument)

    monkeypatch.setattr(StagedPlanner, method, gated)
    return gate


def test_settle_waits_for_the_copy_only(alone: Callable[..., Alone], monkeypatch: pytest.MonkeyPatch) -> None:
    one = alone()
    copying, writing = slow(monkeypatch, "finish_plan"), slow(monkeypatch, "resolve_data")
    one.state["model.a"].fill_(1.0)
    one.saver.save(Totals(step=1), wait=False)  # returns, though nothing is copied yet
    settled = threading.Event()
    waiting = threading.Thread(target=lambda: (one.saver.settle(), settled.set()))
    waiting.start()
    assert not settled.wait(0.2), "the state was let go before it was copied"
    copying.set()
    assert settled.wait(60), "the state was not let go when it was copied"
    assert not one.run.checkpoints.exists() or read(one.run.checkpoints / "step-00000001") is None
    one.state["model.a"].fill_(2.0)  # the next step
    writing.set()
    one.saver.drain()
    assert tensors(one.run.checkpoints / "step-00000001")["model.a"].tolist() == [1.0] * 8


def test_one_save_at_a_time_and_buffers_are_used_again(
    alone: Callable[..., Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = alone()
    writing = slow(monkeypatch, "resolve_data")
    one.saver.save(Totals(step=1), wait=False)
    one.saver.settle()
    places = sorted(t.data_ptr() for t in one.saver._buffers.values())
    one.state["model.a"].fill_(2.0)
    begun = threading.Thread(target=one.saver.save, args=(Totals(step=2),), kwargs={"wait": False})
    begun.start()
    begun.join(0.2)
    assert begun.is_alive(), "the second save did not wait for the first"
    writing.set()
    begun.join(60)
    one.saver.settle()
    one.saver.drain()
    assert sorted(t.data_ptr() for t in one.saver._buffers.values()) == places and len(places) == 2
    first, second = (tensors(one.run.checkpoints / f"step-0000000{step}") for step in (1, 2))
    assert (first["model.a"].max(), second["model.a"].min()) == (0.0, 2.0)


def test_a_failure_in_the_background_is_told_and_got_over(alone: Callable[..., Alone]) -> None:
    one = alone()
    one.run.checkpoints.write_text("in the way")
    one.saver.save(Totals(step=1), wait=False)
    one.saver.drain()
    (event,) = one.run.events()
    assert re.match(r"the checkpoint of step 1 can't be written to .*: .*Not a directory", event["message"])
    assert event["message"].endswith("there is no other one yet") and event["kept"] is None
    with pytest.raises(
        UnsavedError, match=r"the checkpoint of step 2 .* launched again, the run begins anew"
    ):
        one.saver.save(Totals(step=2))
    one.run.checkpoints.unlink()
    one.saver.save(Totals(step=3))
    assert read(one.run.checkpoints / "step-00000003") is not None


def test_a_bug_in_the_background_keeps_its_traceback(
    alone: Callable[..., Alone], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpcdl.worker.staging import StagedPlanner

    one = alone()
    monkeypatch.setattr(StagedPlanner, "resolve_data", lambda self, item: 1 / 0)
    one.saver.save(Totals(step=1), wait=False)
    one.saver.settle()
    with pytest.raises(RuntimeError, match="by rank 0: ZeroDivisionError"):
        one.saver.drain()
    assert read(one.run.checkpoints / "step-00000001") is None
