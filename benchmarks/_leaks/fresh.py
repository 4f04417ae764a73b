"""Cases that were written after the detector's rules but the last one, and weren't looked at for any of them."""

from __future__ import annotations

import heapq
import logging
import logging.handlers
import os
import random
import subprocess
import tempfile
import zlib

from leaking import libc
from work import KIB, MIB, STEPS, Cases, case, fill

LEAKS: Cases = {}
HEALTHY: Cases = {}


@case(LEAKS, 6.3 * KIB)
def records_never_flushed(loop):
    handler = logging.handlers.MemoryHandler(capacity=10**9, flushLevel=logging.CRITICAL + 1)
    while True:
        record = logging.LogRecord("x", logging.INFO, "x", 1, f"{loop.step:05}" * 1100, (), None)  # LEAK
        handler.emit(record)
        yield


@case(LEAKS, 40 * KIB)
def views_of_large_arrays(loop):
    import numpy as np

    kept = []
    while True:
        kept.append(np.full(5 * KIB, 1.5)[:10])  # LEAK
        yield


@case(LEAKS, 3 * KIB)
def strdup_in_c(loop):
    while True:
        libc.strdup(b"x" * 3 * KIB)
        yield


@case(LEAKS, 8.5 * KIB)
def hooks_on_a_parameter(loop):
    import torch

    weight = torch.nn.Parameter(torch.ones(8, 8))
    while True:
        buffer = bytearray(8 * KIB)  # LEAK
        weight.register_hook(lambda grad, buffer=buffer: grad)
        yield


@case(LEAKS, 10.3 * KIB)
def generators_left_open(loop):
    started = []

    def reads():
        buffer = bytearray(10 * KIB)  # LEAK
        while True:
            yield len(buffer)

    while True:
        started.append(reads())
        next(started[-1])
        yield


@case(LEAKS, 4 * KIB)
def sets_of_numbers(loop):
    seen = set()
    while True:
        for number in range(64):
            seen.add(1000 * loop.step + number)  # LEAK
        yield


@case(HEALTHY)
def compression(loop):
    noise = random.randbytes(2 * MIB)
    while True:
        zlib.compress(noise[: random.randrange(1000, 60_000)], 1)
        yield


@case(HEALTHY)
def lines_written_to_a_file(loop):
    with tempfile.TemporaryFile(dir=os.environ.get("LEAKS_TMP")) as file:
        while True:
            file.write(b"x" * 8 * KIB)
            yield


@case(HEALTHY)
def best_of_all(loop):
    best = []
    while True:
        heapq.heappush(best, (random.random(), loop.step, fill(60 * KIB)))
        if len(best) > 300:
            heapq.heappop(best)
        yield


@case(HEALTHY)
def batches_that_grow_for_a_third(loop):
    while True:
        kept = [fill(100 * KIB) for _ in range(1 + int(200 * min(1.0, 3 * loop.step / STEPS)))]
        del kept
        yield


@case(HEALTHY)
def programs_now_and_then(loop):
    while True:
        if loop.step % 200 == 0:
            subprocess.run(["true"], check=True)
        fill(MIB // 2)
        yield


@case(HEALTHY)
def gradients_over_some_steps(loop):
    import torch

    weight = torch.nn.Parameter(torch.ones(256, 256))
    total = torch.zeros(())
    while True:
        total = total + (torch.randn(8, 256) @ weight).tanh().sum()
        if loop.step % 16 == 0:
            total.backward()
            weight.grad, total = None, torch.zeros(())
        yield
