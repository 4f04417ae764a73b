"""How a run goes on when its job must end: the successor's script, the choice of the way, and kill -9 at any line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpcdl.errors import SchedulerError
from hpcdl.launch import closing, control, requeue, successor, torchrun
from hpcdl.launch.place import Place, find
from hpcdl.launch.slurm import BACKEND
from hpcdl.runs import chain, query, reconcile
from hpcdl.runs.scheduler import Slurm
from hpcdl.runs.store import SUBMISSIONS, RunDir, read_submission
from hpcdl.spec import ClusterSpec
from tests.fake_slurm import FakeSlurm as ShellSlurm
from tests.killing import killed_at
from tests.launch.making import TOKEN, Agents, make_runs, request
from tests.launch.test_slurm import options
from tests.runs.making import FakeJob, FakeSlurm, make_submission

HERE = Path(__file__).resolve().parents[2] / "hpcdl"
JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_ARRAY_JOB_ID": "12",
    "SLURM_ARRAY_TASK_ID": "0",
    "SLURMD_NODENAME": "n1",
    "HPCDL_NODES": "n1",
}
NEXT = chain.token_after(TOKEN, 0)


class World:
    """One run in job 12_0, and a Slurm whose jobs are in a file, so that a forked agent's stay when it is killed."""

    def __init__(self, folder: Path, **fields: Any) -> None:
        cluster = ClusterSpec(**{"kind": "slurm", **fields})
        count = fields.get("array_parallelism", 1) + 1 if "array_parallelism" in fields else 1
        self.runs = make_runs(folder, cluster, count, state="RUNNING", job_id="12_0", host="n1", agent_pid=1)
        self.run = self.runs[0]
        make_submission(folder, TOKEN, job_id="12")
        made = request(count, runs_dir=folder, token=TOKEN, **fields)
        script = BACKEND.render(made)
        (folder / SUBMISSIONS / TOKEN / "job.sh").write_text(script)
        self.run.logs.mkdir(exist_ok=True)
        self.run.errors.mkdir(exist_ok=True)
        self.submitted = folder / "sbatch.jsonl"
        self.dependents = ""
        self.refuse = ""
        self.silent = False
        """Whether sbatch makes the job and its answer is lost."""
        self.over = False
        """Whether job 12_0 has ended."""
        self.requeued: list[str] = []

    @property
    def place(self) -> Place:
        return find(self.run.runs_dir / SUBMISSIONS / TOKEN / "runs.txt", None, JOB)

    def jobs(self) -> list[str]:
        """Scripts that sbatch has taken, in order; the first became job 13."""
        lines = self.submitted.read_text().splitlines() if self.submitted.exists() else []
        return [json.loads(line) for line in lines]

    def slurm(self) -> Slurm:
        return Slurm(runner=lambda *call: FakeSlurm(jobs=self.table()).run(*call))

    def table(self) -> dict[str, list[FakeJob]]:
        """What Slurm knows now."""
        jobs = {
            "12": [FakeJob("FAILED" if self.over else "RUNNING", "0", comment=f"hpcdl:{TOKEN}", code="1:0")]
        }
        for number, script in enumerate(self.jobs(), start=13):
            comment = options(script)["comment"]
            jobs[str(number)] = [FakeJob("PENDING", "0", "Dependency", comment=comment)]
        return jobs

    def command(self, command: list[str], *_: Any) -> subprocess.CompletedProcess[str]:
        """Stands in for control.run: what an agent asks of Slurm."""
        code, out, words = 0, "", ""
        if command[0] == "sbatch":
            code, words = (1, f"sbatch: error: {self.refuse}") if self.refuse else (0, "")
            if not self.refuse:
                with self.submitted.open("a") as file:
                    file.write(json.dumps(Path(command[-1]).read_text()) + "\n")
                code, out = (124, "") if self.silent else (0, f"{12 + len(self.jobs())}\n")
        elif command[0] == "squeue":
            out = self.dependents
        elif command[1] == "requeue":
            self.requeued.append(command[2])
        elif command[1:3] == ["show", "job"]:
            out = "JobId=12 JobState=RUNNING Reason=None Restarts=0\n"
        return subprocess.CompletedProcess(command, code, out, words)

    def again(self, how: requeue.How = "auto") -> requeue.Again:
        return requeue.again(self.run, self.place, how, lambda _: None)

    def end(self) -> int:
        """What the first node's agent does at the end of a try that a signal has stopped."""
        place = self.place
        attempt = f"0.{place.requeue}"
        record = {"try": attempt, "status": "stopped", "reason": "signal USR2", "step": 7, "time": ""}
        self.run.outcome_file.write_text(json.dumps(record))
        end = closing.Closing(self.run, place, attempt, torchrun.resources(self.run), lambda _: None)
        return end.first(closing.Left(code=0, signals=(signal.SIGUSR2,)))


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., World]:
    def make(folder: str = "runs", **fields: Any) -> World:
        world = World(tmp_path / folder, **fields)
        monkeypatch.setattr(control, "run", world.command)
        monkeypatch.setattr(successor, "Slurm", world.slurm)
        monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr("hpcdl.launch.lost.SETTLE_S", 0.0)
        return world

    return make


def test_a_successor_is_the_same_job_for_this_run_alone(make_world: Callable[..., World]) -> None:
    world = make_world(
        nodes=2, exclude="c[1-2]", extra=("--mail-type=END", "--hold", "-H", "--begin=now+1hour"),
        setup=("module load cuda",), signal="USR2@60",
    )  # fmt: skip
    before = (world.run.runs_dir / SUBMISSIONS / TOKEN / "job.sh").read_text()
    assert world.end() == requeue.HANDED_OVER
    (script,) = world.jobs()
    folder = world.run.runs_dir / SUBMISSIONS / NEXT
    own = {
        "comment": f"hpcdl:{NEXT}",
        "array": "0-0",
        "output": f"{folder}/slurm-%A_%a.out",
        "dependency": "afterany:12_0",
    }
    expected = {name: value for name, value in options(before).items() if name not in ("begin", "hold", "-H")}
    assert options(script) == {**expected, **own}
    body = before[before.index("\n\n") :]
    assert script.endswith(body.replace(f"/{TOKEN}/runs.txt", f"/{NEXT}/runs.txt"))
    assert (folder / "runs.txt").read_text() == f"{world.run.path}\n"
    state = world.run.read_state()
    assert (state.state, state.job_id, state.submission, state.array_index) == ("PENDING", "13_0", NEXT, 0)
    assert (state.requeues, state.exit_code) == (1, None)
    event = world.run.events()[-1]
    assert (event["event"], event["way"], event["job_id"], event["continues"]) == (
        "requeued", "successor", "13_0", "12_0",
    )  # fmt: skip


def test_tries_are_counted_over_successors(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.end()
    runs_file = world.run.runs_dir / SUBMISSIONS / NEXT / "runs.txt"
    job = {**JOB, "SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "13", "SLURM_RESTART_COUNT": "1"}
    place = find(runs_file, None, job)
    assert (place.job_id, place.restarts, place.requeue) == ("13_0", 1, 2)
    assert list(chain.earlier_jobs(world.run.runs_dir, NEXT)) == ["12_0"]


@pytest.mark.parametrize(
    ("how", "fields", "dependents", "why"),
    [
        ("requeue", {}, "", ""),
        ("auto", {"array_parallelism": 1}, "", "its array runs 1 tasks at a time, which only holds for its own"),
        ("auto", {}, "40|afterok:12_0(unfulfilled)\n", "job 40 waits for this one"),
        ("auto", {}, "39|afterok:112(unfulfilled)\n40_3|afterany:1,afterok:12_*(unfulfilled)\n", "job 40_3 waits"),
        ("auto", {}, "40|afterok:12(unfulfilled)\n", "job 40 waits for this one"),
    ],
)  # fmt: skip
def test_when_the_job_itself_goes_back(
    make_world: Callable[..., World], how: requeue.How, fields: dict[str, Any], dependents: str, why: str
) -> None:
    world = make_world(**fields)
    world.dependents = dependents
    again = world.again(how)
    assert (world.requeued, world.jobs(), again.refused, again.exit_code) == (["12_0"], [], "", 0)
    assert again.details["way"] == "requeue"
    assert why in again.details.get("no_successor", "")
    assert world.again("successor").details["way"] == "successor"


@pytest.mark.parametrize("dependents", ["40|afterok:12_1(unfulfilled)\n", "40|afterok:112\n41|(null)\n", ""])
def test_jobs_that_wait_for_others_are_no_obstacle(make_world: Callable[..., World], dependents: str) -> None:
    world = make_world()
    world.dependents = dependents
    assert world.again().details["way"] == "successor"


def test_a_refused_successor_becomes_a_requeue(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.refuse = "Job violates accounting/QOS policy (job submit limit)"
    again = world.again("successor")
    assert (again.details["way"], world.requeued) == ("requeue", ["12_0"])
    assert "job submit limit" in again.details["no_successor"]


def test_an_answer_that_was_lost_makes_no_second_job(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.silent = True
    assert world.again().job_id == "13_0"
    assert len(world.jobs()) == 1
    assert world.requeued == []


def test_a_wish_to_cancel_goes_before(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.run.stop_file.write_text("cancel student\n")
    assert world.end() == 130
    state = world.run.read_state()
    assert (state.state, state.exit_code) == ("CANCELLED", 130)
    assert world.jobs() == world.requeued == []


def test_a_script_that_hpcdl_did_not_write_is_left_alone(make_world: Callable[..., World]) -> None:
    world = make_world()
    file = world.run.runs_dir / SUBMISSIONS / TOKEN / "job.sh"
    file.write_text(file.read_text().replace("HPCDL_RUNS_FILE=", "RUNS="))
    with pytest.raises(SchedulerError, match="is not as hpcdl wrote it"):
        successor.submit(world.run, world.place, lambda _: None)
    assert world.again().details["way"] == "requeue"


def test_a_run_that_was_launched_again_is_not_taken_over(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.again()
    state = world.run.read_state()
    assert chain.owns(world.run, state, NEXT, 0)
    assert not chain.owns(world.run, state, NEXT, 1)
    assert not chain.owns(world.run, world.run.update(state="FAILED"), NEXT, 0)
    assert not chain.owns(world.run, world.run.update(state="PENDING", submission="another"), NEXT, 0)


LINES = (
    "requeue.py",
    "successor.py",
    "chain.py",
    "closing.py",
    "lost.py",
    "submissions.py",
    "files.py",
    "store.py",
)


def is_watched(file: str) -> bool:
    return file.startswith(str(HERE)) and file.endswith(LINES)


def poll(world: World) -> Any:
    return reconcile.reconcile(reconcile.read([world.run]).views, world.slurm())[0].state


@pytest.mark.parametrize("then", ["job over", "job started again"])
def test_killed_at_any_line_the_run_goes_on_in_one_job_or_ends(
    make_world: Callable[..., World], then: str
) -> None:
    """Every seventeenth line, in the order of time."""
    number, killed, handed = (0 if then == "job over" else 5), True, 0
    while killed:
        world = make_world(f"{then}-{number}")
        killed = killed_at(number, world.end, is_watched)
        number += 17
        state: Any = world.run.read_state()
        if then == "job over":
            world.over = True
            state = poll(world)
        elif chain.owns(world.run, state, TOKEN, 0):
            assert world.end() == requeue.HANDED_OVER
            state = world.run.read_state()
        assert len(world.jobs()) <= 1, f"doubled, killed at line {number}"
        if world.jobs():
            handed += 1
            assert (state.state, state.job_id, state.submission) == ("PENDING", "13_0", NEXT), number
            assert chain.owns(world.run, state, NEXT, 0)
            assert read_submission(world.run.runs_dir, NEXT)["job_id"] == "13"
            # None where it was killed between the state and its event.
            assert sum(e["event"] == "requeued" for e in world.run.events()) <= 1
        else:
            assert state.state == "FAILED", f"not over, killed at line {number}: {state}"
    assert handed > 1
    assert number > 200, "it was killed at many lines"


def test_the_successor_of_a_killed_agent_takes_over_before_any_poll(make_world: Callable[..., World]) -> None:
    world = make_world()
    successor.submit(world.run, world.place, lambda _: None)  # and killed
    state = world.run.read_state()
    assert (state.submission, state.job_id) == (TOKEN, "12_0")
    assert chain.owns(world.run, state, NEXT, 0)
    assert chain.owns(world.run, state, TOKEN, 0)


def test_a_successor_waits_for_the_end_of_its_job(make_world: Callable[..., World]) -> None:
    world = make_world()
    world.end()
    assert poll(world).reason == "Dependency: waits for the end of job 12_0, which it goes on with"
    assert world.run.read_state().state == "PENDING"


@pytest.mark.parametrize("name", ["12_0", "12", "13_0", "13"])
def test_a_run_is_found_by_each_of_its_jobs(make_world: Callable[..., World], name: str) -> None:
    world = make_world()
    world.end()
    assert query.find(name, world.run.runs_dir) == [world.run]


def test_a_run_directory_without_a_chain() -> None:
    run = RunDir(Path("/nowhere/runs/name/id"))
    assert chain.link(run.runs_dir, None) is None
    assert chain.tries_before(run.runs_dir, TOKEN) == 0


def test_the_successors_own_agent_ends_the_run(agents: Agents, slurm: ShellSlurm) -> None:
    agents.cluster = {"kind": "slurm"}
    run = agents.make("wait")
    folder = run.runs_dir / SUBMISSIONS / TOKEN
    (folder / "job.sh").write_text(BACKEND.render(request(runs_dir=run.runs_dir)))
    slurm.set(job_show="JobId=12 JobState=RUNNING Reason=None Restarts=0")
    process = agents.node(0, 1)
    for pid in (*agents.pids(), process.pid):
        os.kill(pid, signal.SIGUSR2)
    assert agents.end(process)[0] == requeue.HANDED_OVER
    (call,) = slurm.calls("sbatch")
    assert options(call["script"])["dependency"] == "afterany:12_0"
    assert not {name for name in call["environment"] if name.startswith("SLURM")}
    assert (run.read_state().state, run.read_state().job_id) == ("PENDING", "1_0")

    run.spec_file.write_text(run.spec_file.read_text().replace("wait", "finish"))
    agents.token = NEXT
    again = agents.node(0, 1, SLURM_JOB_ID="1", SLURM_ARRAY_JOB_ID="1")
    assert agents.end(again) == (0, "")
    state = run.read_state()
    assert (state.state, state.job_id, state.requeues, state.submission) == ("COMPLETED", "1_0", 1, NEXT)
    assert [e["try"] for e in run.events() if e["event"] == "started"] == ["0.0", "0.1"]
    agents.token = TOKEN
    assert "has been launched again since" in agents.end(agents.node(0, 1, SLURM_RESTART_COUNT="1"))[1]
