"""What a process holds beside its tensors: libraries, a GPU's context, what allocators keep.

On a CPU: measured on Linux with torch 2.13 (its CPU build), transformers 5.23 and peft 0.21. On a GPU: the context
and the libraries' own buffers lie outside of torch's allocator.
"""

from __future__ import annotations

MIB = 2**20

PROCESS = 480 * MIB
"""Resident memory of a worker before its model: Python, torch for CPUs, transformers, peft, numpy and what they map."""
GLOO = 16 * MIB
"""Of a worker in a group: gloo's threads, pairs and their buffers, the store's client, what sharding imports."""
CONTEXT = 550 * MIB
"""CUDA's context with torch's kernels loaded: 400 to 550 MiB on A100 and H100 (nvidia-smi less
torch.cuda.memory_reserved; huggingface.co/docs/transformers/model_memory_anatomy tells 1.3 GB of an older one,
kernels of which are loaded lazily since CUDA 11.7)."""
CUBLAS = 32 * MIB + 1 * MIB
"""cuBLAS's workspace on Hopper, 8 MiB elsewhere, within torch's allocator (CUBLAS_WORKSPACE_CONFIG), and cuBLASLt's."""
NCCL = 400 * MIB
"""NCCL's channels: buffers of 4 MiB (NCCL_BUFFSIZE) a channel, peer and protocol, for the rings of some groups."""
FRAGMENTS = 0.04
"""Of a step's tensors, what a GPU's caching allocator reserves beyond them: blocks are rounded up to 2 MiB segments
and split (docs.pytorch.org/docs/stable/notes/cuda.html#memory-management)."""
CHUNKS = 0.02
"""Of a step's tensors, what malloc keeps beyond them in pieces too small to be given back."""
ARENA = 24 * MIB
"""What malloc's heap keeps whatever the tensors' size: below M_MMAP_THRESHOLD (32 MiB once it has grown) freed memory
is kept (mallopt(3))."""


def context(many: bool) -> int:
    """Bytes on a GPU outside of torch's allocator.

    Args:
        many: whether ranks talk.
    """
    return CONTEXT + (NCCL if many else 0)


def runtime(device: str, *, many: bool) -> int:
    """Bytes of the process beside tensors and what the allocator keeps.

    Args:
        device: `cpu` or `cuda`.
        many: whether ranks talk.
    """
    if device == "cuda":
        return context(many)
    return PROCESS + (GLOO if many else 0)


def allocator(device: str, tensors: float, with_inside: float, elsewhere: float) -> int:
    """Bytes beyond tensors at their peak.

    Args:
        device: `cpu` or `cuda`.
        tensors: of a step, at most.
        with_inside: the same with what operators take for themselves.
        elsewhere: what the process holds at most outside of steps: while it loads, or copies a checkpoint.
    """
    if device == "cuda":
        return round(with_inside - tensors + FRAGMENTS * with_inside + CUBLAS)
    return round(max(with_inside, elsewhere) - tensors + CHUNKS * max(with_inside, elsewhere) + ARENA)
