"""Labels 20 pictures in a real browser, with the server killed in the middle."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import BROWSER, SERVE, Tab

from headstart.data.table import read_table
from support import COLOURS, draw, rows_of


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


@pytest.mark.fault("kill during labelling")
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
