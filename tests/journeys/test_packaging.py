"""The wheel, installed and used elsewhere."""

import json
import os
import re
import shutil
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


def test_the_docker_image_trains(copy, colours):
    """Where docker answers, the image is built and run; else what the Dockerfile names is looked up."""
    text = (copy / "Dockerfile").read_text()
    sources = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert len(sources) >= 7
    assert not [name for name in sources if not (copy / name).exists()]
    project = (copy / "pyproject.toml").read_text()
    (extra,), (command,) = (
        re.findall(r"\.\[(\w+)\]", text),
        re.findall(r"^ENTRYPOINT \[\"(.*)\"\]$", text, re.MULTILINE),
    )
    assert f"\n{extra} = [" in project
    assert f"\n{command} = " in project.split("[project.scripts]")[1]
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, check=False).returncode:
        return
    subprocess.run([docker, "build", "-q", "-t", "headstart-test", str(copy)], check=True)
    options = ["--data.root=/photos", "--trainer.max_epochs=1", "--report=false"]
    run = [docker, "run", "--rm", "-v", f"{colours}:/photos:ro", "headstart-test", "train", *options]
    assert "run:" in subprocess.run(run, capture_output=True, text=True, check=True).stdout
