"""A real browser, headless, spoken to over two pipes in its debugging protocol: pages as users see them."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here to open the page in")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars"),
    "--remote-debugging-pipe",  # it reads from 3 and writes to 4
)
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
LAYOUT = Path(__file__).with_name("layout.js").read_text(encoding="utf-8")
PATIENCE = 60.0  # seconds for an answer: the machine may be busy


class Browser:
    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        (read_there, self.write), (self.read, write_there) = os.pipe(), os.pipe()
        there = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_there, write_there)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, *map(str, there), PROGRAM, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=there,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for end in (read_there, write_there, *there):
            os.close(end)
        self.asked, self.unread, self.events = 0, b"", list[dict[str, Any]]()

    def ask(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer's result; what happens until then is kept in ``events``."""
        self.asked += 1
        question = {"id": self.asked, "method": method, "params": parameters}
        os.write(self.write, json.dumps(question | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            told = self.next()
            if told.get("id") == self.asked:
                assert "error" not in told, told
                return told["result"]
            self.events.append(told)

    def wait_for(self, event: str, session: str) -> None:
        while not any(told["method"] == event and told.get("sessionId") == session for told in self.events):
            self.events.append(self.next())

    def next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.read], [], [], max(0.0, until - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self.read, 1 << 20)
            assert more, "the browser has ended"
            self.unread += more
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, width: int, *, scheme: str = "light", media: str = "screen") -> Page:
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.ask(f"{domain}.enable")
        page.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        page.ask(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        page.ask("Page.navigate", url=path.as_uri())
        self.wait_for("Page.loadEventFired", page.session)
        return page

    def close(self) -> None:
        os.close(self.write)  # which ends it
        os.close(self.read)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


class Page:
    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.ask(method, self.session, **parameters)

    def run(self, script: str) -> Any:
        """What an expression of JavaScript is, as JSON values."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def faults(self) -> list[str]:
        """What is wrong with the page as it is laid out."""
        return self.run(LAYOUT)

    def told(self, *methods: str) -> list[dict[str, Any]]:
        """What happened in this page, of these kinds."""
        happened = (one for one in self.browser.events if one.get("sessionId") == self.session)
        return [one["params"] for one in happened if one["method"] in methods]

    def requests(self) -> list[str]:
        return [one["request"]["url"] for one in self.told("Network.requestWillBeSent")]

    def complaints(self) -> list[dict[str, Any]]:
        """Errors, warnings, refusals: whatever the console shows."""
        return self.told("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")

    def pdf(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True)["data"])

    def picture(self) -> bytes:
        """A PNG of what the window shows."""
        return base64.b64decode(self.ask("Page.captureScreenshot")["data"])


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with an empty profile, ended at the end."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()
