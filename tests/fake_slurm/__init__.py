"""A fake Slurm for logic tests: its commands, put on PATH, backed by one folder.

What it knows is what the tests need, in Slurm 22.05's own words; the real cluster (tests/slurm) is the truth.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BIN = Path(__file__).parent / "bin"


@dataclass(frozen=True)
class FakeSlurm:
    """One fake cluster: a folder. `environment` is what a process needs to see it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"FAKE_SLURM": str(self.folder), "PATH": f"{BIN}:{os.environ['PATH']}"}

    def set(self, **settings: Any) -> None:
        """Settings: refuse (sbatch's words), down (every command fails), run (sbatch really runs the tasks),
        addresses (NodeAddr by node), port (slurmd's), node_states, partition_nodes, job_show (text of `scontrol
        show job`), requeue_refused (words), node_kinds (sinfo's lines, as hpcdl.plan.nodes asks), defaults (of memory,
        from `scontrol show config` and `partition`), starts (what `sbatch --test-only` says), modes (how each call of a
        command behaves, in turn: away, hang, slow,
        garbage; and, once it is done: lost, killed, taken_hang, nothing, cut, failing)."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**old, **settings}))

    def calls(self, command: str) -> list[dict[str, Any]]:
        """Every call of a command: {argv, environment (SLURM_*, HPCDL_* only), stdin or script}."""
        try:
            lines = (self.folder / f"{command}.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def task(self, job_id: str) -> dict[str, Any]:
        """The record of one array task (`1_0`) or job."""
        return dict(json.loads((self.folder / "tasks" / f"{job_id}.json").read_text()))

    def jobs(self) -> list[str]:
        """The ids of all jobs that were ever taken and not refused, less those that were cancelled."""
        tasks = {path.stem: json.loads(path.read_text()) for path in (self.folder / "tasks").glob("*.json")}
        return sorted(
            {task.split("_")[0] for task, record in tasks.items() if record["state"] != "CANCELLED"}
        )

    def change(self, job_id: str, **record: Any) -> None:
        """Changes the record of one array task (`1_0`)."""
        file = self.folder / "tasks" / f"{job_id}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **record}))

    def forget(self, job_id: str) -> None:
        """As after MinJobAge: the controller knows nothing of an array any more."""
        for file in (self.folder / "tasks").glob(f"{job_id}_*.json"):
            file.unlink()
