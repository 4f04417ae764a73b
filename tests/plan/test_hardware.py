from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcdl.plan import devices, free, hardware, nodes
from tests.factory import tiny_spec
from tests.fake_slurm import FakeSlurm

GIB = 2**30
KINDS = [
    "debug*|4|4|6000|gpu:2|(null)",
    "gpu|8|64|480000|gpu:h100:8(S:0-1)|ib,fast",
    "gpu|2|64|240000|gpu:a100:8(S:0-1),nvme:1|ib",
    "cpu|100|128|256000|(null)|(null)",
    "slices|1|64|480000|gpu:a100_3g.20gb:4|(null)",
    "half a line|4",
]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers of one test are none of the next; a busy machine gives them late."""
    monkeypatch.setattr(nodes, "LIMIT_S", 120.0)
    monkeypatch.setattr(hardware, "_ANSWER_S", 120.0)
    yield
    nodes.ask.cache_clear()
    nodes.defaults.cache_clear()
    nodes.configuration.cache_clear()
    hardware._this_machines.cache_clear()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    fake.set(node_kinds=KINDS)
    for key, value in fake.environment.items():
        monkeypatch.setenv(key, value)
    return fake


def test_kinds_of_nodes_are_read_and_half_lines_left_out() -> None:
    found = list(nodes.read("\n".join(KINDS)))
    assert [kind.partition for kind in found] == ["debug", "gpu", "gpu", "cpu", "slices"]
    assert [kind.default for kind in found] == [True, False, False, False, False]
    assert found[1].gpus == (("h100", 8),)
    assert found[1].features == {"ib", "fast"}
    assert found[0].gpus == ((None, 2),)
    assert found[0].memory_bytes == 6000 * 2**20


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:a100:4(S:0,1),gpu:v100:2(S:1),nvme:1", (("a100", 4), ("v100", 2))),
        ("gpu", ((None, 1),)),
        ("gres/gpu:nvidia_h100_80gb_hbm3:8", (("nvidia_h100_80gb_hbm3", 8),)),
        ("(null)", ()),
        (None, ()),
        ("gpus:3", ()),
    ],
)
def test_gpus_in_generic_resources(gres: str | None, expected: object) -> None:
    assert nodes.gpus(gres) == expected


def test_default_memory_is_the_partitions_own_or_the_clusters() -> None:
    text = (
        "TaskPlugin              = task/cgroup,task/affinity\nConstrainRAMSpace       = yes\n"
        "DefMemPerNode           = UNLIMITED\nDefMemPerCPU            = 2000\n"
        "PartitionName=debug DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED\n"
        "PartitionName=big DefMemPerNode=64000 MaxMemPerNode=UNLIMITED\n"
    )
    found = nodes.read_defaults(text)
    assert found["debug"] == found[""] == nodes.Default(per_cpu=2000 * 2**20)
    assert found["big"] == nodes.Default(per_node=64000 * 2**20)
    assert nodes.read_defaults(text.replace("= yes", "= no")) == {}  # nobody holds jobs to it


def memory_of(**cluster: object) -> tuple[float | None, str]:
    """GiB of a rank of a Slurm job, and who says so."""
    spec = tiny_spec(**{f"cluster__{key}": value for key, value in {"kind": "slurm", **cluster}.items()})
    found = hardware.of(spec)
    size = found.device.memory_bytes
    return None if size is None else round(size / GIB, 1), found.sources["memory"]


def test_memory_of_a_cpu_job_is_what_was_asked_for() -> None:
    assert memory_of(mem_gb=12, processes_per_node=4) == (3.0, "cluster.mem_gb, shared by 4")


def test_memory_of_a_cpu_job_is_what_the_profile_says() -> None:
    found = memory_of(partition="cpu", partitions={"cpu": {"mem_gb": 240}}, processes_per_node=2)
    assert found == (120.0, "cluster.partitions.cpu.mem_gb, shared by 2")


def test_memory_of_a_cpu_job_is_what_slurm_says(slurm: FakeSlurm) -> None:
    assert memory_of(partition="cpu") == (250.0, "RealMemory of cpu's nodes (sinfo)")
    assert memory_of()[0] == 5.9  # of the default partition
    assert len(slurm.calls("sinfo")) == 1


def test_a_job_that_asks_for_no_memory_gets_the_default(slurm: FakeSlurm) -> None:
    killed = "JobAcctGatherParams     = OverMemoryKill\n"
    slurm.set(defaults=f"{killed}DefMemPerNode = UNLIMITED\nPartitionName=cpu DefMemPerCPU=2048")
    size, source = memory_of(partition="cpu", processes_per_node=2, cpus_per_process=3)
    assert (size, source) == (6.0, "DefMemPerCPU of cpu: cluster.mem_gb asks for more, shared by 2")


def test_nodes_that_are_too_small_for_the_request_are_not_meant(slurm: FakeSlurm) -> None:
    slurm.set(node_kinds=["mixed*|1|4|4096|(null)|(null)", "mixed*|1|64|65536|(null)|(null)"])
    assert memory_of(cpus_per_process=2)[0] == 4.0
    assert memory_of(cpus_per_process=16)[0] == 64.0


def test_what_nobody_says_is_unknown_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    size, source = memory_of()
    assert size is None
    assert "no sinfo on this machine" in source
    assert "cluster.mem_gb=" in source


def test_a_controller_that_is_away_is_told(slurm: FakeSlurm) -> None:
    slurm.set(modes={"sinfo": ["away"], "scontrol": ["away"]})
    assert "Unable to contact slurm controller" in memory_of()[1]


def gpu_of(**cluster: object) -> tuple[str, float | None, dict[str, str]]:
    values = {"kind": "slurm", "gpus_per_node": 8, "processes_per_node": 8, **cluster}
    found = hardware.of(tiny_spec(**{f"cluster__{key}": value for key, value in values.items()}))
    size = found.device.memory_bytes
    return found.device.name, None if size is None else round(size / GIB, 1), found.sources


def test_gpus_are_what_the_config_says() -> None:
    assert gpu_of(gpu="h100")[:2] == ("H100", 79.6)
    assert gpu_of(gpu="a100", gpu_mem_gb=80)[:2] == ("A100 80GB", 80.0)
    name, size, sources = gpu_of(partition="p", partitions={"p": {"gpu": "l40s"}})
    assert (name, size) == ("L40S", 45.0)
    assert sources["device"] == "cluster.partitions.p.gpu"
    assert gpu_of(gpus_per_node=0, gres="gpu:v100:8")[0] == "V100"


def test_gpus_are_what_slurm_says_and_of_several_the_smallest(slurm: FakeSlurm) -> None:
    name, size, sources = gpu_of(partition="gpu")
    assert (name, size) == ("A100", 40.0)
    assert sources["device"] == "sinfo (gres types)"
    assert gpu_of(partition="gpu", constraint="fast")[0] == "H100"
    assert len(slurm.calls("sinfo")) == 1


def test_a_slice_of_a_gpu_has_its_own_memory(slurm: FakeSlurm) -> None:
    name, size, _ = gpu_of(partition="slices")
    assert size is not None
    assert size < 20
    assert name == "A100"


def test_of_an_unnamed_gpu_no_memory_is_claimed_and_its_rates_are_called_assumed(slurm: FakeSlurm) -> None:
    name, size, sources = gpu_of()
    assert (name, size) == ("GPU", None)
    assert sources["rates"].startswith("assumed")
    assert "Slurm names no type" in sources["device"]


def test_an_unknown_gpu_is_a_fault_unless_its_memory_is_told() -> None:
    spec = tiny_spec(cluster__gpu="h1000", cluster__partitions={"p": {"gpu": "zzz", "gpu_mem_gb": 8}})
    (fault,) = hardware.faults(spec.cluster)
    assert (fault.key, fault.value, fault.fix) == ("cluster.gpu", "h1000", "cluster.gpu=h100")
    assert "A100 80GB" in fault.allowed


def test_this_machines_gpu_is_asked_of_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "nvidia-smi"
    driver.write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559, 1559'\necho 'NVIDIA H100 80GB HBM3, 81559, 0'\n"
    )
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = hardware.of(tiny_spec(cluster__gpus_per_node=1))
    assert found.device.name == "H100"
    assert found.device.memory_bytes == 80000 * devices.MIB
    assert found.sources["memory"] == "nvidia-smi: free now of 79.6 GiB"


def test_this_machines_memory_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free, "here", lambda: free.Memory(available_bytes=6 * GIB, limit_bytes=8 * GIB))
    found = hardware.of(tiny_spec(cluster__processes_per_node=2))
    assert found.device.memory_bytes == 3 * GIB
    assert found.sources["memory"] == "free now on this machine of 8.0 GiB, shared by 2"
    less = hardware.of(tiny_spec(cluster__mem_gb=4))
    assert (less.device.memory_bytes, less.sources["memory"]) == (4 * GIB, "cluster.mem_gb")
    assert hardware.of(tiny_spec(cluster__mem_gb=64)).device.memory_bytes == 6 * GIB
