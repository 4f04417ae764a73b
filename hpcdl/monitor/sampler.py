"""The monitor of one node: a thread of the agent that looks at all of the run's processes there, and at its GPUs.

The workers take no part in it: nothing of it runs in them, waits for them or holds their interpreter's lock. A thread
is enough, since the agent itself has little to do; it is in the kernel most of its time, and so in nobody's way.
Whatever goes wrong here is told once (an event) and ends nothing.

It limits itself: by the CPU time that a sample takes, and by the bytes of those that are written down
(hpcdl.monitor.allowance); listeners in the agent get all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hpcdl.errors import HpcdlError
from hpcdl.monitor import allowance, records
from hpcdl.monitor.gpus import OF_HARDWARE, Gpus
from hpcdl.monitor.network import Network
from hpcdl.monitor.node import Node
from hpcdl.monitor.processes import Processes, pss_bytes
from hpcdl.monitor.records import GpuSample, NodeSample, ProcessSample
from hpcdl.runs.files import append_line, unwritten
from hpcdl.runs.store import RunDir, now

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_FIRST_PAUSE_S = 0.5
"""After a try's first sample; then twice as long each time, up to every_s: a start is over soon."""
_CPU_SHARE = 0.005
"""Of one core that sampling may take; PSS a fifth of that more."""
_PSS_SHARE = 0.001
_FIRST_PSS_S = 20.0
"""After the try's first sample: while everybody imports, it says little."""
_SHORT = 0.1
"""Share of the memory that is left, below which each change is worth a line."""
_SHORT_PAUSE_S = 1.0
"""Between samples then, at the most."""
_MOST_WAITING = 50
"""Lines in the agent's memory that find no room on a full disk; more are not kept."""
_END_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What of a spec the monitor needs."""

    every_s: float
    pss_every_s: float
    bytes_per_day: float
    wants_gpus: bool = False
    """Whether it is worth a word that there are none."""
    visible_gpus: str | None = None
    """The workers' CUDA_VISIBLE_DEVICES."""

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Settings | None:
        """From spec.yaml as plain data, of any version; None: nothing is to be sampled."""
        monitor, cluster = spec.get("monitor", {}), spec.get("cluster", {})
        if monitor.get("name", "none") == "none":
            return None
        if not monitor.keys() >= {"every_s", "pss_every_s", "mb_per_day"}:
            from hpcdl.spec import MonitorSpec  # not above: what an agent imports delays each run

            monitor = {**dataclasses.asdict(MonitorSpec()), **monitor}
        return cls(
            every_s=float(monitor["every_s"]),
            pss_every_s=float(monitor["pss_every_s"]),
            bytes_per_day=1e6 * float(monitor["mb_per_day"]),
            wants_gpus=bool(cluster.get("gpus_per_node")),
            visible_gpus=(cluster.get("env") or {}).get(_VISIBLE, os.environ.get(_VISIBLE)),
        )


class Sampler:
    """Samples of one node, from now until the block ends (`with`).

    Args:
        settings: how often; None: never, and nothing is written.
        run: where the file lies.
        node: this node's name.
        attempt: the try.
        processes: what is looked at.
        listeners: take each sample, also those that are not written down.
    """

    def __init__(
        self,
        settings: Settings | None,
        run: RunDir,
        node: str,
        attempt: str,
        processes: Processes,
        listeners: Sequence[Callable[[NodeSample], object]] = (),
    ) -> None:
        self._settings, self._run, self._node, self._attempt = settings, run, node, attempt
        self._processes, self._listeners = processes, listeners
        self._file = records.file_of(run, node)
        self._over = threading.Event()
        self._told: set[str] = set()
        self._peak = 0
        self._size = 0
        """Bytes of the last line."""
        self._write_at = 0.0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sampler:
        if self._settings is not None:
            work = (self._settings,)
            thread = threading.Thread(target=self._work, args=work, name="monitor", daemon=True)
            try:
                thread.start()
                self._thread = thread
            except RuntimeError as error:  # the user may have no more threads (ulimit -u)
                self._tell([f"no samples: {error}"])
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it; a disk or a driver that hangs isn't waited for."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(_END_LIMIT_S)

    def _work(self, settings: Settings) -> None:
        try:
            look = Look(settings, self._processes)
            room = allowance.for_file(self._file, settings.bytes_per_day)
            before = records.last(self._run, self._node)
            self._peak = (before.peak_rss_bytes if before else None) or 0
        except Exception as error:  # nothing that is only measured may end the training
            self._tell([f"no samples: {type(error).__name__}: {error}"])
            return
        pause = usual = min(_FIRST_PAUSE_S, settings.every_s)
        while not self._over.is_set():
            began = time.thread_time()
            self._sample(look, pause, room)
            least = (time.thread_time() - began - look.pss_s) / _CPU_SHARE
            pause = max(least, min(usual, _SHORT_PAUSE_S) if look.is_short else usual)
            self._over.wait(pause)
            usual = min(2 * usual, settings.every_s)
            pause = max(least, usual)
        look.gpus.close()

    def _sample(self, look: Look, pause: float, room: allowance.Allowance) -> None:
        """Takes a sample, writes it down if it is time to, and hands it on."""
        try:
            sample = look.sample()
            self._tell(look.problems)
        except Exception as error:
            self._tell([f"a sample is missing: {type(error).__name__}: {error}"])
            return
        self._peak = max(self._peak, sample.rss_bytes or 0)
        sample = replace(
            sample,
            node=self._node,
            attempt=self._attempt,
            next_s=round(pause + room.pause_s(self._size), 1),
            peak_rss_bytes=self._peak or None,
        )
        urgent = look.is_urgent() and room.has_room_for(self._size)
        if urgent or time.monotonic() >= self._write_at:
            look.wrote()
            self._safely(self._write, sample, room)
        for listener in self._listeners:
            self._safely(listener, sample)

    def _safely(self, call: Callable[..., object], sample: NodeSample, *more: Any) -> None:
        try:
            call(sample, *more)
        except Exception as error:
            self._tell([f"a sample is lost: {type(error).__name__}: {error}"])

    def _write(self, sample: NodeSample, room: allowance.Allowance) -> None:
        line = records.as_line(sample)
        self._size = len(json.dumps(line, ensure_ascii=False)) + 1
        if unwritten(self._file) < _MOST_WAITING:
            append_line(self._file, line)
        room.spend(self._size)
        self._write_at = time.monotonic() + room.pause_s(self._size)

    def _tell(self, problems: list[str]) -> None:
        for problem in problems:
            if problem not in self._told:
                self._told.add(problem)
                with contextlib.suppress(OSError, HpcdlError):
                    self._run.event("warning", message=f"monitor on node {self._node}: {problem}")
        problems.clear()


class Look:
    """What one sample is put together from.

    Args:
        settings: how often PSS is looked at.
        processes: of the run, on this node.
        node: its cores and memory.
        network: its counters.
        gpus: its GPUs.
    """

    def __init__(
        self,
        settings: Settings,
        processes: Processes,
        node: Node | None = None,
        network: Network | None = None,
        gpus: Gpus | None = None,
    ) -> None:
        self._settings, self._processes = settings, processes
        self._node, self._network = node or Node(), network or Network()
        self.gpus = gpus or Gpus(settings.visible_gpus)
        self.problems: list[str] = []
        """What has to be told; the reader takes it out."""
        if settings.wants_gpus and self.gpus.problem:
            self.problems.append(f"no samples of GPUs: {self.gpus.problem}")
        self._pss_at = time.monotonic() + min(_FIRST_PSS_S, settings.pss_every_s)
        self.pss_s = 0.0
        """CPU seconds of the last sample that PSS took."""
        self._share_left = self._written_share = 1.0
        self._ecc: dict[tuple[int, int | None], int] = {}

    def sample(self) -> NodeSample:
        """How things are now."""
        gpus, held = self._look_at_gpus()
        processes = self._look_at_processes(held)
        memory, traffic = self._node.memory(), self._network.look()
        self._share_left = memory.share_left
        return NodeSample(
            time=now(),
            cpu_percent=_sum(each.cpu_percent for each in processes),
            rss_bytes=_sum(each.rss_bytes for each in processes),
            pss_bytes=_sum(each.pss_bytes for each in processes),
            node_cpu_percent=self._node.cpu_percent(),
            memory_available_bytes=memory.available_bytes,
            memory_limit_bytes=memory.limit_bytes,
            net_sent_bytes=traffic.sent_bytes,
            net_received_bytes=traffic.received_bytes,
            rdma_sent_bytes=traffic.rdma_sent_bytes,
            rdma_received_bytes=traffic.rdma_received_bytes,
            unlisted=max(0, len(processes) - records.MOST_LISTED) or None,
            processes=tuple(processes[: records.MOST_LISTED]),
            gpus=tuple(gpus),
        )

    @property
    def is_short(self) -> bool:
        """Whether little memory was left at the last sample: the kernel may kill soon."""
        return self._share_left < _SHORT

    def is_urgent(self) -> bool:
        """Whether memory is short and gets shorter: what led to its end is to be seen."""
        return self.is_short and self._share_left < self._written_share - _SHORT / 20

    def wrote(self) -> None:
        """The last sample was written down."""
        self._written_share = self._share_left

    def _look_at_gpus(self) -> tuple[list[GpuSample], dict[int, int]]:
        """Samples of GPUs, and the bytes that processes hold there."""
        try:
            gpus, held = self.gpus.sample(), self.gpus.memory_by_process()
        except (
            Exception
        ) as error:  # of a driver or a package that is broken: the rest is still worth a sample
            self.problems.append(f"no samples of GPUs: {type(error).__name__}: {error}")
            return [], {}
        self.problems += [*self.gpus.news, *self._found_on(gpus)]
        self.gpus.news.clear()
        return gpus, held

    def _look_at_processes(self, gpu_memory: Mapping[int, int]) -> list[ProcessSample]:
        try:
            processes = self._processes.sample(gpu_memory)
        except OSError as error:
            self.problems.append(f"/proc can't be read, so processes are not sampled: {error.strerror}")
            return []
        self.pss_s = 0.0
        if time.monotonic() < self._pss_at:
            return processes
        began, cpu = time.monotonic(), time.thread_time()
        processes = [replace(each, pss_bytes=pss_bytes(each.pid)) for each in processes]
        self.pss_s = time.thread_time() - cpu
        self._pss_at = began + max(self._settings.pss_every_s, self.pss_s / _PSS_SHARE)
        return processes

    def _found_on(self, gpus: list[GpuSample]) -> list[str]:
        """What the site has to see to: memory errors that are new, and clocks that the hardware holds down."""
        said = []
        for gpu in gpus:
            key, count = (gpu.index, gpu.mig), gpu.ecc_uncorrected
            if count is not None and count > self._ecc.setdefault(key, count):
                said.append(
                    f"GPU {gpu.index} has had memory errors that can't be corrected: {count} since its start"
                )
                self._ecc[key] = count
            said += [f"GPU {gpu.index} is slowed down: {why}" for why in gpu.throttled if why in OF_HARDWARE]
        return said


def _sum(values: Any) -> Any:
    """Of those that are known; None where none is."""
    known = [value for value in values if value is not None]
    return round(sum(known), 1) if known else None
