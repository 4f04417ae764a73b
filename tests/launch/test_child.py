from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from hpcdl.launch.child import Log, children, started_at

# In a process of its own: the pump kills and reaps everything below the process that it runs in.
PUMP = """
import os, sys
from pathlib import Path
from hpcdl.launch.child import Log, Torchrun
child = Torchrun([sys.executable, "-u", "-c", sys.argv[1]], os.environ, Log(Path(sys.argv[2])))
print(child.watch(lambda: None), child.disturbed, list(child.words)[-1:])
"""


def pump(code: str, log: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PUMP, code, str(log)], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def texts(log: Path) -> list[str]:
    return [re.sub(r"^\S+ ", "", line) for line in log.read_text().splitlines()]


def test_lines_get_a_time_and_a_writer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "print('[rank 3] a'); print('words'); import sys; sys.stdout.write('no newline'); sys.exit(4)"
    assert pump(code, log) == "4 False ['no newline']"
    assert texts(log) == ["[rank 3] a", "[torchrun] words", "[torchrun] no newline"]


def test_stack_frames_of_the_store_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pump(
        "print('[W1122 recvVector failed'); print('frame #0: c10::Error'); print('[rank 0] frame #1: mine')",
        log,
    )
    assert texts(log) == ["[torchrun] [W1122 recvVector failed", "[rank 0] frame #1: mine"]


def test_no_line_is_lost_or_torn(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pump("for i in range(100000): print(f'[rank 0] {i} ' + 'x' * (i % 90))", log)
    assert [int(t.split()[2]) for t in texts(log)] == list(range(100000))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    log = tmp_path / "log"
    pump("import sys; sys.stdout.buffer.write(b'[rank 0] \\xff\\xfe\\n')", log)
    assert log.read_bytes().endswith(b" [rank 0] \xff\xfe\n")


def test_a_disturbance_is_noticed(tmp_path: Path) -> None:
    words = "W1122 api.py:1028] Sending process 999999 closing signal SIGTERM"
    assert pump(f"print({words!r})", tmp_path / "log").startswith("0 True")


def test_what_torchrun_leaves_is_gone_at_the_end(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
        "start_new_session=True); print(p.pid)"
    )
    log = tmp_path / "log"
    pump(code, log)
    assert not Path(f"/proc/{texts(log)[0].split()[-1]}").exists()


def test_children_and_birth() -> None:
    before = time.time()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert process.pid in children(os.getpid())
        assert abs(started_at(process.pid) - before) < 2.0
    finally:
        process.kill()
        process.wait()
    assert process.pid not in children(os.getpid())


def test_the_agents_own_words(tmp_path: Path) -> None:
    Log(tmp_path / "log").say("two\nlines")
    assert texts(tmp_path / "log") == ["[agent] two", "[agent] lines"]
