"""Chromium without a window, driven over its debugging pipe: opens pages and reads their DOM."""

import fcntl
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LONGEST = 60.0  # seconds for an answer


class Tab:
    """One tab of a browser of its own.

    Args:
        folder: of the profile; downloads go to folder/downloads.

    Attributes:
        errors: errors and warnings of the console since the tab was opened.
    """

    def __init__(self, folder: Path) -> None:
        assert CHROMIUM is not None
        self.downloads = folder / "downloads"
        self.errors: list[str] = []
        self._seen: list[str] = []  # names of events
        self._rest, self._number, self._session = b"", 0, ""
        # The browser reads file 3 and writes file 4; other numbers cannot be overwritten by them.
        theirs, self._write = map(_high, os.pipe())
        self._read, answers = map(_high, os.pipe())

        def place() -> None:
            os.dup2(theirs, 3)
            os.dup2(answers, 4)

        self._process = subprocess.Popen(
            [
                *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
                *("--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"),
                "about:blank",
            ],
            pass_fds=(3, 4),
            preexec_fn=place,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        pages = [one for one in self._targets() if one["type"] == "page"]
        target = {"targetId": pages[0]["targetId"], "flatten": True}
        self._session = self.ask("Target.attachToTarget", **target)["sessionId"]
        for room in ("Page", "Runtime", "Log"):
            self.ask(f"{room}.enable")

    def open(self, page: Path, width: int, height: int = 900) -> None:
        """Open a page in a window of this size, and wait until it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        where = {"behavior": "allow", "downloadPath": str(self.downloads)}
        self.ask("Page.setDownloadBehavior", **where)
        self._seen.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._hear()

    def run(self, script: str) -> Any:
        """Return the value of an expression of JavaScript."""
        given = {"expression": script, "returnByValue": True, "awaitPromise": True}
        said = self.ask("Runtime.evaluate", **given, userGesture=True)
        assert "exceptionDetails" not in said, said["exceptionDetails"]
        return said["result"].get("value")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command of the debugging protocol, and return its result."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": params, **session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (said := self._hear()).get("id") != self._number:
            pass
        assert "error" not in said, said["error"]
        return said["result"]

    def close(self) -> None:
        os.close(self._write)
        os.close(self._read)
        self._process.kill()
        self._process.wait()

    def _targets(self) -> list[dict[str, Any]]:
        while not (found := self.ask("Target.getTargets")["targetInfos"]):
            pass
        return found

    def _hear(self) -> dict[str, Any]:
        """Return the next message; keep what it says of errors."""
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], LONGEST)[0], "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        said = json.loads(line)
        params = said.get("params", {})
        self._seen.append(said.get("method", ""))
        if said.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif said.get("method") == "Log.entryAdded":
            self.errors.append(json.dumps(params["entry"]))
        elif said.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(params["args"]))
        return said


def _high(number: int) -> int:
    high = fcntl.fcntl(number, fcntl.F_DUPFD, 10)
    os.close(number)
    return high
