"""metrics.jsonl: what each step and evaluation measured; rank 0 writes it."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import resource
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdl.plan import devices
from hpcdl.runs.files import append_line, write_atomic
from hpcdl.runs.store import RunDir, now

if TYPE_CHECKING:
    import torch


_MARK = re.compile(rb"VmHWM:\s+(\d+) kB")


class Metrics:
    """Writes lines to metrics.jsonl; does nothing on other ranks than 0."""

    def __init__(self, run: RunDir, *, active: bool) -> None:
        self._run = run
        self._active = active
        self.evaluations: dict[int, dict[str, Any]] = {}
        """Evaluation lines by step, those of earlier tries included."""

    def rewind(self, step: int) -> None:
        """Drops what a lost try wrote after the checkpoint of `step`; evaluations of that step come again."""
        if not self._active:
            return
        lines = self._run.metrics()
        kept = [m for m in lines if m["step"] < step or (m["step"] == step and not is_evaluation(m))]
        self.evaluations = {m["step"]: m for m in kept if is_evaluation(m)}
        if len(kept) != len(lines) or lines:
            text = "".join(json.dumps(m, ensure_ascii=False) + "\n" for m in kept)
            write_atomic(self._run.metrics_file, text)

    def write(self, record: dict[str, Any]) -> None:
        """One line; `time` (UTC) is added."""
        if not self._active:
            return
        line = {**record, "time": now()}
        if is_evaluation(record):
            self.evaluations[record["step"]] = line
        append_line(self._run.metrics_file, line)
        print(in_words(record), flush=True)  # for who reads the log


def is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a line says what an evaluation measured: of a loss, a return, a reward."""
    return any(key.startswith("eval_") for key in record)


def in_words(record: dict[str, Any]) -> str:
    """A line of metrics.jsonl as a line of the log: `step 3  loss 2.7100  grad_norm 0.9  …`."""
    shown = (
        "loss",
        "ce_loss",
        "kl_loss",
        "eval_loss",
        "eval_perplexity",
        "eval_return",
        "eval_reward",
        "episode_return",
        "reward",
        "entropy",
        "kl",
        "grad_norm",
        "lr",
        "tokens_per_s",
        "env_steps_per_s",
        "comm_s",
        "comm_share",
    )
    words = [f"{key} {record[key]:.6g}" for key in shown if record.get(key) is not None]
    return "  ".join([f"step {record['step']}", *words])


def evaluation(step: int, loss: float) -> dict[str, Any]:
    """An evaluation's line. Perplexity: exp of the mean loss a target token."""
    return {"step": step, "eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory of this process: allocated on the GPU, or resident in RAM."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return resident_peak_bytes()


class Peak:
    """The process's highest memory, with what measuring needs left out."""

    held: int | None = None
    """What is said meanwhile."""
    before: int = 0
    """The highest before the kernel began anew."""

    @classmethod
    def hold(cls) -> None:
        """From here to `release` memory doesn't count."""
        if cls.held is None:
            cls.held = resident_peak_bytes()

    @classmethod
    def release(cls) -> None:
        """Gives freed memory back and has the kernel's mark begin anew (proc(5), clear_refs; Linux only)."""
        held, cls.held = cls.held, None
        if held is None:
            return
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # not this kernel: the mark stays where it is
        cls.before = max(cls.before, held)


def resident_peak_bytes() -> int:
    """Highest memory of this process in RAM (VmHWM, mapped files included).

    Not getrusage's ru_maxrss where /proc is there: it starts from torchrun's memory at the fork.
    """
    return Peak.held if Peak.held is not None else max(Peak.before, _kernels_mark())


def _kernels_mark() -> int:
    try:
        with open("/proc/self/status", "rb") as file:  # noqa: PTH123 a quicker one: each step asks
            text = file.read()
        if found := _MARK.search(text):
            return int(found[1]) * 1024
    except OSError:
        pass
    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def peak_flops(device: torch.device, *, bf16: bool) -> float | None:
    """The device's dense bf16 FLOP/s; None where it isn't known (CPUs, fp32, other GPUs): no guess."""
    if device.type != "cuda" or not bf16:
        return None
    import torch

    return devices.peak_bf16(torch.cuda.get_device_name(device))


def flops_per_token(parameters: int, trainable: int, layers: int, width: int, seq_len: int) -> float:
    """FLOPs of one training step a token: model FLOPs, recomputation left out.

    Forward 2 a parameter; backward 2 for the activations' gradient and 2 for each parameter that is
    trained; attention's scores and values 4·seq·width a layer forward, twice that backward, no discount for
    the causal mask. Source: Chowdhery et al., "PaLM", 2022, appendix B.
    """
    return 4.0 * parameters + 2.0 * trainable + 12.0 * layers * width * seq_len
