"""HTTP server of a folder on the loopback address, with faults that a test asks for."""

import hashlib
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SLOW = 2.0  # seconds of a slow answer


@dataclass
class StoreServer:
    """Objects of a folder, and the faults of them.

    Attributes:
        faults: what is wrong with an object, by the end of its name, and how often.
        ranges: whether parts of objects are sent.
        asked: how often each object was asked for.
    """

    folder: Path
    faults: dict[str, tuple[str, int]] = field(default_factory=dict)
    ranges: bool = True
    elsewhere: str = "http://127.0.0.2:9"
    asked: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/folder"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fault_of(self, name: str) -> str:
        """Return what is wrong with this answer, and count it."""
        for end, (kind, times) in self.faults.items():
            if name.endswith(end) and times:
                self.faults[end] = (kind, times - 1)
                return kind
        return ""


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, store: StoreServer, *arguments: object) -> None:
        self.store = store
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        name = self.path.removeprefix("/folder/").removeprefix("moved/")
        file = self.store.folder / name
        kind = self.store.fault_of(name)
        self.store.asked[name] += body
        if kind == "slow":
            time.sleep(SLOW)
        if kind in {"500", "403", "401", "503"}:
            return self._send(int(kind), b"<Error>secret</Error>", body)
        if kind in {"redirect", "moved"}:
            target = "/folder/moved/" if kind == "moved" else f"{self.store.elsewhere}/"
            return self._send(302, b"", body, Location=target + name)
        if kind == "404" or not file.is_file():
            return self._send(404, b"", body)
        data = file.read_bytes()
        data = data[: len(data) // 2] if kind == "truncated" else data
        data = bytes([data[0] ^ 1]) + data[1:] if kind == "wrong" else data
        status, asked = 200, self.headers.get("Range")
        if asked and self.store.ranges:
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            status, data = (206, data[first : last + 1]) if first < len(data) else (416, b"")
        tag = hashlib.sha256(file.read_bytes()).hexdigest()
        return self._send(status, data, body, cut=kind == "cut", ETag=tag)

    def _send(
        self, status: int, data: bytes, body: bool, *, cut: bool = False, **headers: str
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = True
