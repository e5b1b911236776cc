"""Content hashes of images, stored between runs, and of the cache's own files. Imports no torch."""

import hashlib
import os
import time
from array import array
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import safetensors.numpy
from safetensors import SafetensorError

from headstart.files import in_either_form, patiently, read_regular, write_atomically

# A file modified this recently could change again within the resolution of its timestamps, unnoticed.
GRAIN_NS = 2 * 10**9
LARGEST = 2**63 - 1

Stamps = np.ndarray[Any, np.dtype[np.int64]]
Measures = np.ndarray[Any, np.dtype[np.float64]]


def cache_folder(chosen: str | None = None) -> Path:
    """``--data.cache_dir``, else ``$HEADSTART_CACHE``, else the user's cache folder."""
    return Path(chosen or os.environ.get("HEADSTART_CACHE") or platformdirs.user_cache_dir("headstart")).expanduser()


def verify(shard: Path) -> None:
    """Compares a shard's content with the checksum in its name; raises ``ValueError`` if they differ."""
    if sha256(shard).hex() != shard.stem.rsplit("-", 1)[-1]:
        raise ValueError("checksum differs")


def sha256(path: Path) -> bytes:
    """The sha256 of a file's content."""
    return hashlib.sha256(read_regular(path)).digest()


class ContentIndex:
    """The hashes of the files below ``root``, stored in ``folder`` between runs; None: not stored.

    A stored hash is valid while the file's size, mtime, ctime and inode are the same; ctime cannot be set back, so a
    change hidden from mtime is detected too. The index has its own checksum; a damaged one is rebuilt. With the
    hash is stored what ``measure`` finds in a file's content: the largest value of an image of more than 8 bits, and
    how many times as long as wide it is. It is a table with a row per file, since a million files are common.
    """

    def __init__(self, root: Path, folder: Path | None, measure: Callable[[bytes], tuple[int, float]]) -> None:
        self.root, self._measure = root, measure
        self.measured = np.empty((0, 2))  # of all readable files, after ``digests``
        self._file = index_file(folder, os.fsencode(root), "table")
        self._known = _Table.load(self._file)

    def digests(self, paths: list[str], advance: Callable[[int], None]) -> tuple[list[bytes | None], dict[str, str]]:
        """The sha256 of each file, None for an unreadable one; and the reason for each of these, by path."""
        now, unreadable, found = time.time_ns(), dict[str, str](), _Table.empty(paths)
        stamps = self._stamps(paths)
        row = self._known.rows(found.names, paths)
        same = (row >= 0) & (stamps[:, 0] >= 0)
        same[same] = (stamps[same] == self._known.stamps[row[same]]).all(axis=1)
        for name in ("stamps", "digests", "measures"):
            getattr(found, name)[same] = getattr(self._known, name)[row[same]]
        advance(int(same.sum()))
        for place in np.flatnonzero(~same).tolist():
            try:
                found.set(place, *patiently(self.root / paths[place], partial(self._entry, paths[place], now)))
            except FileNotFoundError:
                unreadable[paths[place]] = "missing, or a broken symbolic link"
            except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
                unreadable[paths[place]] = f"unreadable: {getattr(error, 'strerror', error)}"
            advance(1)
        if not same.all() or len(same) != len(self._known.stamps):
            found.save(self._file)
        readable = found.measures[:, 1] > 0
        self.measured, hashes = found.measures[readable], found.digests.tobytes()
        return [hashes[32 * n : 32 * n + 32] if ok else None for n, ok in enumerate(readable.tolist())], unreadable

    def _stamps(self, paths: list[str]) -> Stamps:
        """Size, mtime, ctime and inode of each file, [N, 4]; -1 for one that cannot be looked at."""
        found, start, stat = array("q"), os.path.join(self.root, ""), os.stat  # noqa: PTH118
        for path in paths:
            try:
                seen = stat(start + path)
                found.extend((seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino & LARGEST))
            except (OSError, ValueError):
                found.extend((-1, -1, -1, -1))
        return np.frombuffer(found, dtype=np.int64).reshape(-1, 4)

    def _entry(self, path: str, now: int) -> tuple[tuple[int, ...], bytes, tuple[int, float]]:
        """The stamp, hash and measures of a file; -1 in the stamp of one that could change unnoticed."""
        stat = in_either_form(self.root / path).stat()
        stamp = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino & LARGEST
        settled = max(stat.st_mtime_ns, stat.st_ctime_ns) < now - GRAIN_NS
        data = read_regular(self.root / path)
        return stamp if settled else (-1,) * 4, hashlib.sha256(data).digest(), self._measure(data)


@dataclass
class _Table:
    """A row per file."""

    names: bytes  # the paths of all, each with a NUL at its end
    stamps: Stamps  # [N, 4]; -1: unknown
    digests: "np.ndarray[Any, np.dtype[np.uint8]]"  # [N, 32]
    measures: Measures  # [N, 2]; 0 and 0 where a file was not read

    @classmethod
    def empty(cls, paths: list[str]) -> "_Table":
        names = os.fsencode("".join(f"{path}\0" for path in paths))
        count = len(paths)
        zeros = np.zeros((count, 32), np.uint8), np.zeros((count, 2))
        return cls(names, np.full((count, 4), -1, np.int64), *zeros)

    @classmethod
    def load(cls, file: Path | None) -> "_Table":
        """The table in a file; an empty one if there is none, or it is damaged."""
        if file is None:
            return cls.empty([])
        try:
            found = safetensors.numpy.load(read_checked(file))
            table = cls(found["names"].tobytes(), found["stamps"], found["digests"], found["measures"])
            shapes = [(each.dtype.str[1:], *each.shape[1:]) for each in (table.stamps, table.digests, table.measures)]
            rows = {table.names.count(b"\0"), len(table.stamps), len(table.digests), len(table.measures)}
            whole = shapes == [("i8", 4), ("u1", 32), ("f8", 2)] and len(rows) == 1
            return table if whole else cls.empty([])
        except (OSError, MemoryError, ValueError, KeyError, SafetensorError):  # damaged, or another format
            return cls.empty([])

    def save(self, file: Path | None) -> None:
        """Stores the table."""
        if file is None:
            return
        names = np.frombuffer(self.names, np.uint8)
        arrays: dict[str, Any] = {"stamps": self.stamps, "digests": self.digests, "measures": self.measures}
        with suppress(OSError):  # only speed is lost; an unwritable folder is reported with the features
            write_checked(file, safetensors.numpy.save({"names": names} | arrays))
            file.with_suffix(".json").unlink(missing_ok=True)  # of earlier versions

    def rows(self, names: bytes, paths: list[str]) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """The row of each path, [N]; -1 without one. ``names`` are the paths as in the table."""
        if names == self.names:  # nothing was added or removed
            return np.arange(len(paths))
        known = {name: row for row, name in enumerate(os.fsdecode(self.names).split("\0")[:-1])}
        return np.array([known.get(path, -1) for path in paths], dtype=np.int64)

    def set(self, row: int, stamp: tuple[int, ...], digest: bytes, measures: tuple[int, float]) -> None:
        """Fills a row."""
        self.stamps[row], self.measures[row] = stamp, measures
        self.digests[row] = np.frombuffer(digest, np.uint8)


def write_checked(file: Path, body: bytes) -> None:
    """Writes a file with the checksum of its content in its first line."""
    write_atomically(file, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def read_checked(file: Path) -> bytes:
    """The content of such a file; raises ``ValueError`` if it is damaged."""
    checksum, body = read_regular(file).split(b"\n", 1)
    if checksum.decode() != hashlib.sha256(body).hexdigest():
        raise ValueError("checksum differs")
    return body


def index_file(folder: Path | None, name: bytes, suffix: str = "json") -> Path | None:
    """The file in ``folder`` that stores the hashes of what is named; None: they are not stored."""
    return folder / f"{hashlib.sha256(name).hexdigest()[:32]}.{suffix}" if folder else None
