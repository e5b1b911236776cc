"""The demo page in a real browser, which can reach nothing but this machine."""

import os
import re
import signal
import subprocess
import sys

import pytest
from browser import BROWSER, SERVE, Tab

from support import REPOSITORY


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_dropped_picture_is_answered(checkpoint, trained, tmp_path):
    command = [sys.executable, "-c", SERVE, "demo", f"--ckpt_path={checkpoint}"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src"), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    pid = int(process.stdout.readline())
    lines = iter(process.stdout.readline, "")
    address = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\S+/", line)))
    tab = Tab(tmp_path / "browser")
    try:
        tab("Network.enable")
        tab("Page.navigate", url=address)
        tab.until("document.readyState === 'complete' && !!document.querySelector('input')")
        document = tab("DOM.getDocument")["root"]["nodeId"]
        node = tab("DOM.querySelector", nodeId=document, selector="input")["nodeId"]
        tab("DOM.setFileInputFiles", nodeId=node, files=[str(trained / "colours/red/003.png")])
        tab.until("!document.querySelector('#found').hidden")
        assert tab.value("document.querySelector('.answer').textContent") == "red"
        tab.until(
            "document.querySelector('#map').naturalWidth > 0 && document.querySelector('#shown').naturalWidth > 0"
        )
        assert tab.value("document.querySelectorAll('.near img').length") == 6
        assert tab.value("document.querySelectorAll('#bars .row').length") == 3
        tab("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
        assert tab.value("document.documentElement.scrollWidth") == 400  # nothing sticks out of a phone's page
        (tmp_path / "note.txt").write_text("no picture")
        tab("DOM.setFileInputFiles", nodeId=node, files=[str(tmp_path / "note.txt")])
        tab.until("document.querySelector('#said').textContent.includes('cannot be used')")
        assert tab.value("document.querySelector('#found').hidden") is True
        resources = tab.value("JSON.stringify(performance.getEntriesByType('resource').map(entry => entry.name))")
        assert "//" not in resources.replace(address, "").replace("http://127.0.0.1", "")
        assert not [line for line in tab.told if "400" not in line]  # the browser's console
    finally:
        tab.close()
        os.kill(pid, signal.SIGINT)
        assert process.wait(timeout=30) == 0
        process.stdout.close()
