"""The table of devices: names as Slurm and drivers have them, rates, and how a calibration is applied."""

from __future__ import annotations

import pytest

from hpcdl.plan import devices
from hpcdl.plan.records import Hardware

CPUINFO = """processor\t: 0
model name\t: A Processor
cpu MHz\t\t: 3000.000
flags\t\t: fpu sse2 avx2 {more}
"""


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("a100", "A100"),
        ("nvidia_a100-sxm4-80gb", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("nvidia_a100_80gb_pcie", "A100 80GB PCIe"),
        ("nvidia_h100_80gb_hbm3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("gh200", "GH200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx3090", "RTX 3090"),
        ("tesla_v100-sxm2-16gb", "V100 16GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA A10G", "A10G"),
        ("mi300x", "MI300X"),
        ("NVIDIA GeForce GTX 1080", None),
        ("gpu", None),
    ],
)
def test_gpus_by_the_names_that_others_give_them(name: str, known: str | None) -> None:
    found = devices.gpu(name)
    assert (found and found.name) == known
    assert devices.peak_bf16(name) == (found and found.bf16)


def test_of_two_forms_the_smaller() -> None:
    """A plan must not promise memory that isn't there."""
    small, large = devices.gpu("a100"), devices.gpu("a100 80gb")
    assert small and large and small.mib < large.mib


@pytest.mark.parametrize("line", devices.GPUS, ids=lambda line: line.name)
def test_what_is_reached_is_less_than_the_sheet_says(line: devices.Gpu) -> None:
    device, links = devices.of_gpu(line), devices.links_of(line)
    assert device.kind == "cuda" and device.memory_bytes == line.mib * 2**20
    assert all(0 < share < 1 for share in device.efficiency.values())
    assert device.memory_bytes_per_s < line.bandwidth
    assert links.between_bytes_per_s < links.inside_bytes_per_s < line.inside
    assert devices.gpu(line.name) is line


def test_a_processor_by_its_flags() -> None:
    plain = devices.read_cpu(cores=4, text=CPUINFO.format(more=""))
    wide = devices.read_cpu(cores=4, text=CPUINFO.format(more="avx512f avx512_bf16"))
    assert (plain.lanes, plain.bf16, wide.lanes, wide.bf16) == (8, False, 16, True)
    assert plain.hertz == 3e9 and plain.name == "A Processor"

    def bf16(cpu: devices.Cpu) -> float:
        device = devices.of_cpu(cpu, threads=1, ranks_per_node=1)
        return device.peak_flops["bf16"] * device.efficiency["bf16"]

    assert bf16(wide) > 4 * bf16(plain)  # without instructions for it torch takes long ways


def test_processes_share_cores() -> None:
    cpu = devices.read_cpu(cores=4, text=CPUINFO.format(more=""))
    alone, four, eight = (devices.of_cpu(cpu, threads=0, ranks_per_node=n) for n in (1, 4, 8))
    assert alone.peak_flops["fp32"] == 4 * four.peak_flops["fp32"]
    assert (alone.share, four.share, eight.share) == (1.0, 1.0, 0.5)


def test_what_finished_runs_have_shown() -> None:
    line = devices.GPUS[0]
    before = Hardware(
        device=devices.of_gpu(line),
        links=devices.links_of(line),
        ranks_per_node=8,
        nodes=2,
        sources={"a": "b"},
    )
    found = devices.Calibration(
        flops=0.5, bandwidth=2.0, operation=3.0, inside=0.25, between=0.5, latency=4.0
    )
    after = devices.calibrated(before, found, "12 runs")
    assert after.device.efficiency["bf16"] == before.device.efficiency["bf16"] / 2
    assert (
        after.device.efficiency["attention"] == before.device.efficiency["attention"]
    )  # a share of the others
    assert after.device.memory_bytes_per_s == 2 * before.device.memory_bytes_per_s
    assert after.device.operation_s == 3 * before.device.operation_s
    assert after.links.inside_bytes_per_s == before.links.inside_bytes_per_s / 4
    assert after.links.between_latency_s == 4 * before.links.between_latency_s
    assert after.sources == {"a": "b", "rates": "12 runs"}
    assert devices.calibrated(before, devices.Calibration(), "none").device == before.device
