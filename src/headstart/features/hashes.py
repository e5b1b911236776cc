"""Content hashes of images, stored between runs, and of the cache's own files. Imports no torch."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import platformdirs

from headstart.files import in_either_form, patiently, read_regular, write_atomically

# A file modified this recently could change again within the resolution of its timestamps, unnoticed.
GRAIN_NS = 2 * 10**9

Entry = tuple[list[int], str, int, float]  # stamp of a file or label of a row, hash, largest value, aspect ratio


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
    how many times as long as wide it is.
    """

    def __init__(self, root: Path, folder: Path | None, measure: Callable[[bytes], tuple[int, float]]) -> None:
        self.root, self._measure = root, measure
        self.measured: list[tuple[int, float]] = []  # of all readable files, after ``digests``
        self._file = index_file(folder, os.fsencode(root))
        self._known = recall(self._file)

    def digests(self, paths: list[str], advance: Callable[[int], None]) -> tuple[dict[str, bytes], dict[str, str]]:
        """The sha256 of each readable file, and the reason for each unreadable one, by path."""
        found: dict[str, Entry] = {}
        unreadable: dict[str, str] = {}
        now = time.time_ns()
        for path in paths:
            try:
                file = os.path.join(self.root, path)  # noqa: PTH118  # pathlib takes longer than the look at a file
                found[path] = patiently(file, partial(self._entry, path, file, now))
            except FileNotFoundError:
                unreadable[path] = "missing, or a broken symbolic link"
            except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
                unreadable[path] = f"unreadable: {getattr(error, 'strerror', error)}"
            advance(1)
        if found != self._known:
            remember(self._file, found)
        self.measured = [entry[2:] for entry in found.values()]
        return {path: bytes.fromhex(entry[1]) for path, entry in found.items()}, unreadable

    def _entry(self, path: str, file: str, now: int) -> Entry:
        stat = _stat(file)
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        known = self._known.get(path)
        if known and known[0] == stamp:
            return known
        settled = max(stat.st_mtime_ns, stat.st_ctime_ns) < now - GRAIN_NS
        data = read_regular(self.root / path)
        return stamp if settled else [], hashlib.sha256(data).hexdigest(), *self._measure(data)


def index_file(folder: Path | None, name: bytes) -> Path | None:
    """The file in ``folder`` that stores the hashes of what is named; None: they are not stored."""
    return folder / f"{hashlib.sha256(name).hexdigest()[:32]}.json" if folder else None


def recall(file: Path | None) -> dict[str, Entry]:
    """The hashes stored in a file, by path; empty if there are none, or the file is damaged."""
    if file is None:
        return {}
    try:
        checksum, body = read_regular(file).split(b"\n", 1)
        if checksum.decode() != hashlib.sha256(body).hexdigest():
            return {}
        known: dict[str, Entry] = {}
        for path, (stamp, digest, peak, aspect) in json.loads(body).items():
            known[path] = stamp, digest, int(peak), float(aspect)
        return {path: entry for path, entry in known.items() if len(bytes.fromhex(entry[1])) == 32}
    except (OSError, MemoryError, ValueError, TypeError, AttributeError):  # damaged, or another format
        return {}


def remember(file: Path | None, found: dict[str, Entry]) -> None:
    """Stores hashes for ``recall``."""
    if file is None:
        return
    body = json.dumps(found).encode()
    with suppress(OSError):  # only speed is lost; an unwritable folder is reported with the features
        write_atomically(file, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _stat(file: str) -> os.stat_result:
    try:
        return os.stat(file)  # noqa: PTH116
    except FileNotFoundError:
        return in_either_form(Path(file)).stat()
