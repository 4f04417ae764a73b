"""A mock API server (kmock) in a thread of its own, with a kubeconfig; its objects and faults are set from the test."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import kmock
import yaml

Plain = dict[str, Any]
RESOURCES = {
    "Job": "batch/v1/jobs",
    "Pod": "v1/pods",
    "ConfigMap": "v1/configmaps",
    "Service": "v1/services",
    "JobSet": "jobset.x-k8s.io/v1alpha2/jobsets",
    "TrainJob": "trainer.kubeflow.org/v1alpha1/trainjobs",
}
NAMESPACE = "research"


class Server:
    """Keeps objects as a cluster does: made once, listed, changed, deleted."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self._loop = asyncio.new_event_loop()
        self._ready, self._done = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.kmock: Any = None
        self.url = ""

    def __enter__(self) -> Server:
        self._thread.start()
        assert self._ready.wait(30)
        entry = {"cluster": {"server": self.url}, "name": "mock"}
        context = {"context": {"cluster": "mock", "user": "me", "namespace": NAMESPACE}, "name": "mock"}
        plain = {
            "apiVersion": "v1", "kind": "Config", "clusters": [entry], "contexts": [context],
            "users": [{"name": "me", "user": {}}], "current-context": "mock",
        }  # fmt: skip
        self.kubeconfig.write_text(yaml.safe_dump(plain))
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(30)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())

    async def _run(self) -> None:
        async with kmock.KubernetesEmulator() as handler, kmock.Server(handler) as server:
            for kind, name in RESOURCES.items():
                handler.resources[kmock.resource(name)] = {"kind": kind, "namespaced": True}
            self.kmock, self.url = handler, str(server.url).rstrip("/")
            self._ready.set()
            await self._done.wait()

    def do(self, work: Callable[[Any], Any]) -> Any:
        """Something with the mock, in its own thread."""

        async def call() -> Any:
            return work(self.kmock)

        coroutine: Coroutine[Any, Any, Any] = call()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def fails(
        self, pattern: str, status: int, body: Plain | None = None, *, times: int | None = None
    ) -> None:
        """Requests like `post /apis/batch/v1/namespaces/research/jobs` are answered so; what they ask for is done."""
        answer = kmock.Response(status=status, payload=body or {"message": f"status {status}"})
        answers = itertools.repeat(answer) if times is None else iter([answer] * times)

        def react() -> Any:
            found = next(answers, None)
            if found is None:
                raise kmock.ReactionMismatchError  # not for this one any more
            return found

        def work(handler: Any) -> None:
            handler[pattern] << react

        self.do(work)

    def get(self, kind: str, name: str) -> Plain | None:
        def work(handler: Any) -> Plain | None:
            key = (kmock.resource(RESOURCES[kind]), NAMESPACE, name)
            if key not in handler.objects or handler.objects[key].deleted:
                return None
            return dict(handler.objects[key].raw)

        found: Plain | None = self.do(work)
        return found

    def names(self, kind: str) -> list[str]:
        def work(handler: Any) -> list[str]:
            wanted = kmock.resource(RESOURCES[kind])
            return [name for (r, _, name), one in handler.objects.items() if r == wanted and not one.deleted]

        found: list[str] = self.do(work)
        return sorted(found)

    def put(self, kind: str, plain: Plain) -> None:
        """An object as it stands now, made or replaced."""

        def work(handler: Any) -> None:
            handler.objects[(kmock.resource(RESOURCES[kind]), NAMESPACE, plain["metadata"]["name"])] = plain

        self.do(work)

    def remove(self, kind: str, name: str) -> None:
        """An object that somebody has deleted."""

        def work(handler: Any) -> None:
            handler.objects[(kmock.resource(RESOURCES[kind]), NAMESPACE, name)].delete()

        self.do(work)

    def asked(self) -> list[str]:
        """`POST /apis/…` of each request, in their order."""
        return list(self.do(lambda handler: [f"{r.method.value} {r.url.path}" for r in handler]))
