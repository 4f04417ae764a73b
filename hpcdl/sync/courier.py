"""The sender's process, from the side that gives orders."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from hpcdl.sync import target

TAIL = 600
"""Characters of what the process has said that a message quotes."""
CLOSE_S = 5.0


class Courier:
    """Starts the process when first asked; a fault or a silence ends it, and the next order starts another.

    Args:
        server: address of the wandb server.
        quiet: keep what wandb says for a message; else it goes to this process's standard error.
    """

    def __init__(self, server: str, *, quiet: bool = True) -> None:
        self._server = server
        self._quiet = quiet
        self._process: subprocess.Popen[bytes] | None = None
        self._said: Any = None

    def give(self, order: dict[str, Any]) -> None:
        """Hands an order over; `answer` waits for what comes of it."""
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone, as the answer will say
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The answer to the order before; `{"fault": …}` where there is none in time.

        Args:
            limit_s: the process is ended after so many seconds.
        """
        process = self._process
        assert process is not None and process.stdout is not None
        line, end = b"", time.monotonic() + limit_s
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self.kill()
                return {"fault": f"no answer within {limit_s:g} s"}
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                code = process.wait()
                return {"fault": f"the sending process ended with code {code}: {self._last_words()}"}
            line += piece
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, order: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Gives an order and waits for its answer."""
        self.give(order)
        return self.answer(limit_s)

    def kill(self) -> None:
        """Ends the process and what it has started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._drop()

    def close(self) -> None:
        """Lets the process end."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(OSError):
            assert process.stdin is not None
            process.stdin.close()
        try:
            process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._drop()

    def _start(self) -> None:
        self._drop()
        if self._quiet:
            self._said = tempfile.TemporaryFile()  # noqa: SIM115 as long as the process
        self._process = subprocess.Popen(
            # -P: nothing in the folder that the user stands in takes the place of a package
            [sys.executable, "-P", "-m", "hpcdl.sync.sender"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=target.environment(self._server),
            start_new_session=True,  # Ctrl-C and a job's signals are for us; its input's end ends it
        )

    def _last_words(self) -> str:
        if self._said is None:
            return "see above"
        self._said.seek(0)
        text = self._said.read().decode("utf-8", errors="replace").strip()
        return text[-TAIL:] or "without a word"

    def _drop(self) -> None:
        process, self._process = self._process, None
        for stream in (process.stdin, process.stdout) if process else ():
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self._said is not None:
            self._said.close()
            self._said = None
