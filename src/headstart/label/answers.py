"""The labels of images in a CSV file, in the form that `--data.csv` reads."""

import csv
import os
from pathlib import Path

from headstart.errors import UserError
from headstart.files import check_writable, csv_bytes, read_csv, read_regular, write_atomically

COLUMNS = ["path", "label"]  # the path is relative to the file


class Answers:
    """The labelled images in a file, which may not exist yet; a change is on the disk when its call returns.

    Rows that are there stay as they are, byte for byte, and further columns stay empty in new rows.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.expanduser().resolve()
        check_writable("--labels", file, self.file.parent)  # else the first answer would fail
        self.labels: dict[Path, str] = {}  # by absolute path, the newest last
        self._content, self._columns = self._read(), COLUMNS
        if not self.file.exists():
            return
        for line, row in enumerate(read_csv("--labels", self.file, COLUMNS, "surrogateescape"), start=2):
            path = Path(os.path.normpath(self.file.parent / row["path"].strip()))
            label = row["label"].strip()
            if not label:
                raise UserError(f"--labels={self.file}, line {line}: no label; a list to be labelled is --queue")
            if path in self.labels:
                raise UserError(f"--labels={self.file}, line {line}: {row['path']} is listed twice; keep one")
            self.labels[path] = label
        first = self._content.decode("utf-8-sig", "surrogateescape").splitlines()[:1]
        self._columns = [name.strip() for name in next(csv.reader(first))]

    def add(self, path: Path, label: str) -> None:
        """Labels an image."""
        content = self._content or csv_bytes([COLUMNS])
        self._write(content + (b"" if content.endswith(b"\n") else b"\r\n") + self._line(path, label))
        self.labels[path] = label

    def undo(self) -> Path | None:
        """Removes the last label, and returns the path of its image; None: the last row is not one of ``add``'s."""
        if not self.labels:
            return None
        path, label = next(reversed(self.labels.items()))
        before = self._content.removesuffix(self._line(path, label))
        if before == self._content or not before.endswith(b"\n"):
            return None
        self._write(before)
        del self.labels[path]
        return path

    def _line(self, path: Path, label: str) -> bytes:
        cells = {"path": Path(os.path.relpath(path, self.file.parent)).as_posix(), "label": label}
        return csv_bytes([[cells.get(name, "") for name in self._columns]])

    def _read(self) -> bytes:
        return read_regular(self.file) if self.file.exists() else b""

    def _write(self, content: bytes) -> None:
        if self._read() != self._content:
            raise UserError(f"--labels={self.file}: another program changed it; start again")
        write_atomically(self.file, content)
        self._content = content
