"""A W&B server on the loopback interface: as much of its API as a run, its files and its artifacts need."""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"
ENTITY = "team"


def environment(folder: Path) -> dict[str, str]:
    """W&B without an account, with everything of its own below `folder`, and with little patience."""
    places = {f"WANDB_{name}_DIR": str(folder / "own") for name in ("DATA", "CACHE", "CONFIG", "ARTIFACT")}
    patience = {"WANDB_INIT_TIMEOUT": "30", "WANDB_X_GRAPHQL_RETRY_MAX": "1", "WANDB_X_FILE_STREAM_RETRY_MAX": "1"}
    quiet = {"WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "WANDB_ERROR_REPORTING": "false"}
    less = {"WANDB_X_DISABLE_STATS": "true", "NETRC": str(folder / "netrc"), "WANDB_MODE": "offline"}
    return {**places, **patience, **quiet, **less}


@dataclass
class FakeRun:
    """What the server was told of one run.

    Attributes:
        fields: what `UpsertBucket` said, later words outweighing: groupName, jobType, tags, displayName and so on.
        streams: file -> line number -> line, as `file_stream` brought them.
        files: names of the files that were uploaded.
        exit_code: of the process; None until it said that it had ended.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    exit_code: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The configuration, without W&B's own."""
        values = json.loads(self.fields["config"])
        return {name: entry["value"] for name, entry in values.items() if name != "_wandb"}

    @property
    def history(self) -> list[dict[str, Any]]:
        """What was logged, in order."""
        return [json.loads(line) for _, line in sorted(self.streams.get("wandb-history.jsonl", {}).items())]

    @property
    def summary(self) -> dict[str, Any]:
        """The newest summary."""
        lines = self.streams.get("wandb-summary.json", {})
        newest: dict[str, Any] = json.loads(lines[max(lines)]) if lines else {}
        return newest


@dataclass
class FakeWandb:
    """Everything the server has seen.

    Attributes:
        url: what `WANDB_BASE_URL` has to say.
        runs: by their ids.
        artifacts: what `CreateArtifact` asked for, each with `committed` and, once uploaded, the manifest.
        reports: what `upsertView` was told.
        operations: names of the GraphQL operations, in order.
        unknown: those that it has no answer to.
        uploads: path -> content of what was put.
    """

    url: str = ""
    runs: dict[str, FakeRun] = field(default_factory=dict)
    artifacts: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Carry out a GraphQL operation."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else query.split("{")[1].strip()
        self.operations.append(name)
        operation = getattr(self, f"_{name}", None)
        if operation is None:
            self.unknown.append(name)
            return {"errors": [{"message": f"{name} is more than this server can do"}]}
        return {"data": operation(variables)}

    def stream(self, run: str, body: dict[str, Any]) -> None:
        """Take in a message of `file_stream`."""
        own = self.runs.setdefault(run, FakeRun())
        for name, chunk in (body.get("files") or {}).items():
            lines = own.streams.setdefault(name, {})
            lines.update(enumerate(chunk["content"], chunk["offset"]))
        if body.get("complete"):
            own.exit_code = body.get("exitcode")

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "1", "entity": ENTITY, "username": "me", "email": "", "flags": "{}", "teams": teams}}

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _RunResumeStatus(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"model": None}

    def _ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": None}  # no artifact of that name yet

    def _GetDefaultEntity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": ENTITY}}

    def _ProjectInternalId(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "1", "internalId": "1"}}

    def _GetProjects(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = {
            "__typename": "Project",
            "id": "1",
            "name": "proj",
            "entityName": variables["entity"],
            "createdAt": "2026-01-01T00:00:00",
            "isBenchmark": False,
            "user": None,
        }
        pages = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": pages, "edges": [{"node": project}]}}

    def _upsertView(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.reports.append(variables)
        project = {"id": "1", "name": variables["projectName"], "entityName": variables["entityName"]}
        told = {name: variables[name] for name in ("name", "displayName", "description", "type", "spec")}
        return {"upsertView": {"view": {"id": "view-1", "project": project, **told}, "inserted": True}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.setdefault(variables["name"], FakeRun())
        run.fields.update({name: value for name, value in variables.items() if value is not None})
        entity = {"id": "1", "name": variables.get("entity") or ENTITY}
        bucket = {
            "id": f"id-{variables['name']}",
            "name": variables["name"],
            "displayName": run.fields.get("displayName") or "unnamed-1",
            "description": None,
            "config": run.fields.get("config"),
            "sweepName": None,
            "project": {"id": "1", "name": variables["project"], "entity": entity},
            "historyLineCount": 0,
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = variables["run"]
        self.runs.setdefault(run, FakeRun()).files.extend(variables["files"])
        files = [{"name": file, "uploadUrl": f"{self.url}/put/{run}/{file}"} for file in variables["files"]]
        return {"createRunFiles": {"runID": f"id-{run}", "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts.append({**variables["input"], "committed": False})
        made = {"id": str(len(self.artifacts) - 1), "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": made}}

    def _CreateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": self._manifest(variables["artifactID"])}

    def _UpdateArtifactManifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": self._manifest(variables["artifactManifestID"])}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        file = {"id": artifact, "uploadUrl": f"{self.url}/put/manifest/{artifact}", "uploadHeaders": []}
        return {"artifactManifest": {"id": artifact, "file": file}}

    def _CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for spec in variables["input"]["artifactFiles"]:
            path = f"{spec['artifactID']}/{spec['name']}"
            node = {
                "storagePath": path,
                "uploadUrl": f"{self.url}/put/artifact/{path}",
                "uploadHeaders": [],
                "uploadMultipartUrls": None,
                "artifact": {"id": spec["artifactID"]},
            }
            edges.append({"node": node})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = self.artifacts[int(variables["artifactID"])]
        artifact["committed"] = True
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": artifact["digest"]}}}


@contextmanager
def serving() -> Iterator[FakeWandb]:
    """Serve on a free port of the loopback interface until the block ends."""
    fake = FakeWandb()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            message = json.loads(body or b"{}")
            with lock:
                if self.path == "/graphql":
                    self._say(fake.answer(message["query"], message.get("variables") or {}))
                elif self.path.endswith("/file_stream"):
                    fake.stream(self.path.split("/")[-2], message)
                    self._say({})
                else:
                    fake.unknown.append(self.path)
                    self._say({}, 404)

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                fake.uploads[self.path.removeprefix("/put/")] = body
                self._say({})

        def log_message(self, *_: object) -> None:
            pass

        def _say(self, data: dict[str, Any], status: int = 200) -> None:
            answer = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            if not isinstance(sys.exception(), ConnectionError):  # W&B hangs up when it is done
                super().handle_error(*_)

    lock = threading.Lock()
    server = Server(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
