"""Creates the objects of a submission, each once, whatever answers are lost.

Names follow from the submission's token, so asking twice makes nothing twice: the API server refuses the second with
«already exists», and what is there is looked at. If it is this submission's own, the first answer was lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from hpcdl.errors import SchedulerError
from hpcdl.launch import lost
from hpcdl.launch.base import JobRequest
from hpcdl.launch.kube import manifest
from hpcdl.runs import patience, submissions
from hpcdl.runs.kube import names
from hpcdl.runs.kube.client import Api, Away, Missing, Taken
from hpcdl.runs.store import note, read_submission

Plain = dict[str, Any]
OLDER = timedelta(minutes=10)
"""An object that was made so long before the launch is another launch's; clocks may differ by less."""


def send(
    request: JobRequest,
    text: str,
    *,
    connect: Callable[[str | None, str | None], Api] = Api,
    waits: patience.Patience | None = None,
) -> str:
    """Creates what the text says; returns what the names of the Jobs begin with.

    Args:
        request: the submission.
        text: the YAML.
        connect: makes the connection to a cluster, from a context and a namespace.
        waits: how long to go on while the API server doesn't answer.

    Raises:
        Unanswered: it has not answered in time; what it has made is found later.
        SchedulerError: it refused; what had been made before is taken away again.
    """
    kube_spec = request.cluster.kubernetes
    assert kube_spec is not None
    api = connect(kube_spec.context, kube_spec.namespace)
    waits = waits or patience.Patience(patience.of_environment(), who="Kubernetes")
    base = names.base(request.name, request.token)
    kind = names.KINDS[kube_spec.resource][3]
    # Before anything is made: whoever looks finds it from here.
    where = {"context": kube_spec.context, "namespace": api.namespace, "kind": kind, "base": base}
    note(request.runs_dir, request.token, kubernetes={**where, "ttl_s": kube_spec.ttl_s})
    sender = _Sender(request, api, waits)
    made: list[Plain] = []
    try:
        for one in manifest.read(text):
            answer = sender.create(one)
            made.append(answer)
            if one["kind"] == kind:
                sender.own(answer, made)
    except lost.Unanswered:
        raise
    except SchedulerError:
        sender.take_back(made)
        raise
    note(request.runs_dir, request.token, sent=True)
    return base


class _Sender:
    def __init__(self, request: JobRequest, api: Api, waits: patience.Patience) -> None:
        self._request, self._api, self._waits = request, api, waits

    def create(self, one: Plain) -> Plain:
        """Makes an object, or finds it made."""
        while True:
            (self._request.folder / submissions.ASKED).touch()
            try:
                return self._api.create(one)
            except Taken:
                if (found := self._there(one)) is not None:
                    return found
            except Away as away:
                self._wait(str(away))

    def _there(self, one: Plain) -> Plain | None:
        """The object of that name, if it is this submission's; None where it has gone meanwhile."""
        kind, name = one["kind"], one["metadata"]["name"]
        while True:
            try:
                found = self._api.get(kind, name)
                break
            except Missing:
                return None
            except Away as away:
                self._wait(str(away))
        if not self._is_ours(one, found):
            since = found["metadata"].get("creationTimestamp", "some time")
            where = self._api.namespace
            raise SchedulerError(
                f"{kind} {name} is in namespace {where} already, since {since}, and is not of this launch: of an "
                "earlier one, say, whose run directory is gone, or of somebody with a folder of the same name\n"
                f"fix: kubectl delete {kind.lower()} {name} -n {where}, if nobody needs it; or another name=…"
            )
        self._waits.say(f"{kind} {name} is there: the answer to an earlier try was lost")
        return found

    def _is_ours(self, one: Plain, found: Plain) -> bool:
        mine, theirs = one["metadata"], found.get("metadata") or {}
        token = (theirs.get("labels") or {}).get(names.SUBMISSION)
        digest = (theirs.get("annotations") or {}).get(names.SPEC)
        if token != self._request.token or digest != (mine.get("annotations") or {}).get(names.SPEC):
            return False
        record = read_submission(self._request.runs_dir, self._request.token)
        try:
            launched = datetime.fromisoformat(str(record["created"]))
            made = datetime.fromisoformat(str(theirs["creationTimestamp"]).replace("Z", "+00:00"))
        except (KeyError, ValueError):
            return True
        return made > launched.astimezone(UTC) - OLDER

    def own(self, job: Plain, made: list[Plain]) -> None:
        """The Job's Service and ConfigMap go when it goes. Not done, they stay, and do no harm."""
        meta = job["metadata"]
        if "uid" not in meta:
            return
        owner = {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "name": meta["name"],
            "uid": meta["uid"],
        }
        for one in made:
            if one["kind"] != job["kind"] and one["metadata"]["name"] == meta["name"]:
                with contextlib.suppress(Away, SchedulerError):
                    change = {"metadata": {"ownerReferences": [owner]}}
                    self._api.patch(one["kind"], one["metadata"]["name"], change)

    def take_back(self, made: list[Plain]) -> None:
        """A submission that was refused has left nothing; of a sweep neither the Jobs that had been made."""
        for one in reversed(made):
            with contextlib.suppress(Away, SchedulerError):
                self._api.delete(one["kind"], one["metadata"]["name"])

    def _wait(self, why: str) -> None:
        if not self._waits.wait(why):
            raise lost.Unanswered(
                f"Kubernetes does not answer: {why}\n"
                "What it has made is not known yet. Nothing is lost or submitted twice: once it answers,\n"
                "hpcdl status finds the Job, and where there is none, the same launch submits it.\n"
                f"${patience.VARIABLE} says how long a launch waits (now {patience.of_environment():g} s)."
            )
