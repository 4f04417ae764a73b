"""Runs whose memory looks suspicious, and that don't leak. A generator each: what a step does, up to its yield.

The first list was looked at while the detector was made; the second one (HELD_OUT) when it was done, and one rule
came of that. A third one is in fresh.py.
"""

from __future__ import annotations

import collections
import functools
import gc
import math
import mmap
import os
import random
import tempfile
import threading

from work import KIB, MIB, STEPS, Cases, case, fill, worker

HEALTHY: Cases = {}
HELD_OUT: Cases = {}


@case(HEALTHY)
def flat(loop):
    while True:
        fill(MIB)
        yield


@case(HEALTHY)
def warm_up(loop):
    kept = []
    while True:
        if loop.step < STEPS // 10:
            kept.append(fill(400 * KIB))
        yield


@case(HEALTHY)
def cache_of_random_samples(loop):
    cache = {}
    while True:
        key = random.randrange(400)
        if key not in cache:
            cache[key] = fill(100 * KIB)
        yield


@case(HEALTHY)
def evaluation(loop):
    while True:
        if loop.step % 100 == 0:
            with loop.during("evaluation"):
                kept = [fill(MIB) for _ in range(30)]
                loop.sleep(0.05)
                del kept
        yield


@case(HEALTHY)
def checkpoint_in_the_background(loop):
    copies = []
    while True:
        if loop.step % 250 == 0:
            copies = [fill(MIB) for _ in range(60)]
        elif loop.step % 250 == 60:
            copies.clear()
        yield


@case(HEALTHY)
def mapped_data(loop):
    size = 64 * MIB
    with tempfile.TemporaryFile(dir=os.environ.get("LEAKS_TMP")) as file:
        file.truncate(size)
        for _ in range(size // MIB):
            file.write(os.urandom(MIB))
        file.flush()
        data = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        while True:
            at = loop.step * size // (STEPS + 1) // 4096 * 4096
            sum(data[at : at + 40 * KIB : 4096])
            yield


@case(HEALTHY)
def saw_tooth(loop):
    kept = []
    while True:
        kept.append(fill(64 * KIB))
        if len(kept) == 300:
            kept.clear()
        yield


@case(HEALTHY)
def buffer_that_doubles(loop):
    buffer, used = fill(256 * KIB), 0
    while True:
        used += 20 * KIB
        if used > len(buffer):
            buffer = fill(2 * len(buffer))
        yield


@case(HEALTHY)
def longer_sequences(loop):
    stages = (2, 6, 12, 24)
    while True:
        kept = [fill(MIB) for _ in range(stages[min(3, loop.step * 4 // STEPS)])]
        del kept
        yield


@case(HEALTHY)
def log_with_a_bound(loop):
    log = collections.deque(maxlen=600)
    while True:
        log.append(" ".join(str(random.random()) for _ in range(400)))
        yield


@case(HEALTHY)
def fragmentation(loop):
    live = {}
    while True:
        for _ in range(20):
            live[random.randrange(2000)] = bytes(int(10 ** random.uniform(1.5, 4.5)))
        yield


@case(HEALTHY)
def cycles_until_collected(loop):
    class Node:
        pass

    gc.set_threshold(5000, 5, 5)
    while True:
        for _ in range(10):
            node = Node()
            node.itself, node.data = node, bytearray(4 * KIB)
        yield


@case(HEALTHY)
def replay_buffer(loop):
    ring = collections.deque(maxlen=600)
    while True:
        ring.append(fill(50 * KIB))
        yield


@case(HEALTHY)
def work_that_varies(loop):
    kept = []
    while True:
        kept += [fill(64 * KIB) for _ in range(random.randrange(5))]
        del kept[: random.randrange(5) if len(kept) < 500 else 200]
        yield


@case(HEALTHY)
def loader_anew_each_epoch(loop):
    one = None
    while True:
        if loop.step % 200 == 1:
            if one is not None:
                one.close()
            one = worker(_grows_slowly)
        one.ask(loop.step)
        yield


def _grows_slowly(requests):
    kept = []
    for _ in requests:
        kept.append(fill(40 * KIB))
        yield 0


@case(HELD_OUT)
def lru_cache_with_a_bound(loop):
    make = functools.lru_cache(maxsize=256)(lambda key: fill(128 * KIB))
    while True:
        make(random.randrange(10_000))
        yield


@case(HELD_OUT)
def sequences_that_grow_all_the_time(loop):
    while True:
        kept = fill(int(40 * MIB * loop.step / STEPS) + 1)
        del kept
        yield


@case(HELD_OUT)
def dynamic_shapes(loop):
    import torch

    while True:
        size = random.randrange(16, 400)
        torch.ones(size, size).matmul(torch.ones(size, size)).sum().item()
        yield


@case(HELD_OUT)
def training_with_adam(loop):
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256))
    adam = torch.optim.AdamW(model.parameters())
    losses = []
    while True:
        loss = model(torch.randn(16, 256)).square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        yield


@case(HELD_OUT)
def vocabulary(loop):
    counts = collections.Counter()
    while True:
        for _ in range(60):
            counts["word" * 50 + str(int(random.paretovariate(0.7)))] += 1
            if len(counts) > 20000:
                counts = collections.Counter(dict(counts.most_common(10000)))
        yield


@case(HELD_OUT)
def cache_of_the_first_evaluation(loop):
    cache = []
    while True:
        if loop.step % 400 == 0:
            with loop.during("evaluation"):
                cache = cache or [fill(MIB) for _ in range(50)]
        yield


@case(HELD_OUT)
def mapped_file_that_is_written(loop):
    size = 48 * MIB
    with tempfile.TemporaryFile(dir=os.environ.get("LEAKS_TMP")) as file:
        file.truncate(size)
        data = mmap.mmap(file.fileno(), size)
        while True:
            at = loop.step * size // (STEPS + 1) // 4096 * 4096
            data[at : at + 20 * KIB] = bytes(20 * KIB)
            yield


@case(HELD_OUT)
def threads_one_by_one(loop):
    threads = []
    while True:
        if loop.step % 100 == 0 and len(threads) < 8:
            ready = threading.Event()

            def serve(ready=ready):
                kept = [bytes(1000) for _ in range(2000)]
                ready.set()
                threading.Event().wait(600)
                del kept

            threads.append(threading.Thread(target=serve, daemon=True))
            threads[-1].start()
            ready.wait(10)
        yield


@case(HELD_OUT)
def log_flushed_now_and_then(loop):
    lines = []
    while True:
        lines.append("x" * 20 * KIB)
        if len(lines) >= 230:
            lines = []
        yield


@case(HELD_OUT)
def two_kinds_of_steps(loop):
    while True:
        kept = [fill(MIB) for _ in range(20 if loop.step // 150 % 2 else 5)]
        del kept
        yield


@case(HELD_OUT)
def pages_copied_after_a_fork(loop):
    shared = [bytearray(4000) for _ in range(8000)]
    one = worker(_touch, shared)
    while True:
        one.ask(loop.step)
        yield


def _touch(requests, shared):
    at = 0
    for _ in requests:
        for each in shared[at : at + 10]:
            each[:100] = bytes(100)
        at += 10
        yield at


@case(HELD_OUT)
def averaged_weights_from_the_middle(loop):
    copy = None
    while True:
        if loop.step == STEPS // 2:
            copy = [fill(MIB) for _ in range(40)]
        yield copy


@case(HELD_OUT)
def layers_unfrozen(loop):
    state = []
    while True:
        if loop.step in (400, 900, 1400):
            state.append([fill(MIB) for _ in range(15)])
        yield


@case(HELD_OUT)
def large_noise(loop):
    window = collections.deque(maxlen=5)
    while True:
        window.append(fill(random.randrange(1, 8 * MIB)))
        yield


@case(HELD_OUT)
def slow_waves(loop):
    queue = []
    while True:
        wanted = int(200 + 190 * math.sin(2 * math.pi * loop.step / (0.4 * STEPS)))
        while len(queue) < wanted:
            queue.append(fill(100 * KIB))
        del queue[wanted:]
        yield
