"""A node's GPUs, through NVIDIA's management library (nvidia-ml-py).

Much of it is optional: consumer cards count no memory errors, MIG devices have no load, virtual ones no power. What a
card doesn't do is None in its samples and isn't asked for again; no driver at all is normal.
Source: the NVML API reference.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpcdl.monitor.records import GpuSample

THROTTLED = {
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "too hot (driver)",
    0x040: "too hot (hardware)",
    0x080: "power brake",
    0x100: "display clocks",
}
"""Why clocks are held down (nvmlClocksEventReason…); being idle is no reason."""
OF_HARDWARE = ("hardware slowdown", "too hot (driver)", "too hot (hardware)", "power brake")
"""Those that the site has to see to."""
XIDS = {
    13: "an exception in a kernel",
    31: "an access to memory that isn't mapped",
    43: "a kernel was stopped",
    45: "its work was stopped, mostly after another error",
    48: "a memory error that can't be corrected",
    62: "its microcontroller halted",
    63: "a memory row was remapped",
    64: "a memory row could not be remapped",
    74: "an error of NVLink",
    79: "it has fallen off the bus",
    92: "many corrected memory errors",
    94: "a memory error, contained",
    95: "a memory error, not contained",
    119: "its firmware (GSP) doesn't answer",
    120: "an error of its firmware (GSP)",
}
"""What NVIDIA's catalogue says of the usual ones."""


@dataclass(slots=True)
class _Device:
    """One GPU, or a MIG device on it."""

    handle: Any
    index: int
    mig: int | None = None
    name: str = ""
    uuid: str = ""
    lacks: set[str] = field(default_factory=set)
    """Functions that it doesn't support."""
    xid: int | None = None


class Gpus:
    """The node's GPUs, those of this job if the environment says which.

    Args:
        visible: CUDA_VISIBLE_DEVICES, where a scheduler or a person has chosen.
        nvml: the module; None: the installed one.
    """

    def __init__(self, visible: str | None, nvml: Any = None) -> None:
        self.problem = ""
        """Why there are none."""
        self.news: list[str] = []
        """What somebody has to be told: Xid errors, GPUs that don't answer any more. The reader takes them out."""
        self._devices: list[_Device] = []
        self._events: Any = None
        try:
            nvml = nvml or importlib.import_module("pynvml")
        except ImportError:
            self.problem = "nvidia-ml-py isn't installed"
            return
        except Exception as error:  # another package of that name, or a broken one
            self.problem = f"pynvml can't be imported: {type(error).__name__}: {error}"
            return
        self._nvml = nvml
        try:
            nvml.nvmlInit()
            self._devices = self._find(_names(visible))
        except nvml.NVMLError as error:
            self.problem = str(error)
            return
        self.problem = "" if self._devices else "the driver shows none"
        self._listen()

    def sample(self) -> list[GpuSample]:
        """Each GPU, and each MIG device after its own."""
        self._hear()
        return [self._of(device) for device in self._devices]

    def memory_by_process(self) -> dict[int, int]:
        """Bytes that processes hold, over all GPUs. In a container the driver may know them by other pids."""
        held: dict[tuple[int, int], int] = {}
        for device in self._devices:
            for each in self._ask(device, "nvmlDeviceGetComputeRunningProcesses") or ():
                if each.usedGpuMemory is not None:  # a GPU and the MIG device on it may both tell
                    key = each.pid, device.index
                    held[key] = max(held.get(key, 0), int(each.usedGpuMemory))
        return {pid: sum(held[each] for each in held if each[0] == pid) for pid, _ in held}

    def close(self) -> None:
        """Lets the driver go."""
        if self._devices:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
        self._devices = []

    def _find(self, visible: Sequence[str] | None) -> list[_Device]:
        found: list[_Device] = []
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            except self._nvml.NVMLError as error:  # lost, or another's
                self.news.append(f"GPU {index} can't be read: {error}")
                continue
            gpu = _Device(handle, index)
            self._name(gpu)
            parts = list(self._parts(gpu))
            chosen = [part for part in parts if _is_among(visible, (part.uuid,))]
            if _is_among(visible, (str(index), gpu.uuid)):
                found += [gpu, *parts]
            elif chosen:
                found += [gpu, *chosen]
        return found

    def _parts(self, gpu: _Device) -> Iterator[_Device]:
        mode = self._ask(gpu, "nvmlDeviceGetMigMode")
        if not mode or mode[0] != 1:
            return
        for number in range(self._ask(gpu, "nvmlDeviceGetMaxMigDeviceCount") or 0):
            with contextlib.suppress(self._nvml.NVMLError):  # a number that no device has
                handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.handle, number)
                part = _Device(handle, gpu.index, mig=number)
                self._name(part)
                yield part

    def _name(self, device: _Device) -> None:
        device.name = _text(self._ask(device, "nvmlDeviceGetName"))
        device.uuid = _text(self._ask(device, "nvmlDeviceGetUUID"))

    def _of(self, device: _Device) -> GpuSample:
        ask, nvml = self._ask, self._nvml
        memory = ask(device, "nvmlDeviceGetMemoryInfo")
        load = ask(device, "nvmlDeviceGetUtilizationRates")
        power = ask(device, "nvmlDeviceGetPowerUsage")
        heat = ask(device, "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        errors = ask(
            device,
            "nvmlDeviceGetTotalEccErrors",
            nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            nvml.NVML_VOLATILE_ECC,
        )
        reasons = ask(device, "nvmlDeviceGetCurrentClocksEventReasons")
        if reasons is None:  # drivers before 535
            reasons = ask(device, "nvmlDeviceGetCurrentClocksThrottleReasons")
        return GpuSample(
            index=device.index,
            mig=device.mig,
            name=device.name,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            percent=None if load is None else float(load.gpu),
            power_w=None if power is None else round(power / 1000, 1),
            temperature_c=None if heat is None else float(heat),
            throttled=tuple(words for bit, words in THROTTLED.items() if reasons and reasons & bit),
            ecc_uncorrected=None if errors is None else int(errors),
            xid=device.xid,
        )

    def _ask(self, device: _Device, function: str, *more: Any) -> Any:
        """A function's answer; None where the card, its driver or nvidia-ml-py doesn't have it."""
        if function in device.lacks:
            return None
        try:
            return getattr(self._nvml, function)(device.handle, *more)
        except AttributeError:
            device.lacks.add(function)
        except self._nvml.NVMLError as error:
            code = getattr(error, "value", None)
            if code in (self._nvml.NVML_ERROR_NOT_SUPPORTED, self._nvml.NVML_ERROR_FUNCTION_NOT_FOUND):
                device.lacks.add(function)
            elif code == self._nvml.NVML_ERROR_GPU_IS_LOST:
                self._tell(f"GPU {device.index} doesn't answer any more: {error}")
        return None

    def _listen(self) -> None:
        """Has the driver tell of Xid errors; not every one does."""
        nvml = self._nvml
        try:
            events = nvml.nvmlEventSetCreate()
        except (nvml.NVMLError, AttributeError):
            return
        for device in self._devices:
            if device.mig is None:
                with contextlib.suppress(nvml.NVMLError):
                    nvml.nvmlDeviceRegisterEvents(device.handle, nvml.nvmlEventTypeXidCriticalError, events)
                    self._events = events

    def _hear(self) -> None:
        while self._events is not None:
            try:
                event = self._nvml.nvmlEventSetWait(self._events, 0)
                index = int(self._nvml.nvmlDeviceGetIndex(event.device))
            except self._nvml.NVMLError as error:
                if getattr(error, "value", None) != self._nvml.NVML_ERROR_TIMEOUT:
                    self._events = None  # it will not begin to work
                return
            xid = int(event.eventData)
            words = f" ({XIDS[xid]})" if xid in XIDS else ""
            self._tell(f"GPU {index} reports Xid {xid}{words}")
            for device in self._devices:
                if device.index == index and device.mig is None:
                    device.xid = xid

    def _tell(self, text: str) -> None:
        if text not in self.news:
            self.news.append(text)


def _names(chosen: str | None) -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names; None: nobody has chosen. CUDA stops at the first that it doesn't know."""
    return None if chosen is None else [name.strip() for name in chosen.split(",") if name.strip()]


def _is_among(visible: Sequence[str] | None, names: Sequence[str]) -> bool:
    """Whether a device was chosen: by its number, or by the beginning of its UUID."""
    if visible is None:
        return True
    return any(
        name == word or (not word.isdigit() and name.startswith(word))
        for word in visible
        for name in names
        if name
    )


def _text(value: Any) -> str:
    """Older versions give bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value or "")
