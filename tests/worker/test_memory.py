"""What a worker leaves that memory has run out under: enough to tell it from a crash."""

from __future__ import annotations

import pytest

from hpcdl.runs import failure
from tests.worker.conftest import Workers

pytestmark = pytest.mark.torch


def test_torchs_own_error_is_known_with_the_memory_reached(workers: Workers) -> None:
    run = workers.make(model__shape__intermediate_size=1 << 42)  # half a petabyte a matrix
    done = workers.go(run, ok=False)
    assert done.codes == [1]
    cause = failure.root_cause(run)
    assert cause is not None and cause.out_of_memory, done.log[-2000:]
    assert "allocate" in cause.message
    assert cause.peak_memory_bytes is not None and cause.peak_memory_bytes > 50 << 20
