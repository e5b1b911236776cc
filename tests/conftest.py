"""Small images that the tests draw, and a run of the command line on them."""

import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from headstart.terminal import say_once

# The same examples in each run, since luck should not decide whether a change lands.
# `pytest tests/test_properties.py --hypothesis-profile=default` searches on.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

REPOSITORY = Path(__file__).parent.parent
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def draw(folder: Path, images: int = 20, seed: int = 0, colours: dict[str, tuple[int, int, int]] = COLOURS) -> Path:
    """A folder of noisy squares, a colour a class; a linear head on any features tells them apart."""
    random = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            pixels = np.clip(np.array(colour) + random.integers(-30, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03}.png")
    return folder


# Rows of docs/faults.md that were tried -> whether all of their tests passed.
tried: dict[str, bool] = {}
tracebacks: list[str] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    if call.when == "call":
        error = call.excinfo
        for mark in item.iter_markers("fault"):
            for row in mark.args:
                tried[row] = tried.get(row, True) and error is None
            if error is not None and not error.errisinstance(AssertionError):
                tracebacks.append(item.name)
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tried:
        told = f"{len(tried)} rows tried, {sum(tried.values())} as wanted, {len(tracebacks)} tracebacks"
        terminalreporter.write_line(f"docs/faults.md: {told}")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache and a working directory of its own."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["headstart"])
    say_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return draw(tmp_path / "colours")


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains through the command line, on 32 pixels and without a report, and gives the content of `result.json`."""
    from headstart.cli import main

    def run(root: Path, *options: str) -> dict[str, Any]:
        defaults = [f"--data.root={root}", "--model.image_size=32", "--report=false"]
        result: dict[str, Any] = main(["train", *defaults, *options])
        return result

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that has to end in one line and exit status 2, and gives the line."""
    from headstart.cli import main

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as exit_:
            main(list(args))
        assert exit_.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def newest_run(logs: Path = Path("logs")) -> Path:
    return max(logs.glob("*/*/"), key=lambda path: path.stat().st_mtime)


@pytest.fixture
def stand_in_for_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local file in the place of torchvision's download, found and checked by the same code."""
    import hashlib

    import torch
    from torchvision import models

    from headstart import backbone

    torch.manual_seed(1)
    made = tmp_path / "made.pth"
    torch.save(models.resnet18().state_dict(), made)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    served = made.rename(tmp_path / f"resnet18-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    official = models.ResNet18_Weights.IMAGENET1K_V1

    class StandIn:
        url = served.as_uri()
        transforms = staticmethod(official.transforms)

    monkeypatch.setattr(backbone, "_imagenet_weights", lambda name: StandIn)
    monkeypatch.setitem(backbone.SHA256, served.name, digest)
    return served
