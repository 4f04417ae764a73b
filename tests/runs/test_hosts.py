from __future__ import annotations

import pytest

from hpcdl.runs.hosts import expand_hosts, task_indices


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("c1", ["c1"]),
        ("c[1-4,7]", ["c1", "c2", "c3", "c4", "c7"]),
        ("c[1-2],login", ["c1", "c2", "login"]),
        ("gpu[08-10]-ib", ["gpu08-ib", "gpu09-ib", "gpu10-ib"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("", []),
        ("(null)", []),
        ("None assigned", []),
    ],
)
def test_expand_hosts(text: str, hosts: list[str]) -> None:
    assert list(expand_hosts(text)) == hosts


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("4", [4]),
        ("3-6%2", [3, 4, 5, 6]),
        ("0,2,5-7", [0, 2, 5, 6, 7]),
        ("[1-3%1]", [1, 2, 3]),
        ("0-6:3", [0, 3, 6]),
        ("N/A", []),
        ("", []),
    ],
)
def test_task_indices(text: str, tasks: list[int]) -> None:
    assert [task for part in task_indices(text) for task in part] == tasks
