"""system-<node>.jsonl: CPU, memory and GPUs of a node's workers, sampled by a thread of local rank 0."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

from hpcdl.runs.files import append_line
from hpcdl.runs.store import RunDir, now
from hpcdl.spec import MonitorSpec
from hpcdl.worker.process import Process


@contextlib.contextmanager
def watch(spec: MonitorSpec, run: RunDir, who: Process) -> Iterator[None]:
    """Samples every `every_s` seconds until the block ends; at once at the start, and once more at the end."""
    if spec.name == "none" or who.local_rank != 0:
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_sample, args=(spec, run, who, over), name="monitor", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2.0)


def _sample(spec: MonitorSpec, run: RunDir, who: Process, over: threading.Event) -> None:
    import psutil

    path = run.path / f"system-{who.node}.jsonl"
    gpus = _Gpus()
    workers: dict[int, Any] = {}
    last = False
    while True:
        for process in _workers():
            workers.setdefault(process.pid, process)  # kept: cpu_percent counts since its own last call
        record: dict[str, Any] = {"time": now(), "cpu_percent": 0.0, "rss_bytes": 0}
        for pid, process in list(workers.items()):
            try:
                record["cpu_percent"] += process.cpu_percent()
                record["rss_bytes"] += process.memory_info().rss
            except psutil.Error:
                del workers[pid]
        record["cpu_percent"] = round(record["cpu_percent"], 1)
        record["processes"] = len(workers)
        record["node_cpu_percent"] = psutil.cpu_percent()
        record["memory_available_bytes"] = psutil.virtual_memory().available
        record.update(gpus.sample())
        with contextlib.suppress(OSError):  # the disk is full: the training will say so
            append_line(path, record)
        if last:
            return
        last = over.wait(spec.every_s)


def _workers() -> list[Any]:
    """This node's workers: torchrun's children; this process alone without torchrun."""
    import psutil

    me = psutil.Process()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return [me]
    try:
        parent = me.parent()
        return parent.children() if parent is not None else [me]
    except psutil.Error:
        return [me]


class _Gpus:
    """GPU memory and load through NVML, where nvidia-ml-py and a driver are installed."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        try:
            import pynvml  # type: ignore[import-not-found]
        except ImportError:
            return
        self._nvml = pynvml
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]

    def sample(self) -> dict[str, Any]:
        """`gpu_memory_bytes` and `gpu_percent`, a list each over the node's GPUs; empty without any."""
        if not self._handles:
            return {}
        with contextlib.suppress(self._nvml.NVMLError):
            return {
                "gpu_memory_bytes": [int(self._nvml.nvmlDeviceGetMemoryInfo(h).used) for h in self._handles],
                "gpu_percent": [int(self._nvml.nvmlDeviceGetUtilizationRates(h).gpu) for h in self._handles],
            }
        return {}
