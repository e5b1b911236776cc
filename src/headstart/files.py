"""Reading and writing files: atomic, never overwriting, with one-line errors."""

import csv
import errno
import io
import os
import secrets
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from headstart.errors import UserError

T = TypeVar("T")

RUNS_MARK = ".headstart-runs"  # marks a folder of runs, so that it is not taken for a class
# Transient errors of a network disk or an overloaded process, which say nothing about the file.
PASSING = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ETIMEDOUT}
PAUSES = (0.1, 1.0)  # seconds before each new attempt


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder; when complete, it is flushed to disk and renamed to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # the error of a full disk names no file
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    with atomically(path) as temporary:
        temporary.write_bytes(data)


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, on POSIX systems."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_regular(path: Path) -> bytes:
    """Reads a regular file, following links; a FIFO would block, and a device could fill the memory."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a NUL byte in its name")
    path = in_either_form(path)
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file")
    return path.read_bytes()


def in_either_form(path: Path) -> Path:
    """The path, or the existing one in the other Unicode form: composed as on Linux, or decomposed as on a Mac."""
    if str(path).isascii() or path.exists() or path == path.parent:
        return path
    parent = in_either_form(path.parent)
    forms = (parent / unicodedata.normalize(form, path.name) for form in ("NFC", "NFD"))
    return next((found for found in (parent / path.name, *forms) if found.exists()), path)


def may_pass(error: BaseException) -> bool:
    """Whether an error is transient, so that the file must not be recorded as damaged."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in PASSING)


class Unavailable(UserError):
    """A file could not be read because of a transient error."""


def patiently(path: Path | str, read: Callable[[], T]) -> T:
    """Calls ``read``, again after a transient error, and raises ``Unavailable`` if the error persists."""
    for pause in (*PAUSES, None):
        try:
            return read()
        except (OSError, MemoryError) as error:
            if not may_pass(error):
                raise
            if pause is None:
                why = getattr(error, "strerror", None) or "out of memory"
                raise Unavailable(f"{path}: cannot be read now ({why}); this may be temporary, so try again") from error
            time.sleep(pause)
    raise AssertionError


def new_path(option: str, given: str | Path) -> Path:
    """The path of a file to write, which must not exist yet."""
    path = Path(given).expanduser()
    if path.exists():
        raise UserError(f"{option}={path}: already exists; give another name")
    return path


def check_writable(option: str, given: str | Path, folder: Path) -> None:
    """Refuses a folder that nothing can be written to, before any work."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{option}={given}: cannot be written ({error.strerror})") from error


@contextmanager
def new_file(option: str, given: str | Path) -> Iterator[Path]:
    """Yields a temporary path; when complete, it becomes the file, which must not exist yet."""
    path = new_path(option, given)
    try:
        with atomically(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{option}={path}: cannot be written ({error.strerror})") from error


def write_new(option: str, given: str | Path, data: bytes) -> Path:
    """Writes a file that must not exist yet."""
    with new_file(option, given) as temporary:
        temporary.write_bytes(data)
    return Path(given).expanduser()


@contextmanager
def claim_by_rename(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder, renamed to ``folder`` when complete; the second of two concurrent ones is dropped."""
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


def csv_bytes(rows: Iterable[Iterable[object]]) -> bytes:
    """Formats rows as CSV; file names that are not Unicode keep their bytes."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")


def read_csv(option: str, file: Path, columns: Sequence[str], errors: str = "strict") -> list[dict[str, str]]:
    """Reads a CSV file with at least ``columns``, as rows by column name; ``errors`` is as for ``bytes.decode``."""
    try:
        text = read_regular(file).decode("utf-8-sig", errors)
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = [name.strip() for name in reader.fieldnames or []]
        if len(set(names)) < len(names):
            raise UserError(f"{option}={file}: a column name appears twice in its first line; rename one")
        rows = [dict(zip(names, (value or "" for value in row.values()), strict=False)) for row in reader]
    except UnicodeDecodeError as error:
        raise UserError(f"{option}={file}: not UTF-8; save the file as UTF-8") from error
    except (OSError, csv.Error) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"{option}={file}: cannot be read as CSV ({why})") from error
    if missing := [name for name in columns if name not in names]:
        raise UserError(f"{option}={file}: lacks {', '.join(missing)}; its first line must name {', '.join(columns)}")
    return rows


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested values to dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
