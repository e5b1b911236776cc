"""Whole processes: what a user types, in a copy of the repository. All tests of this folder are journeys."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import quick_python

from support import REPOSITORY, draw


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.journey)


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a quick `python` and `headstart`, for the front of the PATH."""
    folder = quick_python.programs(tmp_path_factory.mktemp("programs") / "bin")
    command = [sys.executable, quick_python.__file__, str(folder / "socket")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    assert server.stdout.readline() == "ready\n"
    yield folder
    server.kill()
    server.wait()
    server.stdout.close()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository as git would hand it out, with a folder of photos in it, and one of domains."""
    folder = tmp_path / "headstart"
    subprocess.run(["git", "-C", str(REPOSITORY), "checkout-index", "-a", f"--prefix={folder}/"], check=True)
    draw(folder / "path/to/photos")
    for seed, domain in enumerate(("photo", "sketch")):
        draw(folder / "path/to/world" / domain, images=10, seed=seed)
    return folder


@pytest.fixture
def run(copy: Path, programs: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command in the copy, whose package `python` and `headstart` import."""
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["HF_DATASETS_CACHE"] = str(copy / "cache")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)

    return run
