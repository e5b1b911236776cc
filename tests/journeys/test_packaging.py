"""The wheel, and what the repository promises about itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headstart
from conftest import REPOSITORY


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository as git would hand it out."""
    folder = tmp_path_factory.mktemp("copy") / "headstart"
    subprocess.run(["git", "-C", str(REPOSITORY), "checkout-index", "-a", f"--prefix={folder}/"], check=True)
    return folder


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
    assert "headstart train" in done.stdout
    shown = "import headstart.backbone as b; print(b.__file__, b.BUNDLED.stat().st_size)"
    where = subprocess.run(
        [sys.executable, "-c", shown],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert where.startswith(str(installed))
    assert where.split()[-1] == "22383168"


def test_the_changelog_knows_this_version():
    assert f"## {headstart.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_floor_says_why():
    text = (REPOSITORY / "pyproject.toml").read_text()
    dependencies = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert dependencies
    for line in dependencies[1].splitlines():
        assert re.search(r">=[\d.]+.*\",  # \w", line), line


def test_the_constraints_are_the_versions_tested_and_fit_the_floors():
    pinned = dict(
        line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if "==" in line
    )
    for name in ("torch", "torchvision", "pytorch-lightning", "torchmetrics", "tensorboard", "jsonargparse"):
        assert name in pinned


def test_the_demo_data_is_as_described():
    folders = sorted((REPOSITORY / "data/clipart").iterdir())
    assert len(folders) == 12
    assert sum(len(list(folder.glob("*.png"))) for folder in folders) == 590


@pytest.mark.gpu
def test_a_gpu_trains_in_mixed_precision(colours, train):
    for cache in ("true", "false"):
        result = train(
            colours,
            "--trainer.accelerator=gpu",
            "--trainer.devices=1",
            "--trainer.precision=bf16-mixed",
            f"--data.cache={cache}",
            "--model.lr=0.02",
        )
        assert result["test/acc"] == 1.0


def test_no_path_of_a_machine_is_in_the_tree():
    tracked = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "*.py", "*.md", "*.yaml", "*.toml", ".ci/run"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in tracked:
        assert not re.search(r"(?<![\w.])/(home|root|Users)/", Path(REPOSITORY / name).read_text()), name
