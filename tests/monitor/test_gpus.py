"""GPUs that answer everything, as in data centres, some of it, as people have at home, or nothing any more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hpcdl.monitor.gpus import Gpus
from hpcdl.monitor.records import GpuSample
from tests.monitor import nvml
from tests.monitor.nvml import CONSUMER, DATACENTER, GIB, Driver, NVMLError

FULL = GpuSample(
    index=0,
    name="NVIDIA H100",
    memory_used_bytes=60 * GIB,
    memory_total_bytes=80 * GIB,
    percent=97.0,
    power_w=652.3,
    temperature_c=61.0,
    throttled=("power cap", "too hot (hardware)"),
    ecc_uncorrected=0,
)
OPTIONAL = {
    "nvmlDeviceGetName": "name",
    "nvmlDeviceGetUUID": None,
    "nvmlDeviceGetMigMode": None,
    "nvmlDeviceGetMemoryInfo": "memory_used_bytes memory_total_bytes",
    "nvmlDeviceGetUtilizationRates": "percent",
    "nvmlDeviceGetPowerUsage": "power_w",
    "nvmlDeviceGetTemperature": "temperature_c",
    "nvmlDeviceGetTotalEccErrors": "ecc_uncorrected",
    "nvmlDeviceGetCurrentClocksEventReasons": "throttled",
    "nvmlDeviceGetComputeRunningProcesses": None,
    "nvmlDeviceRegisterEvents": None,
}


def test_a_gpu_that_tells_everything() -> None:
    gpus = Gpus(None, Driver(DATACENTER))
    assert gpus.sample() == [FULL] and gpus.problem == "" and gpus.news == []
    assert gpus.memory_by_process() == {11: 58 * GIB}


@pytest.mark.parametrize("function", OPTIONAL)
def test_each_function_may_not_be_supported(function: str) -> None:
    driver = Driver({name: answer for name, answer in DATACENTER.items() if name != function})
    gpus = Gpus(None, driver)
    (sample,) = gpus.sample()
    lacking = (OPTIONAL[function] or "").split()
    for name in GpuSample.__dataclass_fields__:
        value = getattr(sample, name)
        assert value in (None, "", ()) if name in lacking else value == getattr(FULL, name), name
    assert gpus.memory_by_process() == ({} if "Running" in function else {11: 58 * GIB})
    gpus.sample()
    gpus.memory_by_process()
    assert driver.asked.count(function) <= 1, "and isn't asked for again"


def test_every_card_of_a_node_is_its_own() -> None:
    """What one doesn't support, another does; memory of a process adds up; an older driver's word for throttling."""
    gpus = Gpus(None, Driver(CONSUMER, {**DATACENTER, "nvmlDeviceGetUUID": "GPU-3333"}))
    home, other = gpus.sample()
    assert (home.power_w, home.ecc_uncorrected, home.throttled, home.percent) == (None, None, (), 0.0)
    assert other.power_w == 652.3
    assert gpus.memory_by_process() == {11: 59 * GIB}


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, [0, 1, 2]), ("", []), ("0", [0]), ("2,1", [1, 2]), ("GPU-2", [1]), ("GPU-1111,GPU-3333", [0, 2]),
        ("NoDevFiles", []), ("7", []), ("MIG-x", []),
    ],
)  # fmt: skip
def test_only_this_jobs_gpus(visible: str | None, indices: list[int]) -> None:
    driver = Driver(DATACENTER, CONSUMER, {**DATACENTER, "nvmlDeviceGetUUID": "GPU-3333"})
    gpus = Gpus(visible, driver)
    assert [gpu.index for gpu in gpus.sample()] == indices
    assert gpus.problem == ("" if indices else "the driver shows none")


@pytest.mark.parametrize(
    ("visible", "parts"), [(None, [None, 0, 1]), ("0", [None, 0, 1]), ("MIG-b", [None, 1])]
)
def test_mig_devices(visible: str | None, parts: list[int | None]) -> None:
    """They have memory, and little else; the GPU that they are on has no load."""
    part = {
        "nvmlDeviceGetName": "H100 MIG 1g.10gb",
        "nvmlDeviceGetMemoryInfo": nvml.SimpleNamespace(total=10 * GIB, used=GIB),
        "nvmlDeviceGetComputeRunningProcesses": [nvml.SimpleNamespace(pid=11, usedGpuMemory=GIB)],
    }
    split: dict[str, Any] = {
        **DATACENTER,
        "nvmlDeviceGetMigMode": [1, 1],
        "nvmlDeviceGetMaxMigDeviceCount": 7,
        "parts": [{**part, "nvmlDeviceGetUUID": f"MIG-{name}"} for name in "ab"],
        "nvmlDeviceGetComputeRunningProcesses": [nvml.SimpleNamespace(pid=11, usedGpuMemory=GIB)],
    }
    del split["nvmlDeviceGetUtilizationRates"]
    gpus = Gpus(visible, Driver(split))
    whole, *others = gpus.sample()
    assert [whole.mig, *(gpu.mig for gpu in others)] == parts
    assert (whole.percent, whole.power_w) == (None, 652.3)
    assert all((gpu.index, gpu.memory_used_bytes, gpu.power_w) == (0, GIB, None) for gpu in others)
    assert gpus.memory_by_process() == {11: GIB}, "told by the GPU and by its part, there once"


def test_xid_errors_are_told() -> None:
    driver = Driver(DATACENTER, {**DATACENTER, "nvmlDeviceGetUUID": "GPU-3333"})
    gpus = Gpus(None, driver)
    assert [gpu.xid for gpu in gpus.sample()] == [None, None]
    driver.events += [(1, 63), (1, 79)]
    assert [gpu.xid for gpu in gpus.sample()] == [None, 79]
    assert gpus.news == [
        "GPU 1 reports Xid 63 (a memory row was remapped)",
        "GPU 1 reports Xid 79 (it has fallen off the bus)",
    ]
    assert [gpu.xid for gpu in gpus.sample()] == [None, 79], "the last one stands"


def test_a_gpu_that_is_lost() -> None:
    """At the start, and in the middle of a run: the others are still sampled."""
    driver = Driver({"lost": True}, DATACENTER, CONSUMER)
    gpus, gone = Gpus(None, driver), driver.gpus[1]
    assert gpus.news == ["GPU 0 can't be read: error 15"]
    for name in gone:
        gone[name] = NVMLError(nvml.NVML_ERROR_GPU_IS_LOST)
    dead, home = gpus.sample()
    assert (dead.index, dead.percent, dead.memory_used_bytes) == (1, None, None)
    assert (home.index, home.temperature_c) == (2, 30.0)
    assert gpus.news[1:] == ["GPU 1 doesn't answer any more: error 15"]


def test_no_driver_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(None, Driver(init=nvml.NVML_ERROR_LIBRARY_NOT_FOUND))
    assert gpus.problem == "error 12"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    without = Gpus(None)
    assert without.problem == "nvidia-ml-py isn't installed"
    broken = tmp_path / "pynvml.py"
    broken.write_text("1 / 0")
    monkeypatch.delitem(sys.modules, "pynvml")
    monkeypatch.syspath_prepend(tmp_path)
    assert Gpus(None).problem == "pynvml can't be imported: ZeroDivisionError: division by zero"
    for none in (gpus, without, Gpus(None, Driver())):
        assert none.sample() == [] and none.memory_by_process() == {}
        none.close()


def test_the_driver_is_let_go() -> None:
    driver = Driver(DATACENTER)
    gpus = Gpus(None, driver)
    gpus.close()
    gpus.close()
    assert driver.asked.count("nvmlShutdown") == 1 and gpus.sample() == []


def test_the_package_has_what_is_asked_for() -> None:
    """The stand-in's names are the real ones."""
    real = pytest.importorskip("pynvml")
    names = {
        *DATACENTER,
        *CONSUMER,
        *(name for name in dir(nvml) if name.startswith(("NVML", "nvmlEventType"))),
    }
    names |= {name for name in dir(Driver) if name.startswith("nvml")}
    assert not [name for name in names if not hasattr(real, name)]
    for name in (name for name in dir(nvml) if name.startswith(("NVML_", "nvmlEventType"))):
        assert getattr(nvml, name) == getattr(real, name), name
    assert Gpus(None).sample() is not None
