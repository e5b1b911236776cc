"""A cache and a folder for each test, a trained run to copy, and commands that must end in one line."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the workers of pytest-xdist share the cores

os.environ["HEADSTART_OFFLINE"] = "1"  # no test reaches for the network

import shutil
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from headstart.terminal import say_once
from support import TINY, at_most, draw, working_in

# The same examples in each run, since luck should not decide whether a change lands.
# `pytest tests/test_properties.py --hypothesis-profile=default` searches on.
settings.register_profile("fixed", derandomize=True)
settings.load_profile("fixed")

# Rows of docs/faults.md that were tried -> whether all of their tests passed.
tried: dict[str, bool] = {}
tracebacks: list[str] = []
counts: list[str] = []  # what tests counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Notes a test's rows in its report, which reaches the process that counts them."""
    if call.when == "call" and (rows := [row for mark in item.iter_markers("fault") for row in mark.args]):
        traceback = call.excinfo is not None and not call.excinfo.errisinstance(AssertionError)
        item.user_properties.append(("fault", {"rows": rows, "traceback": traceback}))
    report = yield
    if report.skipped and "HEADSTART_NO_SKIPS" in os.environ:  # of .ci/run: a missing package must not hide a failure
        report.outcome, report.longrepr = "failed", f"skipped, which is not allowed here: {report.longrepr}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, found in report.user_properties if report.when == "call" else []:
        if name == "fault":
            tried.update({row: tried.get(row, True) and report.passed for row in found["rows"]})
            tracebacks.extend([report.nodeid] * found["traceback"])
        elif name == "counts":
            counts.append(found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tried:
        told = f"{len(tried)} rows tried, {sum(tried.values())} as wanted, {len(tracebacks)} tracebacks"
        terminalreporter.write_line(f"docs/faults.md: {told}")
    for line in counts:
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has a cache and a working directory of its own."""
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["headstart"])
    say_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def nothing_hangs(request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Each test has a limit: what hangs fails, and does not hold up the others."""
    if not hasattr(signal, "SIGALRM"):  # Windows
        yield
        return
    limits = {"slow": 3600, "gpu": 3600, "journey": 900}
    with at_most(next((limits[name] for name in limits if request.node.get_closest_marker(name)), 180)):
        yield


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    return draw(tmp_path / "colours")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the colours, a run on them of three epochs in `logs`, and its cache: for copies."""
    from headstart.cli import main

    folder = tmp_path_factory.mktemp("trained")
    with working_in(folder):
        main(
            [
                "train",
                f"--data.root={draw(folder / 'colours')}",
                *TINY,
                "--model.lr=0.1",
                "--report=false",
                "--trainer.max_epochs=3",
            ]
        )
    return folder


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path, own_cache: Path) -> Path:
    """The best checkpoint of a run on the colours, in a copy of its folder that a test may change, with its cache.

    The images themselves are shared by all tests, and are only read.
    """
    shutil.copytree(trained / "logs", tmp_path / "logs")
    shutil.copytree(trained / "cache", own_cache)
    return next(tmp_path.glob("logs/*/*/checkpoints/best.ckpt"))


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The backbone of `train`'s runs, what computes it in int8, and the folder that keeps it."""
    from headstart.features.int8 import Int8Backbone
    from headstart.model.backbone import FrozenBackbone

    backbone, folder = FrozenBackbone("timm/test_resnet", "random", 32), tmp_path_factory.mktemp("quantised")
    return backbone, Int8Backbone(backbone, folder), folder / "int8"


@pytest.fixture
def kept(quantised: tuple[Any, Any, Path], own_cache: Path) -> Path:
    """The cache's folder of quantised networks, with that of `train`'s backbone."""
    return Path(shutil.copytree(quantised[2], own_cache / "int8"))


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains through the command line, on a tiny backbone and without a report; gives the content of `result.json`."""
    from headstart.cli import main

    def run(root: Path, *options: str) -> dict[str, Any]:
        defaults = [f"--data.root={root}", *TINY, "--report=false"]
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


@pytest.fixture
def stand_in_for_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local file in the place of torchvision's download, found and checked by the same code."""
    import hashlib

    import torch
    from torchvision import models

    from headstart.images import Preprocessing
    from headstart.model import families, weights

    torch.manual_seed(1)
    made = tmp_path / "made.pth"
    torch.save(models.resnet18().state_dict(), made)
    digest = hashlib.sha256(made.read_bytes()).hexdigest()
    served = made.rename(tmp_path / f"resnet18-{digest[:8]}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HEADSTART_OFFLINE")
    monkeypatch.setattr(families.Torchvision, "official", lambda self, name: (served.as_uri(), Preprocessing()))
    monkeypatch.setitem(weights.SHA256, served.name, digest)
    return served
