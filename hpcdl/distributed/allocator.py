"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes

M_MMAP_THRESHOLD = -3
MMAPPED_BYTES = 2**20
"""Memory of this size and above is the kernel's own to take back: mallopt(3)."""


def keep_no_holes() -> None:
    """Has the C library give large tensors' memory back at once, instead of keeping it for later ones (glibc only).

    What it keeps of those below 32 MiB, in pieces that fit nothing, was seen to grow to 0.4 GiB under QLoRA and to
    4 GiB where an 8B's layers pass through.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, MMAPPED_BYTES)
        libc.malloc_trim(0)
