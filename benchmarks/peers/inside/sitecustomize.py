"""Puts training.py's gate into hpcdl's worker: `hpcdl launch` runs as ever, and its worker waits for its turns.

On PYTHONPATH of the launch. Once the worker has imported its loader and its loop, three functions are wrapped: reading
a step's batches (the gate, and what was read), a step's outcome (the loss) and the loader's end (the record).
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))


def loader(module: Any, gate: Any, record: Any) -> None:
    read, close = module.Loader.micro_batches, module.Loader.close

    def micro_batches(self: Any, step: int) -> Any:
        gate.step()
        batches = read(self, step)
        record.took([one["input_ids"] for one in batches])
        return batches

    def closed(self: Any) -> None:
        close(self)
        record.leave()

    module.Loader.micro_batches, module.Loader.close = micro_batches, closed


def loop(module: Any, gate: Any, record: Any) -> None:
    outcome = module._outcome

    def told(parts: Any, under: Any) -> Any:
        found = outcome(parts, under)
        record.came(lambda: found.loss)
        return found

    module._outcome = told


WRAPPED = {"hpcdl.worker.data.loader": loader, "hpcdl.worker.loop": loop}


class Hook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module as ever, then wraps what is in it."""

    def __init__(self) -> None:
        from gate import Gate, Record

        self._things = Gate(), Record()

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in WRAPPED:
            return None
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert found is not None and found.loader is not None
        self._real, found.loader = found.loader, self
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        real = self._real
        real.exec_module(module)
        WRAPPED[module.__name__](module, *self._things)


if "BENCH_GATE" in os.environ and "hpcdl.worker.main" in sys.orig_argv:
    sys.meta_path.insert(0, Hook())
