"""Random command lines: valid scripts or one clear page, never a traceback, never a hang, nothing written.

HPCDL_FUZZ=20000 draws as many, from another seed each time; HPCDL_FUZZ_SEED=7 the same ones again.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.fuzzing import Fuzzed, check, command_lines, tree

EXAMPLES = int(os.environ.get("HPCDL_FUZZ", "0"))
SEED = os.environ.get("HPCDL_FUZZ_SEED")
HOW = settings(
    max_examples=EXAMPLES or 500,
    derandomize=not EXAMPLES and SEED is None,
    database=None,
    deadline=None,  # tests.fuzzing.deadline counts CPU time
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize(("wild", "valid"), [(True, 0.03), (False, 0.2)], ids=["wild", "right by themselves"])
def test_any_command_line_is_a_script_or_a_page(
    wild: bool, valid: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launch, codes = Fuzzed(monkeypatch), Counter[int]()

    @HOW
    @given(command_lines(wild=wild))
    def fuzz(argv: list[str]) -> None:
        answer = launch(argv)
        codes[answer.code] += 1
        check(argv, answer)

    (seed(int(SEED))(fuzz) if SEED is not None else fuzz)()
    print(dict(codes))
    assert codes[0] >= valid * codes.total(), f"too few were valid to mean much: {codes}"
    assert not tree(tmp_path), "a dry run and a broken config write nothing"
