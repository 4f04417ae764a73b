"""A wandb server of a few lines: enough GraphQL and file stream for the real client (0.31) to push to it and read.

It keeps lines of a file by the offset that the client gives them, tells the client how many it has, and remembers ids
that were deleted. Told to, it fails: with a code, by hanging, by breaking the connection.
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Run:
    """One run as it arrived."""

    name: str
    display_name: str = ""
    group: str = ""
    project: str = ""
    entity: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """Of streamed files, by name and offset."""
    exit_code: int | None = None
    begun: int = 0
    """How often a sending of it began."""

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        latest = self.lines.get("wandb-summary.json", {}).get(0, "{}")
        return dict(json.loads(latest))

    def curve(self, key: str) -> list[tuple[int, Any]]:
        return [(row["_step"], row[key]) for row in self.history if key in row]


class FakeWandb:
    """The server; `url` once it runs."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.calls: Counter[str] = Counter()
        """Requests by kind: `graphql`, `stream`, `other`."""
        self.deleted: set[str] = set()
        self.keys: set[str] = set()
        """Authorization headers that were seen."""
        self.fail: dict[str, str] = {}
        """By kind: `500`, `401`, `hang`, `reset`; `lose` takes the data and forgets it."""
        self.fail_after: dict[str, int] = {}
        """By kind: how many requests go well before."""
        self.heals_after: dict[str, int] = {}
        """By kind: all requests after so many go well."""
        self.let_go = threading.Event()
        """Ends what hangs."""
        self.arrived = threading.Event()
        """Set by the first stream request."""
        self.pause_s = 0.0
        """Before each answer to a stream request."""
        self.url = ""

    def graphql(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        if "upsertBucket" in query:
            return {"upsertBucket": {"bucket": self._upsert(values), "inserted": True}}
        if "RunResumeStatus" in query:
            return {"model": self._resumed(values["name"])}
        if "deleteRun" in query:
            name = values["id"].removeprefix("id-")
            del self.runs[name]
            self.deleted.add(name)
            return {"deleteRun": {"clientMutationId": None}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in values["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "project(" in query and "run(" in query:
            return {"project": {"run": self._shown(values["name"])}}
        if "viewer" in query:
            viewer = {
                "id": "1",
                "username": "me",
                "entity": "me",
                "flags": "{}",
                "email": "",
                "teams": {"edges": []},
            }
            return {
                "viewer": viewer,
                "serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "features": []},
            }
        return {}

    def stream(self, name: str, body: dict[str, Any]) -> None:
        run = self.runs[name]
        for file, part in (body.get("files") or {}).items():
            for number, line in enumerate(part["content"]):
                run.lines.setdefault(file, {})[part["offset"] + number] = line
        if body.get("complete"):
            run.exit_code = body.get("exitcode")

    def _upsert(self, values: dict[str, Any]) -> dict[str, Any]:
        if values["name"] in self.deleted:
            raise ValueError(f"run {values['name']} was previously created and deleted; try a new run name")
        run = self.runs.setdefault(values["name"], Run(values["name"]))
        run.project, run.entity = values["project"] or "uncategorized", values["entity"] or "me"
        run.config = json.loads(values["config"] or "{}")
        if values["displayName"]:
            run.display_name, run.group, run.tags = (
                values["displayName"],
                values["groupName"],
                values["tags"] or [],
            )
            run.begun += 1
        owner = {"id": "1", "name": run.entity}
        return {
            "id": f"id-{run.name}", "name": run.name, "displayName": run.display_name, "description": None,
            "config": "{}", "sweepName": None, "historyLineCount": len(run.history),
            "project": {"id": "1", "name": run.project, "entity": owner},
        }  # fmt: skip

    def _resumed(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        bucket = {
            "id": f"id-{name}", "name": name, "summaryMetrics": json.dumps(run.summary), "displayName": "",
            "logLineCount": 0, "historyLineCount": len(run.history), "eventsLineCount": 0, "tags": run.tags,
            "historyTail": json.dumps([json.dumps(run.history[-1])] if run.history else []), "eventsTail": "[]",
            "config": json.dumps(run.config), "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {"id": "1", "name": run.project, "entity": {"id": "1", "name": run.entity}, "bucket": bucket}

    def _shown(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        return {
            "id": f"id-{name}", "tags": run.tags, "name": name, "displayName": run.display_name, "sweepName": None,
            "state": "finished", "config": json.dumps(run.config), "group": run.group, "jobType": None, "commit": None,
            "readOnly": False, "createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00",
            "description": None, "notes": None, "systemMetrics": "{}", "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history), "user": {"name": "me", "username": "me"}, "historyKeys": {},
            "projectId": "1",
        }  # fmt: skip


@contextmanager
def serving() -> Iterator[FakeWandb]:
    """A server on a port of the loopback, for the time of the block."""
    fake = FakeWandb()

    class Handler(_Handler):
        server_of = fake

    server = _Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed breaks its connections."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FakeWandb

    def do_GET(self) -> None:
        if not self._fails("graphql"):
            self._say({}, 404)

    def do_PUT(self) -> None:
        self._body()
        self._say({})

    def do_POST(self) -> None:
        body, fake = self._body(), self.server_of
        fake.keys.add(self.headers.get("Authorization", ""))
        if self.path == "/graphql":
            asked = json.loads(body)
            if self._fails("graphql"):
                return
            try:
                self._say({"data": fake.graphql(asked["query"], asked.get("variables") or {})})
            except ValueError as error:
                self._say({"errors": [{"message": str(error)}]}, 409)
            return
        found = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
        if found is None:
            fake.calls["other"] += 1
            self._say({})
            return
        fake.arrived.set()
        time.sleep(fake.pause_s)
        if not self._fails("stream"):
            if fake.fail.get("stream") != "lose":
                fake.stream(found[1], json.loads(body))
            self._say({"exitcode": None, "limits": {}})

    def _fails(self, kind: str) -> bool:
        fake = self.server_of
        fake.calls[kind] += 1
        how = fake.fail.get(kind, "")
        bad = range(fake.fail_after.get(kind, 0), fake.heals_after.get(kind, sys.maxsize))
        if not how or how == "lose" or fake.calls[kind] - 1 not in bad:
            return False
        if how == "hang":
            fake.let_go.wait()
        if how in ("hang", "reset"):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._say(
                {"errors": [{"message": "user is not logged in" if how == "401" else "broken"}]}, int(how)
            )
        return True

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _say(self, value: Any, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
