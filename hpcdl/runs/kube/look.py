"""Makes the states of runs on Kubernetes true, and ends runs there (hpcdl.runs.reconcile, hpcdl.runs.cancel)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache

from hpcdl.errors import SchedulerError
from hpcdl.runs import contact, private, submissions, wish
from hpcdl.runs import judge as judging
from hpcdl.runs.kube import asking, judge, names
from hpcdl.runs.kube.asking import Seen, Where
from hpcdl.runs.kube.client import Api, Away, Missing
from hpcdl.runs.patience import Patience
from hpcdl.runs.reconcile import View, apply, unknown
from hpcdl.runs.state import ACTIVE, RunState
from hpcdl.runs.store import RunDir, decide_job

KIND = "kubernetes"


@cache
def connect(context: str | None, namespace: str | None) -> Api:
    """One connection for all looks of a process."""
    return Api(context, namespace)


def check(views: Sequence[View], patience: Patience | None = None) -> dict[RunDir, View]:
    """The same runs as they stand now, each asked for once.

    Args:
        views: active runs of Kubernetes'.
        patience: how long to go on asking an API server that doesn't answer; by default it is asked once.
    """
    groups: dict[tuple[str | None, str, str], list[tuple[View, Where]]] = {}
    checked = {}
    for view in views:
        where = asking.where(view.run.runs_dir, view.state.submission)
        if where is None:
            checked[view.run] = _unsent(view)
        else:
            groups.setdefault((where.context, where.namespace, where.kind), []).append((view, where))
    if patience is not None:
        patience.who = "Kubernetes"
    for (context, namespace, kind), members in groups.items():
        wanted = {view.run: _job(view.state, where) for view, where in members}
        try:
            api = connect(context, namespace)
            seen = _ask(api, kind, wanted.values(), patience)
        except (Away, SchedulerError) as error:
            away = " ".join(str(error).split("\nfix:")[0].split())
            checked.update({view.run: unknown(view, away, "Kubernetes", KIND) for view, _ in members})
            continue
        last = {
            runs_dir: contact.last_answer(runs_dir, KIND) for runs_dir in {v.run.runs_dir for v, _ in members}
        }
        for runs_dir in last:
            contact.answered(runs_dir, KIND)
        for view, where in members:
            checked[view.run] = _one(view, where, seen[wanted[view.run]], api, last[view.run.runs_dir])
    return checked


def _ask(api: Api, kind: str, wanted: Iterable[str], patience: Patience | None) -> dict[str, Seen]:
    wanted = list(wanted)
    while True:
        try:
            return asking.ask(api, kind, wanted)
        except Away as away:
            if patience is None or not patience.wait(str(away)):
                raise


def _job(state: RunState, where: Where) -> str:
    return f"{where.base}-{state.array_index or 0}"


def _one(view: View, where: Where, seen: Seen, api: Api, last: str | None) -> View:
    run = view.run
    if seen.top is None:
        return _gone(view, where, last)
    if view.state.job_id is None and view.state.submission is not None:
        decide_job(run.runs_dir, view.state.submission, where.base)
        view = dataclasses.replace(view, state=run.read_state())
        if view.state.state not in ACTIVE:
            return view
    ending = seen.top["metadata"].get("deletionTimestamp")
    if not ending and wish.of(run) and private.is_mine(run.path):
        # Made while the cluster could not be told.
        with contextlib.suppress(Away, SchedulerError):
            api.delete(where.kind, _job(view.state, where), propagation="Foreground")
    queue = (seen.top["metadata"].get("labels") or {}).get(names.QUEUE)
    found = judge.verdict(run, view.state, seen, queue)
    # The agent may have spoken between our reading and the cluster's answer.
    fresh = run.read_state()
    return apply(view, found) if fresh == view.state else dataclasses.replace(view, state=fresh)


def _gone(view: View, where: Where, last: str | None) -> View:
    run, state = view.run, view.state
    fresh = run.read_state()
    if fresh != state:
        return dataclasses.replace(view, state=fresh)
    if not where.sent:
        return _unsent(view)
    wished = bool(wish.of(run))
    if not wished and not judge.sees_the_volume(run) and _may_be_cleaned_up(where, last):
        reason = (
            f"unknown: Kubernetes has no {where.kind} {_job(state, where)} any more, and nobody looked for longer than "
            "cluster.kubernetes.ttl_s; the run's directory on the volume tells"
        )
        return dataclasses.replace(
            view, state=dataclasses.replace(state, state="UNKNOWN", reason=reason), since=last
        )
    return apply(view, judge.gone(run, state, wished=wished, job=f"{where.kind} {_job(state, where)}"))


def _may_be_cleaned_up(where: Where, last: str | None) -> bool:
    """Whether the object may have ended and gone by itself since somebody last looked."""
    if where.ttl_s is None:
        return False
    if last is None:
        return True
    return (datetime.now(UTC) - datetime.fromisoformat(last)).total_seconds() >= where.ttl_s


def _unsent(view: View) -> View:
    """A run of which the cluster has nothing: it is being submitted, or was not."""
    state = view.state
    if submissions.may_still_come(view.run.runs_dir, state.submission, state.created):
        return dataclasses.replace(view, state=dataclasses.replace(state, reason="is being submitted"))
    return apply(view, judging.never_started("its launcher ended before Kubernetes had answered"))


def end(views: Sequence[View], *, now: bool) -> None:
    """Deletes the objects of runs: their pods are told to end, and have the time to save.

    Args:
        views: the runs.
        now: whether they get no time.

    Raises:
        SchedulerError: the API server refuses, or does not answer.
    """
    for view in views:
        where = asking.where(view.run.runs_dir, view.state.submission)
        if where is None:
            continue
        job = _job(view.state, where)
        try:
            api = connect(where.context, where.namespace)
            api.delete(where.kind, job, propagation="Foreground")
            if now:
                api.kill_pods(f"{names.JOB}={job}")
        except Away as away:
            raise SchedulerError(f"Kubernetes does not answer: {away}") from away


def pod_logs(run: RunDir, state: RunState) -> dict[str, str]:
    """What the newest pod of each index has printed, by its host name; as far as the nodes have kept it.

    Raises:
        SchedulerError: the API server refuses, or does not answer.
    """
    where = asking.where(run.runs_dir, state.submission)
    if where is None:
        return {}
    api, job = connect(where.context, where.namespace), _job(state, where)
    found = {}
    try:
        for pod in asking.ask(api, where.kind, [job])[job].pods:
            with contextlib.suppress(Missing):
                found[pod.name] = api.log(pod.name)
    except Away as away:
        raise SchedulerError(f"Kubernetes does not answer: {away}") from away
    return found
