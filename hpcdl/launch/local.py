"""This machine: the runs of a submission one after the other, in a session of their own, detached."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading

from hpcdl.errors import SchedulerError
from hpcdl.launch import template, torchrun
from hpcdl.launch.base import JobRequest
from hpcdl.launch.child import started_at
from hpcdl.runs.files import write_atomic, write_json
from hpcdl.runs.store import RUNNER

_LOOP = """\
# One after the other; a failed run doesn't keep the next from its turn, an interrupt (130) does.
status=0
for index in $(seq 0 {last}); do
    "$HPCDL_PYTHON" -m hpcdl.launch.job "$HPCDL_RUNS_FILE" "$index" || {{
        code=$?
        ((code > status)) && status=$code
        ((code == 130)) && break
    }}
done
exit "$status"
"""


class LocalBackend:
    """No scheduler: a detached shell."""

    def render(self, request: JobRequest) -> str:
        """The shell text that starts the agent of each run."""
        last = len(request.run_dirs) - 1
        wait = '"$HPCDL_PYTHON" -m hpcdl.launch.waiting "$HPCDL_RUNS_FILE" || exit'
        head = [
            "#!/bin/bash",
            f"# {request.name}: {last + 1} run{'s' if last else ''} on this machine",
            f"# The agent starts: {torchrun.preview(request.cluster, request.python)}",
            f"HPCDL_PYTHON={shlex.quote(request.python)}",
            f"HPCDL_CODE={shlex.quote(str(request.code or ''))}",
            f"HPCDL_RUNS_FILE={shlex.quote(str(request.folder / 'runs.txt'))}",
            *template.frame_arrays(request.cluster),
            "",
            template.frame(),
            "",
            "export HPCDL_LOCAL=1",
            *([wait] if request.parents else []),
        ]
        one = '"$HPCDL_PYTHON" -m hpcdl.launch.job "$HPCDL_RUNS_FILE" 0\n'
        return "\n".join(head) + "\n" + (_LOOP.format(last=last) if last else one)

    def submit(self, request: JobRequest, text: str) -> str | None:
        """Starts the text in its own session and returns at once; there is no job id.

        Raises:
            SchedulerError: the shell could not be started.
        """
        request.folder.mkdir(parents=True, exist_ok=True)
        script = request.folder / "job.sh"
        write_atomic(script, text)
        try:
            with (request.folder / "local.out").open("ab") as output:
                process = subprocess.Popen(
                    ["bash", str(script)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise SchedulerError(f"bash could not be started: {error}") from error
        # While this shell lives, runs of the submission that are still PENDING will have their turn.
        record = {"pid": process.pid, "started": started_at(process.pid), "host": os.uname().nodename}
        write_json(request.folder / RUNNER, record)
        # Whoever asks whether it lives must not find a zombie for as long as this process goes on.
        threading.Thread(target=process.wait, daemon=True).start()
        return None


BACKEND = LocalBackend()
