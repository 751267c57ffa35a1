"""Opens a page in headless Chromium as a screen of any width would, over its debugging protocol on two pipes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROBE = """JSON.stringify({
  scrolls: document.documentElement.scrollWidth,
  width: innerWidth,
  images: [...document.images].map(one => ({
    alt: one.alt, pixels: one.naturalWidth, shown: one.getBoundingClientRect().width,
    left: one.getBoundingClientRect().left,
  })),
  boxes: [...document.querySelectorAll('.scroll')].map(one => one.getBoundingClientRect().right),
})"""

AS_3_AND_4 = """
import fcntl, os, sys
high = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, place in zip(high, (3, 4)):
    os.dup2(end, place)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Starts the browser with the two pipes where it looks for them; a shell could not name descriptors above 9."""


class Browser:
    """One page, whose requests are kept in `requests`."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = os.fdopen(to, "wb", buffering=0), os.fdopen(back, "rb", buffering=0)
        self._id, self._left, self._session = 0, b"", ""
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._id:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, width: int, dark: bool = False) -> dict[str, Any]:
        """Load a page and say how wide it and its pictures are."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.resolve().as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        found: dict[str, Any] = json.loads(self.call("Runtime.evaluate", expression=PROBE)["result"]["value"])
        return found

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            chunk = self._back.read(1 << 20)
            assert chunk, "the browser has ended"
            self._left += chunk
        text, _, self._left = self._left.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message


@contextmanager
def browser(chromium: str, profile: Path) -> Iterator[Browser]:
    """A browser for the length of a block; `profile` is an empty folder for what it keeps."""
    (theirs_in, to), (back, theirs_out) = os.pipe(), os.pipe()
    options = f"--headless --no-sandbox --disable-gpu --remote-debugging-pipe --user-data-dir={profile}"
    start = [sys.executable, "-c", AS_3_AND_4, str(theirs_in), str(theirs_out)]
    running = subprocess.Popen(
        [*start, chromium, *options.split()], pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Browser(to, back)
    finally:
        running.terminate()
        running.wait(30)
