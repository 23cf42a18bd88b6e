"""A headless Chromium, driven through its DevTools protocol over two pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 30.0
FLAGS = (
    "--headless",
    "--hide-scrollbars",  # a picture of a page that scrolls would be cut where its bar was
    "--no-sandbox",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--window-size=1100,800",
)
# Chromium reads commands from descriptor 3 and writes answers to 4. The two given may be those
# very numbers, so they are moved out of the way first.
LAUNCH = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One page of a fresh browser. `events` are what the page told unasked."""

    def __init__(self, program: str, folder: Path) -> None:
        reads, self._out = os.pipe()
        self._in, writes = os.pipe()
        arguments = [sys.executable, "-c", LAUNCH, str(reads), str(writes), program, *FLAGS]
        self._process = subprocess.Popen(
            [*arguments, f"--user-data-dir={folder}"],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._received = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = None
        self.call("Browser.close")
        self._process.wait(PATIENCE_S)
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command. Raises RuntimeError with what the browser says of it."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") != self._count:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            if not select.select([self._in], [], [], PATIENCE_S)[0]:
                raise TimeoutError("the browser does not answer")
            read = os.read(self._in, 1 << 20)
            if not read:
                raise RuntimeError("the browser has ended")
            self._received += read
        message, _, self._received = self._received.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed

    def open(self, url: str) -> None:
        """Load a page, up to its load event, in a window of the size at the start."""
        self.events.clear()
        self.call("Emulation.clearDeviceMetricsOverride")
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState == 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, or of the promise it is.

        Raises RuntimeError if it throws.
        """
        answer = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The value of an expression once it is true. Raises TimeoutError."""
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            value = self.evaluate(expression)
            if value:
                return value
            time.sleep(0.02)
        raise TimeoutError(expression)

    def choose_files(self, selector: str, *paths: Path) -> None:
        """Set a file input, as the file dialog would."""
        found = self.call("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        object_id = found["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(p) for p in paths], objectId=object_id)

    def point_at(self, selector: str) -> None:
        """Move the mouse to the middle of an element, which is scrolled into view."""
        x, y = self._middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Press and release the mouse on an element."""
        self.point_at(selector)
        x, y = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def drop(self, selector: str, *paths: Path) -> None:
        """Drag files over an element and let go of them there."""
        x, y = self._middle(selector)
        held = {"items": [], "files": [str(p) for p in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=held)

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """Press a key that types nothing, by its name and its Windows virtual key code."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                modifiers=modifiers,
            )

    def type(self, selector: str, text: str) -> None:
        """Focus a field and type into it what it shall hold."""
        self.evaluate(
            f"(e => {{ e.focus(); e.select?.(); }})(document.querySelector({selector!r}))"
        )
        self.call("Input.insertText", text=text)

    def nameless(self) -> list[str]:
        """The roles of what a screen reader needs a name for, and has none.

        That is what can be focused, and lists whose rows can be.
        """
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            node["role"]["value"]
            for node in nodes
            if (
                node["role"]["value"] == "listbox"
                or any(p["name"] == "focusable" for p in node.get("properties", ()))
            )
            and not node.get("name", {"value": ""})["value"].strip()
        ]

    def _middle(self, selector: str) -> tuple[float, float]:
        x, y = self.evaluate(
            f"(e => {{ e.scrollIntoView({{block: 'nearest'}}); const b = e.getBoundingClientRect();"
            f" return [b.x + b.width / 2, b.y + b.height / 2]; }})"
            f"(document.querySelector({selector!r}))"
        )
        return x, y

    def resize(self, width: int, height: int) -> None:
        """Give the page a window of so many pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def screenshot(self) -> bytes:
        """The whole page as a PNG file."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        return base64.b64decode(shot)

    def complaints(self) -> list[str]:
        """Exceptions of the page's script, and errors the browser logged (as of a broken CSP)."""
        self.call("Runtime.evaluate", expression="0")
        return [
            json.dumps(event["params"])
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
            or (
                event.get("method") == "Log.entryAdded"
                and event["params"]["entry"]["level"] == "error"
            )
        ]

    def requested(self) -> list[str]:
        """The URLs the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]


def opened(folder: Path) -> Iterator[Browser]:
    """A Chromium for a fixture, closed behind it. Skips where there is none."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on the path")
    browser = Browser(program, folder)
    yield browser
    browser.close()
