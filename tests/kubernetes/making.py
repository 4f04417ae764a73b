"""Manifests for the tests, and a Job's controller in small: it runs the very pods of a manifest as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcdl.launch import kubernetes
from hpcdl.launch.base import Given, JobRequest
from hpcdl.launch.kube import manifest
from hpcdl.runs.store import RunDir
from hpcdl.spec import ClusterSpec
from hpcdl.spec.kubernetes import KubernetesSpec
from hpcdl.spec.plain import dump_yaml, to_plain
from tests.factory import tiny_spec
from tests.launch.making import FAKE_TORCH, HERE, until

TOKEN = "0123456789ab"
RUN_ID = "fedcba987654"


def cluster(kubernetes_: dict[str, Any] | None = None, **fields: Any) -> ClusterSpec:
    """A cluster section with an image and a claim."""
    own = {"image": "registry.example.org/train:1", "runs_claim": "runs", **(kubernetes_ or {})}
    return ClusterSpec(kind="kubernetes", kubernetes=KubernetesSpec(**own), **{"signal": None, **fields})


def request(
    section: ClusterSpec | None = None,
    *,
    count: int = 1,
    runs_dir: Path = Path("/home/me/runs"),
    token: str = TOKEN,
    name: str = "tiny",
    spec: Any = None,
    attempt: int = 0,
) -> JobRequest:
    """A submission of runs of the tiny experiment."""
    section = section or cluster()
    runs = tuple(runs_dir / name / (RUN_ID if i == 0 else f"{i:012x}") for i in range(count))
    plain = {**to_plain(spec or tiny_spec()), "name": name, "cluster": to_plain(section)}
    text = dump_yaml(plain)
    return JobRequest(
        token=token,
        name=name,
        cluster=section,
        runs_dir=runs_dir,
        run_dirs=runs,
        python="python",
        specs={run: Given(text=text, attempt=attempt) for run in runs},
    )


def objects(section: ClusterSpec | None = None, **more: Any) -> dict[str, dict[str, Any]]:
    """The objects of a submission of one run, by kind, read from its text."""
    return {one["kind"]: one for one in manifest.read(kubernetes.BACKEND.render(request(section, **more)))}


@dataclass
class Controller:
    """Makes the pods of a manifest's Job, and makes them anew by its podFailurePolicy, as Kubernetes' does."""

    made: dict[str, dict[str, Any]]
    """The objects, by kind."""
    folder: Path
    port: int
    mode: str = "finish"
    pods: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    codes: list[tuple[int, int]] = field(default_factory=list)
    """Index and exit code of each pod that has ended, in that order."""
    disrupted: set[int] = field(default_factory=set)
    """Process ids of pods that have the condition DisruptionTarget."""
    failures: dict[int, int] = field(default_factory=dict)
    succeeded: set[int] = field(default_factory=set)
    condition: str = ""
    """Complete, or Failed with its reason."""

    @property
    def spec(self) -> dict[str, Any]:
        return self.made["Job"]["spec"]

    @property
    def run(self) -> RunDir:
        data = json.loads(self.made["ConfigMap"]["data"]["run.json"])
        return RunDir(self.folder / "volume" / data["run"])

    def start(self, index: int) -> None:
        here = self.folder / f"pod-{index}-{len(self.codes)}"
        (here / "spec").mkdir(parents=True)
        (here / "tmp").mkdir()
        for name, text in self.made["ConfigMap"]["data"].items():
            (here / "spec" / name).write_text(text)
        (self.folder / "volume").mkdir(exist_ok=True)
        container = self.spec["template"]["spec"]["containers"][0]
        assert container["command"] == ["python", "-m", "hpcdl.launch.kube.pod"]
        told = {one["name"]: one.get("value", here.name) for one in container["env"]}
        path = os.pathsep.join(map(str, (FAKE_TORCH, HERE.parents[1])))
        environment = {
            **os.environ, **told, "JOB_COMPLETION_INDEX": str(index), "HPCDL_RUNS": str(self.folder / "volume"),
            "HPCDL_PORT": str(self.port), "POD_DIR": str(here), "PYTHONPATH": path, "TMPDIR": str(here / "tmp"),
            "MODE": self.mode,
        }  # fmt: skip
        with (here / "log").open("wb") as log:
            self.pods[index] = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("pod.py"))],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def begin(self) -> None:
        for index in range(self.spec["completions"]):
            self.start(index)

    def disrupt(self, index: int) -> None:
        """What an eviction does: the condition, and SIGTERM."""
        self.disrupted.add(self.pods[index].pid)
        self.pods[index].send_signal(signal.SIGTERM)

    def look(self) -> None:
        """One round of the controller."""
        for index, process in list(self.pods.items()):
            code = process.poll()
            if code is None or self.condition:
                continue
            del self.pods[index]
            code = code if code >= 0 else 128 - code
            self.codes.append((index, code))
            if code == 0:
                self.succeeded.add(index)
                continue
            action = self._action(code, process.pid in self.disrupted)
            if action == "FailJob":
                self.condition = "Failed: PodFailurePolicy"
            elif action == "Count":
                self.failures[index] = self.failures.get(index, 0) + 1
                if self.failures[index] > self.spec["backoffLimitPerIndex"]:
                    self.condition = "Failed: MaxFailedIndexesExceeded"
            if not self.condition:
                self.start(index)
        if len(self.succeeded) == self.spec["completions"]:
            self.condition = "Complete"
        if self.condition.startswith("Failed"):
            for process in self.pods.values():
                process.send_signal(signal.SIGTERM)

    def _action(self, code: int, disrupted: bool) -> str:
        for rule in self.spec["podFailurePolicy"]["rules"]:
            conditions = {one["type"] for one in rule.get("onPodConditions", ())}
            if (disrupted and "DisruptionTarget" in conditions) or code in rule.get("onExitCodes", {}).get(
                "values", ()
            ):
                return str(rule["action"])
        return "Count"

    def finish(self, limit_s: float = 150.0) -> str:
        """Until the Job has ended; how."""
        deadline = time.monotonic() + limit_s
        while not self.condition:
            self.look()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)
        return self.condition

    def until(self, what: str, condition: Any, limit_s: float = 150.0) -> Any:
        def held() -> Any:
            self.look()
            assert not self.condition, f"{what}: the Job has ended: {self.condition}\n{self.logs()}"
            return condition()

        return until(held, f"{what}\n{self.logs()}", limit_s)

    def pids(self, ranks: int) -> list[int]:
        """The workers', once all have said hello."""
        files = [self.run.path / f"pid-{rank}" for rank in range(ranks)]
        self.until("the workers have begun", lambda: all(f.exists() and f.read_text() for f in files))
        return [int(f.read_text()) for f in files]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.run.events() if event["event"] == kind]

    def logs(self) -> str:
        return "\n".join(
            f"== {p}\n{p.read_text(errors='replace')[-1500:]}" for p in sorted(self.folder.glob("pod-*/log"))
        )

    def close(self) -> None:
        for process in self.pods.values():
            if process.poll() is None:
                process.kill()
            process.wait()
