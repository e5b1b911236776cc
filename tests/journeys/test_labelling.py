"""Labels 20 pictures in a real browser, with the server killed in the middle."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headstart.data.table import read_table
from support import COLOURS, draw, rows_of

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


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    made = Tab(tmp_path / "browser")
    yield made
    made.close()


def serve(programs: Path, folder: Path, *options: str) -> tuple[int, str, subprocess.Popen[str]]:
    """Starts `headstart label`; gives its process number and the address of its page."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [str(programs / "python"), "-c", SERVE, "label", "--browser=false", *options]
    client = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert client.stdout
    pid = int(client.stdout.readline())
    found = re.match(r"page: +(http://127\.0\.0\.1:\d+/\S+/)", client.stdout.readline())
    assert found
    return pid, found[1], client


@pytest.mark.fault("kill while pictures are labelled")
@pytest.mark.skipif(BROWSER is None, reason="needs chromium; .ci/run installs it")
def test_twenty_pictures_are_labelled_by_key_through_a_kill(tab, programs, tmp_path):
    draw(tmp_path / "heap", images=7)
    (tmp_path / "heap/blue/006.png").unlink()
    names = sorted(COLOURS)
    options = "--data.root=heap", f"--classes={','.join(names)}"
    labels = tmp_path / "labels.csv"

    def label(pictures: range) -> None:
        for done in pictures:
            tab.until(f"document.readyState == 'complete' && document.title == '{done} of 20 labelled'")
            assert tab.value("document.images[0].naturalWidth") == 48
            picture = tab.value("document.images[0].nextElementSibling.innerText")
            assert done == 0 or len(rows_of(labels)) == done  # before the picture was shown
            tab.press(str(1 + names.index(picture.split("/")[0])))

    pid, address, client = serve(programs, tmp_path, *options)
    tab("Page.navigate", url=address)
    label(range(11))
    tab.until("document.title == '11 of 20 labelled'")
    os.kill(pid, signal.SIGKILL)
    client.communicate()
    assert len(rows_of(labels)) == 11

    pid, address, client = serve(programs, tmp_path, *options)
    tab("Page.navigate", url=address)
    tab.until("document.title == '11 of 20 labelled'")
    tab.press("u")  # also what was answered before the kill
    label(range(10, 20))
    tab.until("document.title == '20 of 20 labelled'")
    os.kill(pid, signal.SIGINT)
    assert "20 of 20 images labelled" in client.communicate()[0]
    assert tab.told == []
    class_names, items = read_table(labels)
    assert class_names == names
    assert len(items) == 20
    assert all(item.path.split("/")[1] == class_names[item.label] for item in items)
