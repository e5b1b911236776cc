"""Small images that the tests draw, where to find what a run left, and a limit for what could hang."""

import contextlib
import csv
import ctypes
import re
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
# What a reader reads, by name: `README`, `train`, …
PAGES = {path.stem: path for path in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]}
# A backbone that costs nothing: half of a short run with resnet18 is making, hashing and folding it.
TINY = ("--model.backbone=timm/test_resnet", "--model.weights=random", "--model.image_size=32")
RESNET18 = ("--model.backbone=resnet18", "--model.weights=bundled")  # for what a tiny backbone cannot tell apart
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


class Block(NamedTuple):
    """A block of code in a page."""

    language: str
    tag: str  # how it is run; see tests/journeys/test_documents.py
    text: str


def blocks(page: str, language: str = "", tag: str = "") -> list[Block]:
    """A page's blocks, from top to bottom; those of a language or with a tag, where these are given."""
    found = re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```", PAGES[page].read_text(), re.DOTALL | re.MULTILINE)
    return [block for block in map(Block._make, found) if block[:2] == (language or block[0], tag or block[1])]


def dead_links(root: Path) -> list[str]:
    """Links between a checkout's pages that lead nowhere, as `page: target`; also those to a heading."""
    dead = []
    for page in [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("data/*.md")]:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            if not file.exists() or (anchor and anchor not in headings(file)):
                dead.append(f"{page.relative_to(root)}: {target}")
    return dead


def headings(page: Path) -> list[str]:
    """The addresses that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Makes a folder the working directory, with a cache in it: for runs that several tests read."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("HEADSTART_CACHE", str(folder / "cache"))
        yield


def newest_run(logs: Path = Path("logs")) -> Path:
    return max(logs.glob("*/*/"), key=lambda path: path.stat().st_mtime)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file by column name."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def features(cache: Path) -> dict[bytes, bytes]:
    """Every row and its features, to compare caches whose pieces were cut elsewhere."""
    from headstart.features.matrix import Shard

    shards = [Shard.open(path) for path in cache.glob("features/*/*.safetensors")]
    return {row: line.numpy().tobytes() for each in shards for row, line in zip(each.rows, each.features, strict=True)}


@contextlib.contextmanager
def mypy_cache() -> Iterator[Path]:
    """The repository's own cache of mypy, by one process at a time: without one, a check takes 20 seconds."""
    folder = REPOSITORY / ".mypy_cache"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        yield folder


@contextlib.contextmanager
def killed_at(epoch: int, module: type, hook: str = "on_train_epoch_start") -> Iterator[None]:
    """What is trained within ends, as if killed, at the hook of that epoch."""

    def kill(self: Any) -> None:
        if self.current_epoch == epoch:
            raise RuntimeError("killed")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, hook, kill)
        with pytest.raises(RuntimeError, match="killed"):
            yield


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """A hang is a failure; within another limit, that one holds again afterwards."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hangs: took more than {seconds} s"))
    left = signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(left)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def without_roots_rights() -> Iterator[None]:
    """Within, the modes of files count for this thread, and those that it starts, also where root runs the tests."""
    libc, header = ctypes.CDLL(None, use_errno=True), struct.pack("Ii", 0x20080522, 0)  # capabilities, third version
    before = ctypes.create_string_buffer(24)
    assert libc.capget(header, before) == 0
    override = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    effective, *rest = struct.unpack("6I", before.raw)
    assert libc.capset(header, struct.pack("6I", effective & ~override, *rest)) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0
