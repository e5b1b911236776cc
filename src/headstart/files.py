"""Content hashes of files, with a fast path for files that did not change since they were hashed."""

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# A file changed this shortly before it was hashed could change again within the clock's grain, unseen.
GRAIN_NS = 2 * 10**9

Stamp = list[int]


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a whole file or nothing: a temporary file in the same folder, flushed to disk, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """Rows as the content of a CSV file; a file's name that is no Unicode keeps its bytes."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _flush_folder(folder: Path) -> None:
    """Makes a rename last through a power failure, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def claim_by_rename(folder: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name when it is whole; who comes second finds the first one's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> bytes:
    """The digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).digest()


class ContentIndex:
    """The hashes of a folder's files, remembered between runs.

    A remembered hash counts only while the file's size, mtime, ctime and inode are the same; ctime cannot be set back,
    so a change hidden from mtime is seen too. The file carries its own checksum, and a damaged one is made anew.

    Args:
        root: the folder that the paths are relative to.
        folder: where the index lies; None: nothing is remembered.
    """

    def __init__(self, root: Path, folder: Path | None) -> None:
        self.root = root
        self._file = folder / f"{hashlib.sha256(str(root).encode()).hexdigest()[:32]}.json" if folder else None
        self._known: dict[str, tuple[Stamp, str]] = self._load()

    def digests(self, paths: list[str], advance: Callable[[int], None]) -> tuple[dict[str, bytes], dict[str, str]]:
        """The sha256 of each file by its path, and the reason for each that cannot be read."""
        found: dict[str, tuple[Stamp, str]] = {}
        unreadable: dict[str, str] = {}
        now = time.time_ns()
        for path in paths:
            try:
                stat = (self.root / path).stat()
                stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
                known = self._known.get(path)
                settled = max(stat.st_mtime_ns, stat.st_ctime_ns) < now - GRAIN_NS
                if known and known[0] == stamp:
                    found[path] = known
                else:
                    found[path] = (stamp if settled else [], sha256(self.root / path).hex())
            except FileNotFoundError:
                unreadable[path] = "missing, or a broken symbolic link"
            except OSError as error:
                unreadable[path] = f"unreadable: {error.strerror}"
            advance(1)
        if found != self._known:
            self._save(found)
        return {path: bytes.fromhex(digest) for path, (_, digest) in found.items()}, unreadable

    def _load(self) -> dict[str, tuple[Stamp, str]]:
        if self._file is None or not self._file.is_file():
            return {}
        try:
            checksum, body = self._file.read_bytes().split(b"\n", 1)
            if checksum.decode() != hashlib.sha256(body).hexdigest():
                return {}
            return {path: (stamp, digest) for path, (stamp, digest) in json.loads(body).items()}
        except (OSError, ValueError):
            return {}

    def _save(self, found: dict[str, tuple[Stamp, str]]) -> None:
        if self._file is None:
            return
        body = json.dumps(found).encode()
        with suppress(OSError):  # only the fast path is lost; the features say it if the folder cannot be written
            write_atomically(self._file, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
