"""The API server, through the official client: plain dicts in and out, its refusals in words of ours.

The client is imported here only, and only where it is needed: a dry run, and whoever has no run on Kubernetes, never
needs it. Nothing is tried again in here: whether an answer was lost is for the caller to find out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpcdl.errors import SchedulerError
from hpcdl.runs.kube import names

Plain = dict[str, Any]
LIMIT_S = (5.0, 20.0)
"""To connect, and to answer."""
PAGE = 500
"""Objects of one answer."""
RBAC = "docs/kubernetes.md has the Role that hpcdl needs"
_CANNOT = re.compile(
    r'cannot (\w+) resource "([^"]+)" in API group "([^"]*)"(?:[^"]*in the namespace "([^"]*)")?'
)
_CORE = {"ConfigMap": "config_map", "Service": "service", "Pod": "pod"}
_NAMED = {kind: (group, version, plural) for group, version, plural, kind in names.KINDS.values()}


class Away(Exception):
    """The API server did not answer, or not with an answer: whether it has done it is not known."""


class Missing(SchedulerError):
    """There is no such object."""


class Taken(SchedulerError):
    """There is an object of that name already."""


@dataclass(slots=True)
class Api:
    """One cluster's API server, and a namespace.

    Args:
        context: the kubeconfig's; null: its current one, or that of the pod that this runs in.
        namespace: null: the context's.

    Raises:
        SchedulerError: no client, no kubeconfig, no such context.
    """

    context: str | None = None
    namespace: str | None = None
    _client: Any = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._client, found = _connect(self.context)
        self.namespace = self.namespace or found

    def create(self, made: Plain) -> Plain:
        """Makes an object; what the server made of it.

        Raises:
            Away: it is not known whether it was made.
            Taken: there is one of that name.
            SchedulerError: refused.
        """
        return self._ask("create", made["kind"], body=made)

    def get(self, kind: str, name: str) -> Plain:
        """One object.

        Raises:
            Away: no answer.
            Missing: there is none.
            SchedulerError: refused.
        """
        return self._ask("read" if kind not in _NAMED or kind == "Job" else "get", kind, name)

    def patch(self, kind: str, name: str, change: Plain) -> Plain:
        """Changes an object by a merge patch; raises as `get`."""
        return self._ask("patch", kind, name, body=change)

    def delete(self, kind: str, name: str, *, propagation: str = "Background") -> None:
        """Deletes an object and what belongs to it; one that is gone is deleted. Raises as `get`."""
        try:
            self._ask("delete", kind, name, propagation_policy=propagation)
        except Missing:
            return

    def list(self, kind: str, selector: str) -> Iterator[Plain]:
        """The objects with these labels, page by page; raises as `get`."""
        more: str | None = None
        while True:
            paging: Plain = {"limit": PAGE, **({"_continue": more} if more else {})}
            answer = self._ask("list", kind, label_selector=selector, **paging)
            yield from answer.get("items") or ()
            more = (answer.get("metadata") or {}).get("continue")
            if not more:
                return

    def kill_pods(self, selector: str) -> None:
        """Ends pods at once, without the time to save; raises as `get`."""
        self._call(
            "core", "delete_collection_namespaced_pod", "delete pods",
            namespace=self.namespace, label_selector=selector, grace_period_seconds=0,
        )  # fmt: skip

    def log(self, pod: str, *, tail: int | None = None) -> str:
        """What a pod's container has printed, as far as its node has kept it; raises as `get`."""
        more = {"tail_lines": tail} if tail is not None else {}
        data: bytes = self._call(
            "core", "read_namespaced_pod_log", f"read the log of pod {pod}",
            name=pod, namespace=self.namespace, container=names.CONTAINER, **more,
        )  # fmt: skip
        return data.decode("utf-8", errors="replace")

    def _ask(self, verb: str, kind: str, name: str | None = None, **arguments: Any) -> Plain:
        """One of the client's methods for one kind of object; all of them are namespaced."""
        given = {"namespace": self.namespace, **({"name": name} if name else {}), **arguments}
        what = f"{verb} {kind}{f' {name}' if name else ''}"
        if kind in _CORE:
            method = ("core", f"{verb}_namespaced_{_CORE[kind]}")
        elif kind == "Job":
            method = ("batch", f"{verb}_namespaced_job")
        else:
            group, version, plural = _NAMED[kind]
            given |= {"group": group, "version": version, "plural": plural}
            method = ("custom", f"{verb}_namespaced_custom_object")
        data = self._call(*method, what, **given)
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise Away(f"{what}: the answer is no JSON ({error})") from error
        if not isinstance(answer, dict):
            raise Away(f"{what}: the answer is no object")
        return answer

    def _call(self, group: str, method: str, what: str, **given: Any) -> bytes:
        from kubernetes import client
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        apis = {"core": client.CoreV1Api, "batch": client.BatchV1Api, "custom": client.CustomObjectsApi}
        call = getattr(apis[group](self._client), method)
        try:
            answer = call(**given, _preload_content=False, _request_timeout=LIMIT_S)
            return bytes(answer.data)
        except ApiException as error:
            raise self._refusal(what, error.status or 0, str(error.body or error.reason or "")) from error
        except (HTTPError, OSError) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error) or "certificate" in str(error):
                raise SchedulerError(
                    f"the API server's certificate isn't trusted: {_short(error)}\n"
                    "fix: the kubeconfig's certificate-authority; is a proxy in between?"
                ) from error
            raise Away(_short(error)) from error

    def _refusal(self, what: str, status: int, body: str) -> Exception:
        message = said(body)
        if status in (408, 425, 429) or status >= 500 or status == 0:
            return Away(f"{status} {message}".strip())
        if status == 409:
            return Taken(f"Kubernetes refused to {what}: {message}")
        if status == 404:
            return Missing(f"Kubernetes refused to {what}: {message}{self._advice(what, message)}")
        return SchedulerError(f"Kubernetes refused to {what}: {message}{self._fix(status, message)}")

    def _advice(self, what: str, message: str) -> str:
        if "could not find the requested resource" in message or "page not found" in message:
            return (
                "\nfix: the cluster doesn't know this kind: its controller isn't installed; "
                "cluster.kubernetes.resource=job needs none"
            )
        if "namespaces" in message:
            return (
                f"\nfix: cluster.kubernetes.namespace=… (now {self.namespace}); "
                "kubectl get namespaces lists them, if you may"
            )
        return ""

    def _fix(self, status: int, message: str) -> str:
        if status == 401:
            return "\nfix: log in to the cluster again: kubectl auth whoami says whether it knows you"
        if status == 403 and (found := _CANNOT.search(message)):
            verb, resource, group, _ = found.groups()
            full = f"{resource}.{group}" if group else resource
            return (
                f"\nfix: a Role in namespace {self.namespace} with verbs: [{verb}], resources: [{resource}], "
                f'apiGroups: ["{group}"], bound to you; kubectl auth can-i {verb} {full} -n {self.namespace} '
                f"tells whether it is. {RBAC}"
            )
        if status == 403 and "quota" in message:
            return "\nfix: ask for less, or wait until something of yours in the namespace has ended"
        if status == 403 and "PodSecurity" in message:
            return "\nfix: what the namespace's policy asks for: cluster.kubernetes.run_as_user=1000, say"
        return ""


def said(body: str) -> str:
    """The message of an answer that refuses, on one line."""
    try:
        plain: Mapping[str, Any] = json.loads(body)
        message = str(plain["message"])
    except (ValueError, KeyError, TypeError):
        message = body
    return " ".join(message.split())[:1000]


def _connect(context: str | None) -> tuple[Any, str]:
    """A client, and the namespace of its context."""
    try:
        from kubernetes import client
        from kubernetes import config as untyped
        from kubernetes.config.config_exception import ConfigException
    except ImportError as error:
        raise SchedulerError(
            "Kubernetes' client is not installed here, so nothing was asked\nfix: pip install 'hpcdl[kubernetes]'"
        ) from error
    config: Any = untyped
    settings: Any = client.Configuration()
    namespace = ""
    file = os.environ.get("KUBECONFIG")  # else the client goes by what it was when it was imported
    try:
        try:
            config.load_kube_config(
                config_file=file, context=context, client_configuration=settings, persist_config=False
            )
            contexts, active = config.list_kube_config_contexts(config_file=file)
            chosen = next((one for one in contexts if one["name"] == context), active)
            namespace = chosen["context"].get("namespace") or ""
        except ConfigException:
            if context is not None:
                raise
            config.load_incluster_config(client_configuration=settings)
            namespace = _own_namespace()
    except (ConfigException, OSError, KeyError, TypeError) as error:
        raise SchedulerError(
            f"no cluster to ask: {_short(error)}\n"
            "fix: kubectl config get-contexts lists the kubeconfig's; KUBECONFIG=FILE names another one, "
            "cluster.kubernetes.context=NAME one of its contexts"
        ) from error
    settings.retries = False
    return client.ApiClient(settings), namespace or "default"


def _own_namespace() -> str:
    """Of the pod that this runs in."""
    with open("/var/run/secrets/kubernetes.io/serviceaccount/namespace", encoding="utf-8") as file:  # noqa: PTH123
        return file.read().strip()


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    found = re.search(r"(?:Caused by )?\w*(?:Error|Exception)\([^)]*?[:,] '?([^')]+)", text)
    return (found.group(1) if found else text or type(error).__name__)[:300]
