"""The part of the hub's HTTP API that plain uploads need (no Xet), in a thread; the name of a repository decides.

``me/new`` is not there yet, ``me/closed`` may not be written to (403), of ``me/halfway`` the storage fails (500), and
of ``me/late`` the commit is refused (403). The token ``good`` may write, ``reads`` may not, others are unknown (401).
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """What has happened.

    Attributes:
      log: method and path of every request.
      stored: by digest, what was put into the large-file storage.
      commits: repository, branch, and the files by their names.
      created: what the requests to create repositories said.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.log: list[str] = []
        self.stored: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self.created: list[dict[str, Any]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, data: Any = None, **headers: str) -> None:
        body = json.dumps({} if data is None else data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.server.log.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        repo = next(iter(re.findall(r"(?:me|org|else)/[a-z]+", path)), "")
        if path.startswith("/storage/"):
            if "halfway" in path:
                return self.answer(500, {"error": "the storage is broken"})
            self.server.stored[path.rpartition("/")[2]] = body
            return self.answer(200)
        if token not in ("good", "reads"):
            return self.answer(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            role = {"good": "write", "reads": "read"}[token]
            user = {"type": "user", "name": "me", "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": role}}}
            return self.answer(200, user)
        if "/auth-check" in path:
            if repo.endswith("/closed"):
                return self.answer(403, {"error": "You may not write here"})
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            name = json.loads(body)["name"]
            return self.answer(200, {"url": f"{self.server.address}/me/{name}"})
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            answers = []
            for name in (f["path"] for f in files):
                mode = "lfs" if name.endswith(("safetensors", "gguf")) else "regular"
                answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": None})
            return self.answer(200, {"files": answers})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {"oid": o["oid"], "size": o["size"], "actions": {
                    "upload": {"href": f"{self.server.address}/storage/{repo}/{o['oid']}"}}}
                for o in json.loads(body)["objects"]]  # fmt: skip
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            if repo.endswith("/late"):
                return self.answer(403, {"error": "You may not write here any more"})
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.stored[value["oid"]]
            self.server.commits.append((repo, path.rpartition("/")[2], files))
            url = f"{self.server.address}/{repo}/commit/{'c' * 40}"
            return self.answer(200, {"success": True, "commitOid": "c" * 40, "commitUrl": url})
        if path == "/api/validate-yaml":
            return self.answer(200, {"warnings": [], "errors": []})
        if "/branch/" in path:
            return self.answer(200)
        if self.command == "GET" and path.startswith("/api/models/"):
            return self.answer(200, {"id": repo, "sha": "b" * 40, "siblings": []})
        return self.answer(404, {"error": "no such thing"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
