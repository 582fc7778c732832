"""A server of datasets on the loopback address, as huggingface_hub's HfFileSystem asks one."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "0" * 40
Answer = tuple[int, bytes, Mapping[str, str]]  # status, body, headers


class HubServer:
    """Serves a folder as the files of one dataset, in its state of the moment.

    Attributes:
        address: of the server, for HF_ENDPOINT.
        asked: how often a file's content was asked for, by name.
        status: answered instead of a file's content, once for each entry.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        self.folder, self.dataset = folder, dataset
        self.asked: Counter[str] = Counter()
        self.status: list[int] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def entries(self, below: str, recursive: bool) -> list[dict[str, Any]] | None:
        """Return what the hub lists below a folder; None where it is not there."""
        root = self.folder / below
        if not root.is_dir():
            return None
        paths = sorted(root.rglob("*") if recursive else root.iterdir())
        return [self.entry(path) for path in paths]

    def entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.folder).as_posix()
        oid = hashlib.sha1(path.read_bytes() if path.is_file() else name.encode()).hexdigest()
        size = path.stat().st_size if path.is_file() else 0
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": name, "oid": oid, "size": size}

    def answer(self, target: str, sent: str, part: str) -> Answer:
        """Return status, body and headers of a request.

        Args:
            sent: the body of `paths-info`, which asks for the entries of named files and folders.
            part: the header Range.
        """
        asked = urlsplit(target)
        path, query = unquote(asked.path), parse_qs(asked.query)
        if self.dataset not in path:
            return lack("RepoNotFound")
        if found := re.fullmatch(r"/datasets/\w+/\w+/resolve/\w+/(.+)", path):
            return self.content(found[1], part)
        if "/paths-info/" in path:
            named = json.loads(sent)["paths"] if sent[:1] == "{" else parse_qs(sent)["paths"]
            places = (self.folder / name for name in named)
            return say([self.entry(place) for place in places if place.exists()])
        if found := re.fullmatch(r"/api/datasets/\w+/\w+/tree/\w+/?(.*)", path):
            entries = self.entries(found[1], query.get("recursive", [""])[0].lower() == "true")
            return lack("EntryNotFound") if entries is None else say(entries)
        return say({"id": self.dataset, "sha": REVISION, "siblings": [], "private": False})

    def content(self, name: str, part: str) -> Answer:
        file = self.folder / name
        if not file.is_file():
            return lack("EntryNotFound")
        self.asked[name] += 1
        if self.status:
            return self.status.pop(0), b"", {}
        data, headers = file.read_bytes(), {"ETag": f'"{self.entry(file)["oid"]}"'}
        headers["X-Repo-Commit"] = REVISION
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", part)
        if found is None:
            return 200, data, headers
        first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
        if first > last:
            return 416, b"", {}
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1], headers

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                del format, args

            def do_GET(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                status, body, headers = hub.answer(self.path, sent, self.headers.get("Range", ""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_POST = do_GET  # noqa: N815

        return Handler


def say(found: Any) -> Answer:
    return 200, json.dumps(found).encode(), {"Content-Type": "application/json"}


def lack(code: str) -> Answer:
    return 404, b"{}", {"X-Error-Code": code}
