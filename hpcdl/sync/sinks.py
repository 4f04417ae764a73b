"""Where rows go: a wandb server, or TensorBoard's event files. Only the sender's process imports this."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

from hpcdl.spec.plain import dump_yaml
from hpcdl.sync.story import DIGEST, Head, Row

PREFIX = "hpcdl-sync-"
"""How the folders begin that wandb writes into while it sends."""
OLD_S = 86400.0
"""Such a folder in which nothing was written for so long was left by a process that was killed."""
VERIFY_S = 30.0
"""How long the server may take until it shows what it was sent."""


class NotTakenError(Exception):
    """The server doesn't show what it was sent."""


class Sink(Protocol):
    """Takes one run."""

    url: str
    """Where a person finds it."""
    id: str
    """Its name there."""

    def add(self, row: Row) -> None:
        """A row; steps rise."""

    def flush(self) -> None:
        """What was added is soon to be seen."""

    def finish(self, summary: dict[str, Any], digest: str | None, *, failed: bool) -> None:
        """The end; what was added is there when it returns.

        Args:
            summary: figures of the whole run.
            digest: what the server must show afterwards; None: it is not asked.
            failed: whether the run has.

        Raises:
            NotTakenError: it isn't.
        """

    def delete(self, name: str) -> bool:
        """Removes another one of its runs; whether that is gone."""

    def close(self) -> None:
        """Frees what is held, whatever happened."""


class Wandb:
    """A run on a wandb server.

    Args:
        head: what the run is.
        name: its id there.
        limit_s: how long the server may take to answer at the beginning, and at the end to take everything.
        after: the last step that is there already; None: the id was never used.
    """

    def __init__(self, head: Head, name: str, limit_s: float, after: int | None = None) -> None:
        import wandb

        self.id = name
        self._after = -1 if after is None else after
        self._limit_s = limit_s
        self._head = head
        remove_old(Path(tempfile.gettempdir()))
        self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
        self._run = wandb.init(
            project=head.project,
            entity=head.entity,
            group=head.group,
            name=f"{head.name}-{head.run_id}",
            id=name,
            resume=None if after is None else "must",
            tags=list(head.tags),
            config=head.config,
            mode="online",
            dir=self._folder.name,
            # The machine that sends is not the one that trained: nothing of it, of this process or of this folder's
            # code belongs to the run.
            settings=wandb.Settings(
                init_timeout=limit_s,
                finish_timeout=limit_s,
                finish_timeout_raises=True,
                console="off",
                silent=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
                disable_git=True,
                disable_job_creation=True,
                save_code=False,
            ),
        )
        self.url: str = self._run.url or ""

    def add(self, row: Row) -> None:
        """A line of the history; wandb's own step is the training's."""
        if row.step <= self._after:
            return
        self._run.log({"step": row.step, "_timestamp": row.time, **row.values}, step=row.step)

    def flush(self) -> None:
        """Nothing to do: wandb's own process sends all the while."""

    def finish(self, summary: dict[str, Any], digest: str | None, *, failed: bool) -> None:
        """Sends the rest and asks the server whether it has it.

        `finish` of wandb 0.31 returns as if all were well where the server has refused the data, and so does
        `wandb sync`. The digest is the last thing that is sent: who shows it has taken all that came before.
        """
        self._run.summary.update({**summary, DIGEST: digest} if digest else summary)
        path = f"{self._run.entity}/{self._run.project}/{self.id}"
        try:
            self._run.finish(exit_code=int(failed))
        except TimeoutError as error:
            raise NotTakenError(
                f"the server didn't take the run within {self._limit_s:g} s (--limit)"
            ) from error
        end = time.monotonic() + min(VERIFY_S, self._limit_s)
        while digest and digest != (seen := digest_on_server(path, self._limit_s)):
            if time.monotonic() > end:
                raise NotTakenError(
                    f"the server doesn't have what was sent (its digest is {seen or 'missing'}, not {digest})"
                )
            time.sleep(0.5)

    def delete(self, name: str) -> bool:
        """Removes another run of the same project."""
        import wandb

        try:
            wandb.Api(timeout=max(1, int(self._limit_s))).run(
                f"{self._run.entity}/{self._run.project}/{name}"
            ).delete()
        except (wandb.errors.CommError, ValueError) as error:
            return _is_missing(error)
        return True

    def close(self) -> None:
        """Removes the folder that wandb wrote into meanwhile."""
        self._folder.cleanup()


def remove_old(folder: Path) -> None:
    """Removes what senders that were killed have left."""
    for left in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or removed meanwhile
            newest = max(path.lstat().st_mtime for path in (left, *left.rglob("*")))
            if left.lstat().st_uid == os.getuid() and time.time() - newest > OLD_S:
                shutil.rmtree(left, ignore_errors=True)


def digest_on_server(path: str, limit_s: float) -> str | None:
    """The digest in the summary of a run on the server; empty where it has none, None where there is no such run.

    Args:
        path: `<entity>/<project>/<run id>`; without an entity the user's own.
        limit_s: for the server's answer.
    """
    import wandb

    try:
        run = wandb.Api(timeout=max(1, int(limit_s))).run(path)
    except (wandb.errors.CommError, ValueError) as error:
        if _is_missing(error):
            return None
        raise
    return str(dict(run.summary).get(DIGEST, ""))


def path_of(head: Head, name: str) -> str:
    """A run's path on its server; without an entity it is the user's own."""
    return "/".join(part for part in (head.entity, head.project, name) if part)


def _is_missing(error: Exception) -> bool:
    return "Could not find" in str(error)


class Board:
    """Event files in a folder of their own; those of an earlier sending are removed once the new one is whole.

    Args:
        head: what the run is.
        folder: is made; other files in it are left alone.
    """

    def __init__(self, head: Head, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.url = self.id = str(folder)
        self._old = set(folder.glob(f"*{SUFFIX}"))
        self._head = head
        self._writer = EventFileWriter(str(folder), filename_suffix=SUFFIX)
        # A TensorBoard that looks on has the earlier file's points in mind: this makes it forget all of them.
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(_event(time.time(), 0, session_log=start))
        self._writer.add_event(_event(time.time(), 0, summary=_text("config", dump_yaml(head.config))))

    def add(self, row: Row) -> None:
        """A scalar a number."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.values.items()]
        self._writer.add_event(_event(row.time, row.step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Writes what waits, and removes earlier files."""
        self._writer.flush()
        for file in self._old:
            with contextlib.suppress(FileNotFoundError):
                file.unlink()
        self._old = set()

    def finish(self, summary: dict[str, Any], digest: str | None, *, failed: bool) -> None:
        """The summary as a text, and the end of the file."""
        shown = {
            key: value
            for key, value in summary.items()
            if not isinstance(value, float) or math.isfinite(value)
        }
        self._writer.add_event(_event(time.time(), 0, summary=_text("summary", dump_yaml(shown))))
        self.flush()

    def delete(self, name: str) -> bool:
        """There are no others."""
        return True

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


SUFFIX = ".hpcdl"
"""How the names of our event files end."""


def _event(wall_time: float, step: int, **what: Any) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event

    return Event(wall_time=wall_time, step=step, **what)


def _text(tag: str, text: str) -> Any:
    """A text for TensorBoard's own tab, shown as it stands."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto

    indented = "".join(f"    {line}\n" for line in text.splitlines())
    return Summary(
        value=[
            Summary.Value(
                tag=tag,
                metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text")),
                tensor=TensorProto(dtype="DT_STRING", string_val=[indented.encode()]),
            )
        ]
    )
