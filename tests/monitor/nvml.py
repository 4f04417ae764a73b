"""A stand-in for nvidia-ml-py's `pynvml`: GPUs as lists of what they answer. What they don't, they don't support."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

NVML_TEMPERATURE_GPU = 0
NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
NVML_ERROR_NOT_SUPPORTED, NVML_ERROR_TIMEOUT, NVML_ERROR_NOT_FOUND = 3, 10, 6
NVML_ERROR_LIBRARY_NOT_FOUND, NVML_ERROR_FUNCTION_NOT_FOUND, NVML_ERROR_GPU_IS_LOST = 12, 13, 15
nvmlEventTypeXidCriticalError = 8

GIB = 1 << 30
DATACENTER: dict[str, Any] = {
    "nvmlDeviceGetName": b"NVIDIA H100",  # older versions give bytes
    "nvmlDeviceGetUUID": "GPU-1111",
    "nvmlDeviceGetMigMode": [0, 0],
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * GIB, used=60 * GIB),
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=50),
    "nvmlDeviceGetPowerUsage": 652_340,
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetCurrentClocksEventReasons": 0x004 | 0x040,
    "nvmlDeviceGetComputeRunningProcesses": [
        SimpleNamespace(pid=11, usedGpuMemory=58 * GIB),
        SimpleNamespace(pid=12, usedGpuMemory=None),
    ],
    "nvmlDeviceRegisterEvents": None,
}
CONSUMER: dict[str, Any] = {
    "nvmlDeviceGetName": "NVIDIA GeForce RTX 4090",
    "nvmlDeviceGetUUID": "GPU-2222",
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=24 * GIB, used=0),
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=0, memory=0),
    "nvmlDeviceGetTemperature": 30,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0x001,
    "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=11, usedGpuMemory=GIB)],
}


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


class Driver:
    """The module, of a node with such GPUs.

    Args:
        *gpus: what each answers, by function; a function that isn't there raises NotSupported, an NVMLError raises it.
        init: how nvmlInit fails.
    """

    def __init__(self, *gpus: dict[str, Any], init: int | None = None) -> None:
        self.gpus = [dict(gpu) for gpu in gpus]
        self.events: list[tuple[int, int]] = []
        """GPUs and their Xid errors, to be heard of."""
        self.asked: list[str] = []
        self._init = init

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("NVML", "nvmlEventType")):
            return globals()[name]
        if name == "nvmlEventSetCreate" and not any("nvmlDeviceRegisterEvents" in gpu for gpu in self.gpus):
            raise AttributeError(name)
        return self._function(name)

    def _function(self, name: str) -> Callable[..., Any]:
        def ask(gpu: dict[str, Any], *_: object) -> Any:
            self.asked.append(name)
            answer = gpu.get(name, NVMLError(NVML_ERROR_NOT_SUPPORTED))
            if isinstance(answer, NVMLError):
                raise answer
            return answer

        return ask

    def nvmlInit(self) -> None:
        if self._init is not None:
            raise NVMLError(self._init)

    def nvmlShutdown(self) -> None:
        self.asked.append("nvmlShutdown")

    def nvmlEventSetCreate(self) -> object:
        return self.events

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if "lost" in self.gpus[index]:
            raise NVMLError(NVML_ERROR_GPU_IS_LOST)
        return self.gpus[index]

    def nvmlDeviceGetIndex(self, gpu: dict[str, Any]) -> int:
        return next(number for number, each in enumerate(self.gpus) if each is gpu)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: dict[str, Any], number: int) -> dict[str, Any]:
        if number >= len(gpu["parts"]):
            raise NVMLError(NVML_ERROR_NOT_FOUND)
        part: dict[str, Any] = gpu["parts"][number]
        return part

    def nvmlEventSetWait(self, events: list[tuple[int, int]], wait_ms: int) -> Any:
        assert wait_ms == 0
        if not events:
            raise NVMLError(NVML_ERROR_TIMEOUT)
        index, xid = events.pop(0)
        return SimpleNamespace(device=self.gpus[index], eventData=xid)
