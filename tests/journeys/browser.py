"""A headless Chromium, and a server that says its process number."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium")
SERVE = "import os, sys; print(os.getpid()); from headstart.cli import main; main(sys.argv[1:])"


class Tab:
    """A tab of a headless Chromium, driven through its DevTools over a pipe."""

    def __init__(self, folder: Path) -> None:
        (read, self._to), (self._from, write) = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        options += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder}"]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # nothing but this machine
        command = f'exec "$0" "$@" 3<&{read} 4>&{write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(BROWSER), *options, "--remote-debugging-pipe"],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self._number, self._buffer, self._session = 0, b"", {}
        self.told: list[str] = []  # what the console says
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        self("Log.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        request = {"id": self._number, "method": method, "params": parameters} | self._session
        os.write(self._to, json.dumps(request).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                read = os.read(self._from, 65_536)
                assert read, "the browser has ended"
                self._buffer += read
            line, self._buffer = self._buffer.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("method") == "Log.entryAdded":
                self.told.append(answer["params"]["entry"]["text"])
            if answer.get("id") == self._number:
                return answer.get("result", {})

    def value(self, expression: str) -> Any:
        """Of JavaScript on the page; None while it is loading."""
        return self("Runtime.evaluate", expression=expression).get("result", {}).get("value")

    def until(self, expression: str) -> Any:
        """Waits until it is true."""
        for _ in range(500):
            if found := self.value(expression):
                return found
            time.sleep(0.02)
        raise AssertionError(f"{expression}: never; the page says {self.value('document.body.innerText')}")

    def press(self, key: str) -> None:
        self("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self("Input.dispatchKeyEvent", type="keyUp", key=key)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
