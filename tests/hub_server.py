"""A hub of Hugging Face on loopback: the few routes that an upload takes."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN, OWNER = "hf_secretofatest", "me"


@dataclass
class Hub:
    """What the hub was told.

    Attributes:
        made: bodies of calls that make a repository.
        files: what lies in the repositories, by REPO/PATH.
        routes: each call.
        fault: status of each answer; 0 is none.
    """

    made: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    routes: list[str] = field(default_factory=list)
    fault: int = 0
    address: str = ""

    def answer(self, route: str, body: bytes, token: str | None) -> tuple[int, Any]:
        self.routes.append(route)
        if self.fault:
            return self.fault, {"error": "told to fail"}
        if route == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if route == "/api/repos/create":
            return self._make(json.loads(body))
        repo, _, action = route.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": name, **modes} for name in names]}
        assert action == "commit", route
        for line in body.splitlines():
            row = json.loads(line)
            if row["key"] == "file":
                content = base64.b64decode(row["value"]["content"])
                self.files[f"{repo}/{row['value']['path']}"] = content
        return 200, {"success": True, "commitUrl": f"{self.address}/{repo}", "commitOid": "0" * 40}

    def _make(self, given: dict[str, Any]) -> tuple[int, Any]:
        if given["organization"] != OWNER:
            return 403, {
                "error": "You don't have the rights to create a model under this namespace"
            }
        url = f"{self.address}/{OWNER}/{given['name']}"
        if any(each["name"] == given["name"] for each in self.made):
            return 409, {"error": "You already created this model repo", "url": url}
        self.made.append(given)
        return 200, {"url": url}


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a hub while the block runs."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code, content = hub.answer(
                self.path.partition("?")[0], body, self.headers.get("authorization")
            )
            self._reply(code, content)

        def do_GET(self) -> None:
            hub.routes.append(self.path)  # of a repository that is not there, or not to be seen
            self._reply(404, {"error": "Repository not found"})

        def _reply(self, code: int, content: Any) -> None:
            text = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
