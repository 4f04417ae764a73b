"""Devices that a run is planned for: what their makers say of them, and what of it is reached in training.

Peaks are dense, without sparsity. Sources of a GPU's figures, unless its line says otherwise:
- FLOP/s, bandwidth, NVLink: NVIDIA's data sheet of that GPU.
- memory: what NVML reports, not the name's gigabytes (thundergolfer.com/blog/nvidia-gpu-memory-capacity, 2025:
  H200 143,771 MiB, H100 81,559, A100 81,920 and 40,960, A10 23,028, L40S 46,068, L4 23,034, T4 15,360).
- matrix products reached: Stas Bekman, "Machine Learning Engineering", table of maximum achievable matmul FLOPS
  (A100 SXM 267.9 of 312 TFLOP/s, PCIe 256.4; H100 SXM 794.5 of 989; B200 1,745 of 2,250), and SemiAnalysis, "MI300X vs
  H100 vs H200 Benchmark, Part 1: Training", 2024, for shapes of language models (H100 and H200 720 TFLOP/s: 0.91 of the
  best shape's, which is taken for the A100 too).
- attention reached: Dao, "FlashAttention-2", 2023, figures 4 to 6 (A100, causal, heads of 128, 8k tokens: about 190 of
  312 TFLOP/s forward and 165 backward), and Shah et al., "FlashAttention-3", 2024, figures 5 and 6, for its forerunner
  on an H100 (about 340 and 300 of 989); torch's SDPA has FlashAttention-2. For other GPUs an estimate.
- bandwidth reached: 0.9 of the sheet's for long copies, the rule of `nvbandwidth` and BabelStream on HBM.
- links reached: `busbw` of nccl-tests for large messages: about 0.8 of NVLink's one direction, 0.75 of PCIe's; between
  nodes 0.85 of the network that the maker's own servers have for a GPU (DGX A100: 200 Gb/s, DGX H100: 400 Gb/s).
A site's own figures go before: `cluster.gpu_mem_gb`, and what `hpcdl plan --calibrate` has fitted to finished runs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from hpcdl.plan.records import Device, Hardware, Links

GB = 1e9
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One line of the table."""

    name: str
    """As people call it; all its words must be in what Slurm or the driver calls it."""
    mib: int
    """Memory, in MiB."""
    fp32: float
    """Peak FLOP/s outside of tensor cores: torch's default for fp32 matrices."""
    bf16: float
    """Peak FLOP/s of tensor cores; of GPUs older than Ampere fp16's."""
    reached: float
    """Of `bf16` what matrix products of a language model's shapes reach."""
    bandwidth: float
    """Bytes/s of the memory, as its sheet says."""
    inside: float
    """Bytes/s to another GPU of the node, one direction: NVLink's, or PCIe's."""
    between: float
    """Bytes/s to another node that a GPU has for itself in a usual server."""


NVLINK_REACHED, PCIE_REACHED, NETWORK_REACHED, BANDWIDTH_REACHED = 0.8, 0.75, 0.85, 0.9
FP32_REACHED = 0.85
ATTENTION_REACHED = {
    "V100": 0.05,
    "T4": 0.05,
    "A100": 0.55,
    "H100": 0.32,
    "H200": 0.32,
    "GH200": 0.32,
    "B200": 0.2,
}
"""Of the bf16 peak what SDPA's causal kernels reach, forward and backward together."""
PCIE3, PCIE4 = 15.8 * GB, 31.5 * GB
"""x16, one direction."""

GPUS = (
    # V100 has no bf16: such products run outside its tensor cores, at fp32's rate. Data sheet, SXM2.
    Gpu(name="V100", mib=32768, fp32=15.7e12, bf16=125e12, reached=0.11, bandwidth=900 * GB, inside=150 * GB,
        between=12.5 * GB),
    Gpu(name="V100 16GB", mib=16160, fp32=15.7e12, bf16=125e12, reached=0.11, bandwidth=900 * GB,
        inside=150 * GB, between=12.5 * GB),
    # nor has T4; 70 W: it keeps to about 4 of its 8.1 TFLOP/s
    Gpu(name="T4", mib=15360, fp32=8.1e12, bf16=65e12, reached=0.06, bandwidth=320 * GB, inside=PCIE3,
        between=6.25 * GB),
    # AWS's A10G has 70 TFLOP/s where NVIDIA's A10 has 125 (AWS's announcement of g5, 2021; A10's data sheet)
    Gpu(name="A10G", mib=23028, fp32=31.5e12, bf16=70e12, reached=0.8, bandwidth=600 * GB, inside=PCIE4,
        between=6.25 * GB),
    Gpu(name="A10", mib=23028, fp32=31.2e12, bf16=125e12, reached=0.55, bandwidth=600 * GB, inside=PCIE4,
        between=6.25 * GB),
    Gpu(name="A30", mib=24576, fp32=10.3e12, bf16=165e12, reached=0.7, bandwidth=933 * GB, inside=PCIE4,
        between=12.5 * GB),
    Gpu(name="A40", mib=46068, fp32=37.4e12, bf16=150e12, reached=0.65, bandwidth=696 * GB, inside=PCIE4,
        between=12.5 * GB),
    # An `a100` that doesn't say which is taken for the smaller: a plan must not promise what isn't there.
    Gpu(name="A100", mib=40960, fp32=19.5e12, bf16=312e12, reached=0.78, bandwidth=1555 * GB, inside=300 * GB,
        between=25 * GB),
    Gpu(name="A100 80GB", mib=81920, fp32=19.5e12, bf16=312e12, reached=0.78, bandwidth=2039 * GB,
        inside=300 * GB, between=25 * GB),
    Gpu(name="A100 PCIe", mib=40960, fp32=19.5e12, bf16=312e12, reached=0.75, bandwidth=1555 * GB, inside=PCIE4,
        between=12.5 * GB),
    Gpu(name="A100 80GB PCIe", mib=81920, fp32=19.5e12, bf16=312e12, reached=0.75, bandwidth=1935 * GB,
        inside=PCIE4, between=12.5 * GB),
    Gpu(name="L4", mib=23034, fp32=30.3e12, bf16=121e12, reached=0.5, bandwidth=300 * GB, inside=PCIE4 / 2,
        between=6.25 * GB),
    Gpu(name="L40", mib=46068, fp32=90.5e12, bf16=181e12, reached=0.8, bandwidth=864 * GB, inside=PCIE4,
        between=12.5 * GB),
    Gpu(name="L40S", mib=46068, fp32=91.6e12, bf16=362e12, reached=0.65, bandwidth=864 * GB, inside=PCIE4,
        between=12.5 * GB),
    # GeForce: half the tensor rate where sums are in fp32 (GA102 and AD102 architecture papers, appendix A)
    Gpu(name="RTX 3090", mib=24576, fp32=35.6e12, bf16=71e12, reached=0.85, bandwidth=936 * GB, inside=PCIE4,
        between=1.25 * GB),
    Gpu(name="RTX 4090", mib=24564, fp32=82.6e12, bf16=165e12, reached=0.9, bandwidth=1008 * GB, inside=PCIE4,
        between=1.25 * GB),
    Gpu(name="H100 PCIe", mib=81559, fp32=51e12, bf16=756e12, reached=0.6, bandwidth=2000 * GB, inside=PCIE4 * 2,
        between=25 * GB),
    Gpu(name="H100 NVL", mib=95830, fp32=60e12, bf16=835e12, reached=0.65, bandwidth=3900 * GB, inside=300 * GB,
        between=25 * GB),
    Gpu(name="H100", mib=81559, fp32=67e12, bf16=989e12, reached=0.73, bandwidth=3350 * GB, inside=450 * GB,
        between=50 * GB),
    Gpu(name="H200", mib=143771, fp32=67e12, bf16=989e12, reached=0.73, bandwidth=4800 * GB, inside=450 * GB,
        between=50 * GB),
    # the 96 GB form: the smaller of two
    Gpu(name="GH200", mib=97871, fp32=67e12, bf16=989e12, reached=0.75, bandwidth=4000 * GB, inside=450 * GB,
        between=50 * GB),
    # DGX B200's sheet: 1.44 TB for 8. Shapes of language models: 1,448–1,562 TFLOP/s (arXiv:2604.23466)
    Gpu(name="B200", mib=183359, fp32=75e12, bf16=2250e12, reached=0.67, bandwidth=7700 * GB, inside=900 * GB,
        between=50 * GB),
    # AMD's data sheets; reached: ROCm blog, "Measuring Max-Achievable FLOPs, Part 2", 2025: 708 of 1,307
    Gpu(name="MI250", mib=65536, fp32=45.3e12, bf16=181e12, reached=0.75, bandwidth=1638 * GB, inside=50 * GB,
        between=12.5 * GB),
    Gpu(name="MI300X", mib=196592, fp32=163e12, bf16=1307e12, reached=0.5, bandwidth=5300 * GB, inside=64 * GB,
        between=50 * GB),
)  # fmt: skip
"""The known ones. Of an MI250 a rank has one of the two dies."""

OPERATION_S = {"cuda": 6e-6, "cpu": 12e-6}
"""Of Python and torch for one operation, forward or backward: on a GPU the host's time to launch a kernel. Measured
on one core of a Zen 4: 4 µs for an operation alone, 10 to 19 inside of transformers' modules."""
LATENCY_S = {"inside": 6e-6, "between": 15e-6}
"""Of a hop of an NCCL collective: nccl-tests' small messages over NVLink (about 20 µs, 8 GPUs) and InfiniBand."""


def gpu(name: str) -> Gpu | None:
    """The line that fits what Slurm (`nvidia_h100_80gb_hbm3`), a driver or a person calls a GPU; None: not known.

    The line with most words in common wins: `NVIDIA H100 80GB HBM3` is an H100, no `H100 PCIe`.
    """
    words = set(re.findall(r"[a-z]+\d+[a-z]*|\d+gb|\d+|[a-z]+", name.lower().replace("rtx", " rtx ")))
    fitting = [line for line in GPUS if set(line.name.lower().split()) <= words]
    return max(fitting, key=lambda line: (len(line.name.split()), len(line.name)), default=None)


def peak_bf16(name: str) -> float | None:
    """A GPU's dense FLOP/s of tensor cores, by the name that its driver gives it; None: not known."""
    found = gpu(name)
    return None if found is None else found.bf16


def of_gpu(line: Gpu, memory_bytes: int | None = None) -> Device:
    """What a rank computes on.

    Args:
        line: of the table.
        memory_bytes: where somebody knows it better.
    """
    attention = ATTENTION_REACHED.get(line.name.split()[0], 0.45)
    return Device(
        name=line.name,
        kind="cuda",
        memory_bytes=memory_bytes or line.mib * MIB,
        peak_flops={"fp32": line.fp32, "bf16": line.bf16},
        efficiency={"fp32": FP32_REACHED, "bf16": line.reached, "attention": attention / line.reached},
        memory_bytes_per_s=line.bandwidth * BANDWIDTH_REACHED,
        operation_s=OPERATION_S["cuda"],
    )


def links_of(line: Gpu) -> Links:
    """What connects such GPUs in a usual server."""
    reached = NVLINK_REACHED if line.inside > 2 * PCIE4 else PCIE_REACHED
    return Links(
        inside_bytes_per_s=line.inside * reached,
        between_bytes_per_s=line.between * NETWORK_REACHED,
        inside_latency_s=LATENCY_S["inside"],
        between_latency_s=LATENCY_S["between"],
    )


# --- CPUs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """A node's processor, as the plan needs it."""

    name: str
    """As /proc/cpuinfo has it."""
    cores: int
    """That ranks may use."""
    hertz: float
    """A core's clock."""
    lanes: int
    """fp32 numbers that one instruction multiplies and adds: 16 (AVX-512), 8 (AVX2), 4."""
    bf16: bool
    """Whether it has instructions for bf16 products."""


CPU_UNITS = 2
"""Multiply-add units of a core, of 8 lanes each on AVX2; with AVX-512 as many lanes in all on Zen 4, twice on Xeons."""
CPU_REACHED = {"fp32": 0.9, "bf16": 0.6, "attention": 0.7}
"""oneDNN's products on one core of a Zen 4 at 2.6 GHz, measured: 76–91 GFLOP/s in fp32, 170–187 in bf16, of
which less is left in training, where operands change."""
CPU_BYTES_PER_S = 9 * GB
"""A core's, of operations that each make a new tensor: pages that malloc has to get anew are in it. Measured with the
blocks of a Llama of width 128 to 512; several cores share what the sockets have."""
LOOPBACK = Links(
    inside_bytes_per_s=1.0 * GB, between_bytes_per_s=0.1 * GB, inside_latency_s=60e-6, between_latency_s=150e-6
)  # fmt: skip
"""gloo between processes of a machine, and over a network of 1 Gb/s; the prior of a calibration."""


def read_cpu(cores: int | None = None, text: str | None = None) -> Cpu:
    """This machine's processor: a prior for nodes that nobody has measured.

    Args:
        cores: that ranks may use, where that is known; else the ones that this process may.
        text: of /proc/cpuinfo; None: this machine's.
    """
    if text is None:
        try:
            text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        except OSError:
            text = ""
    said = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", text, re.MULTILINE))
    flags = set(said.get("flags", "").split())
    lanes = 16 if "avx512f" in flags else 8 if "avx2" in flags else 4
    return Cpu(
        name=said.get("model name", "cpu"),
        cores=cores or len(os.sched_getaffinity(0)),
        hertz=1e6 * float(said.get("cpu MHz", 2500)),
        lanes=lanes,
        bf16=bool(flags & {"avx512_bf16", "amx_bf16"}),
    )


def of_cpu(cpu: Cpu, *, threads: int, ranks_per_node: int, memory_bytes: int | None = None) -> Device:
    """What a rank with so many threads computes on, beside the node's other ranks.

    Args:
        cpu: the node's.
        threads: of a rank; 0: the cores shared evenly.
        ranks_per_node: processes on the node.
        memory_bytes: that a rank may have.
    """
    threads = threads or max(1, cpu.cores // ranks_per_node)
    used = min(threads, cpu.cores)
    # Zen 4 splits a 512-bit instruction in two halves; what Xeons gain above it, they lose in clock.
    fp32 = used * cpu.hertz * 2 * CPU_UNITS * min(cpu.lanes, 8)
    return Device(
        name="cpu",
        kind="cpu",
        memory_bytes=memory_bytes,
        peak_flops={"fp32": fp32, "bf16": 2 * fp32 if cpu.bf16 else fp32},
        efficiency=dict(CPU_REACHED) if cpu.bf16 else {**CPU_REACHED, "bf16": 0.1},
        memory_bytes_per_s=CPU_BYTES_PER_S * min(used, 4),
        operation_s=OPERATION_S["cpu"],
        share=min(1.0, cpu.cores / (ranks_per_node * used)),
    )


# --- calibration ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Factors that finished runs have shown, each against the table or the prior: 1 is as planned."""

    flops: float = 1.0
    """Of the FLOP/s reached in matrix products."""
    bandwidth: float = 1.0
    """Of the memory's bandwidth reached."""
    operation: float = 1.0
    """Of the seconds of an operation."""
    inside: float = 1.0
    """Of the bytes/s between ranks of a node."""
    between: float = 1.0
    """Of the bytes/s between nodes."""
    latency: float = 1.0
    """Of the seconds of a hop, inside and between."""


def calibrated(hardware: Hardware, found: Calibration, source: str) -> Hardware:
    """The hardware with what finished runs have shown of it.

    Args:
        hardware: by the table.
        found: the factors.
        source: how many runs, of when: told beside the figures.
    """
    device, links = hardware.device, hardware.links
    return replace(
        hardware,
        device=replace(
            device,
            efficiency={
                name: value if name == "attention" else value * found.flops
                for name, value in device.efficiency.items()
            },
            memory_bytes_per_s=device.memory_bytes_per_s * found.bandwidth,
            operation_s=device.operation_s * found.operation,
        ),
        links=Links(
            inside_bytes_per_s=links.inside_bytes_per_s * found.inside,
            between_bytes_per_s=links.between_bytes_per_s * found.between,
            inside_latency_s=links.inside_latency_s * found.latency,
            between_latency_s=links.between_latency_s * found.latency,
        ),
        sources={**hardware.sources, "rates": source},
    )
