"""Small images that the tests draw, where to find what a run left, and a limit for what could hang."""

import contextlib
import ctypes
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


def newest_run(logs: Path = Path("logs")) -> Path:
    return max(logs.glob("*/*/"), key=lambda path: path.stat().st_mtime)


def features(cache: Path) -> dict[bytes, bytes]:
    """Every row and its features, to compare caches whose pieces were cut elsewhere."""
    from headstart.features.matrix import Shard

    shards = [Shard.open(path) for path in cache.glob("features/*/*.safetensors")]
    return {row: line.numpy().tobytes() for each in shards for row, line in zip(each.rows, each.features, strict=True)}


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
