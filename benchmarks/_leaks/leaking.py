"""Runs that leak. A generator each: what a step does, up to its yield.

The first list was looked at while the detector was made; the second one (HELD_OUT) when it was done, and one rule
came of that. A third one is in fresh.py.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import gc
import io
import mmap
import queue
import random

from work import KIB, MIB, STEPS, Cases, case, fill, worker

LEAKS: Cases = {}
HELD_OUT: Cases = {}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.strdup.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def c_bytes(size: int) -> None:
    """Nobody will free them."""
    libc.memset(libc.malloc(size), 1, size)


@case(LEAKS, 3.9 * KIB)
def list_of_floats(loop):
    history = []
    while True:
        history.append([random.random() for _ in range(125)])  # LEAK
        yield


@case(LEAKS, 64 * KIB)
def list_of_buffers(loop):
    kept = []
    while True:
        kept.append(fill(64 * KIB))  # LEAK
        yield


@case(LEAKS, 2 * KIB)
def dict_by_step(loop):
    seen = {}
    while True:
        seen[loop.step] = str(loop.step) * (2 * KIB // len(str(loop.step)))  # LEAK
        yield


@case(LEAKS, 16 * KIB)
def numpy_arrays(loop):
    import numpy as np

    kept = []
    while True:
        kept.append(np.ones(2 * KIB))  # LEAK
        yield


@case(LEAKS, 4 * KIB)
def malloc_in_c(loop):
    while True:
        c_bytes(4 * KIB)
        yield


@case(LEAKS, 16 * KIB)
def mmap_in_c(loop):
    kept = []
    while True:
        kept.append(mmap.mmap(-1, 16 * KIB))  # LEAK
        kept[-1][:] = bytes(16 * KIB)
        yield


@case(LEAKS, 8.5 * KIB)
def losses_with_their_graphs(loop):
    import torch

    weight = torch.ones(32, 32, requires_grad=True)
    losses = []
    while True:
        losses.append((torch.randn(16, 32) @ weight).tanh().sum())  # LEAK
        yield


@case(LEAKS, 8 * KIB)
def tensors(loop):
    import torch

    kept = []
    while True:
        kept.append(torch.ones(2 * KIB))  # LEAK
        yield


@case(LEAKS, 12 * KIB)
def loader_worker(loop):
    one = worker(_remember)
    while True:
        one.ask(loop.step)
        yield


def _remember(requests):
    kept = []
    for _ in requests:
        kept.append(fill(12 * KIB))  # LEAK
        yield 0


@case(LEAKS, KIB)
def slow(loop):
    kept = []
    while True:
        kept.append(bytearray(KIB))  # LEAK
        yield


@case(LEAKS, 5 * KIB)
def in_evaluations(loop):
    kept = []
    while True:
        if loop.step % 100 == 0:
            with loop.during("evaluation"):
                kept.append(fill(512 * KIB))  # LEAK
                loop.sleep(0.02)
        yield


@case(LEAKS, 6 * KIB)
def after_a_warm_up(loop):
    cache, kept = [], []
    while True:
        if loop.step < 200:
            cache.append(fill(300 * KIB))
        kept.append(bytearray(6 * KIB))  # LEAK
        yield


@case(LEAKS, 5.2 * KIB)
def cycles_without_a_collector(loop):
    class Node:
        pass

    gc.disable()
    while True:
        node = Node()
        node.itself, node.data = node, bytearray(5 * KIB)  # LEAK
        yield


@case(LEAKS, 10 * KIB)
def below_a_saw_tooth(loop):
    kept, teeth = [], []
    while True:
        kept.append(bytearray(10 * KIB))  # LEAK
        teeth.append(fill(150 * KIB))
        if len(teeth) == 70:
            teeth.clear()
        yield


@case(LEAKS, 3.3 * KIB)
def hooks(loop):
    registered = []
    while True:
        state = {f"key{i}": i * 1.5 for i in range(30)}  # LEAK
        registered.append(lambda state=state: state)
        yield


@case(HELD_OUT, 20 * KIB)
def cache_without_a_bound(loop):
    make = functools.cache(lambda key: bytearray(20 * KIB))  # LEAK
    while True:
        make(loop.step)
        yield


@case(HELD_OUT, 7 * KIB)
def queue_that_nobody_reads(loop):
    results = queue.Queue()
    while True:
        results.put(bytearray(7 * KIB))  # LEAK
        yield


@case(HELD_OUT, 3 * KIB)
def text_that_grows(loop):
    log = io.StringIO()
    while True:
        log.write(f"{loop.step:06}" * 512)  # LEAK
        yield


@case(HELD_OUT, 32 * KIB)
def exceptions_with_their_frames(loop):
    errors = []

    def fails():
        local = bytearray(32 * KIB)  # LEAK
        raise ValueError(len(local))

    while True:
        try:
            fails()
        except ValueError as error:
            errors.append(error)
        yield


@case(HELD_OUT, 4.1 * KIB)
def small_pieces_in_c(loop):
    while True:
        for _ in range(8):
            c_bytes(512)
        yield


@case(HELD_OUT, 9.5 * KIB)
def loss_summed_with_its_graph(loop):
    import torch

    weight = torch.ones(32, 32, requires_grad=True)
    total = torch.zeros(())
    while True:
        total = total + (torch.randn(16, 32) @ weight).tanh().sum()  # LEAK
        yield


@case(HELD_OUT, 24 * KIB)
def from_a_third_on(loop):
    kept = []
    while True:
        if loop.step > STEPS * 0.3:
            kept.append(bytearray(24 * KIB))  # LEAK
        yield


@case(HELD_OUT, 12.8 * KIB)
def in_checkpoints(loop):
    kept = []
    while True:
        if loop.step % 80 == 0:
            with loop.during("checkpoint"):
                kept.append(fill(MIB))  # LEAK
                spike = [fill(MIB) for _ in range(20)]
                loop.sleep(0.02)
                del spike
        yield


@case(HELD_OUT, 8 * KIB)
def faster_and_faster(loop):
    copies = []
    while True:
        copies.append([0.0] * loop.step)  # LEAK
        yield


@case(HELD_OUT, 8 * KIB)
def below_noise(loop):
    kept = []
    while True:
        kept.append(bytearray(8 * KIB))  # LEAK
        noise = fill(random.randrange(1, 8 * MIB))
        yield
        del noise


@case(HELD_OUT, 6.4 * KIB)
def every_tenth_step(loop):
    kept = []
    while True:
        if loop.step % 10 == 0:
            kept.append(fill(64 * KIB))  # LEAK
        yield


@case(HELD_OUT, 8 * KIB)
def two_loader_workers(loop):
    both = [worker(_remember_some), worker(_remember_some)]
    while True:
        both[loop.step % 2].ask(loop.step)
        yield


def _remember_some(requests):
    kept = {}
    for number in requests:
        kept[number] = bytearray(8 * KIB)  # LEAK
        yield 0


@case(HELD_OUT, 2.9 * KIB)
def losses_by_sample(loop):
    history = collections.defaultdict(list)
    while True:
        for _ in range(90):
            history[random.randrange(500)].append(random.random())  # LEAK
        yield


@case(HELD_OUT, 5 * KIB)
def files_in_memory(loop):
    files = []
    while True:
        files.append(io.BytesIO(bytes(5 * KIB)))  # LEAK
        yield


@case(HELD_OUT, 16 * KIB)
def parameters_that_are_added(loop):
    import torch

    model = torch.nn.Module()
    while True:
        model.register_parameter(f"extra{loop.step}", torch.nn.Parameter(torch.ones(4 * KIB)))  # LEAK
        yield


@case(HELD_OUT, 200 * KIB)
def fast(loop):
    kept = []
    while True:
        kept.append(fill(200 * KIB))  # LEAK
        yield
