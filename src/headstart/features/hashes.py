"""Content hashes: of images, remembered between runs, and of the cache's own files. Imports no torch."""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import platformdirs

from headstart.errors import UserError
from headstart.files import passes, read_regular, write_atomically

# A file changed this shortly before it was hashed could change again within the clock's grain, unseen.
GRAIN_NS = 2 * 10**9

Stamp = list[int]


def cache_folder(chosen: str | None = None) -> Path:
    """``--data.cache_dir``, else ``$HEADSTART_CACHE``, else the user's cache folder."""
    return Path(chosen or os.environ.get("HEADSTART_CACHE") or platformdirs.user_cache_dir("headstart")).expanduser()


def verify(shard: Path) -> None:
    """Compares a shard's content with the checksum in its name; ``ValueError`` where they differ."""
    if sha256(shard).hex() != shard.stem.rsplit("-", 1)[-1]:
        raise ValueError("checksum differs")


def sha256(path: Path) -> bytes:
    """The digest of a file's content."""
    return hashlib.sha256(read_regular(path)).digest()


class ContentIndex:
    """The hashes of the files below ``root``, remembered in ``folder`` between runs; without one nothing is remembered.

    A remembered hash counts only while the file's size, mtime, ctime and inode are the same; ctime cannot be set back,
    so a change hidden from mtime is seen too. The index has its own checksum, and a damaged one is made anew.
    """

    def __init__(self, root: Path, folder: Path | None) -> None:
        self.root = root
        self._file = folder / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:32]}.json" if folder else None
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
            except (OSError, ValueError) as error:  # a name with a NUL byte is a ValueError
                if isinstance(error, OSError) and passes(error):
                    raise UserError(f"{self.root / path}: cannot be read now ({error.strerror}); try again") from error
                unreadable[path] = f"unreadable: {getattr(error, 'strerror', error)}"
            advance(1)
        if found != self._known:
            self._save(found)
        return {path: bytes.fromhex(digest) for path, (_, digest) in found.items()}, unreadable

    def _load(self) -> dict[str, tuple[Stamp, str]]:
        if self._file is None:
            return {}
        try:
            checksum, body = read_regular(self._file).split(b"\n", 1)
            if checksum.decode() != hashlib.sha256(body).hexdigest():
                return {}
            known = {path: (stamp, digest) for path, (stamp, digest) in json.loads(body).items()}
            return {path: entry for path, entry in known.items() if len(bytes.fromhex(entry[1])) == 32}
        except (OSError, ValueError, TypeError, AttributeError):  # or of another form
            return {}

    def _save(self, found: dict[str, tuple[Stamp, str]]) -> None:
        if self._file is None:
            return
        body = json.dumps(found).encode()
        with suppress(OSError):  # only the fast path is lost; the features say it if the folder cannot be written
            write_atomically(self._file, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
