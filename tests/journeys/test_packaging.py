"""The wheel, installed and used elsewhere."""

import json
import os
import subprocess
import sys


def test_a_wheel_trains_from_any_folder(copy, colours, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(copy)], check=True
    )
    wheel = next(tmp_path.glob("*.whl"))
    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "-q", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "headstart", "train", f"--data.root={colours}", "--model.image_size=32"],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(next(elsewhere.glob("logs/colours/*/result.json")).read_text())
    assert result["test/acc"] == 1.0
    assert "headstart evaluate --ckpt_path=" in done.stdout  # the advice where all is right
    shown = "import headstart.model.weights as b; print(b.__file__, b.BUNDLED.stat().st_size)"
    where = subprocess.run(
        [sys.executable, "-c", shown],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(installed))
    assert where.split()[-1] == "22383160"
