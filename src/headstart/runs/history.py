"""Runs as they are found on the disk. Imports no torch."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headstart.errors import UserError
from headstart.files import read_csv, read_regular

RESULT, REPORT, CONFIG, SPLITS_FILE = "result.json", "report.html", "config.yaml", "splits.csv"


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path

    @classmethod
    def of(cls, checkpoint: Path) -> "Run":
        """The run that a checkpoint belongs to, if it lies in a run's folder."""
        return cls(checkpoint.resolve().parent.parent)

    @classmethod
    def all_in(cls, logs: Path) -> Iterator["Run"]:
        """Every run below the logs, in order of their paths."""
        for folder in sorted({path.parent for name in (RESULT, CONFIG) for path in logs.glob(f"*/*/{name}")}):
            yield cls(folder)

    @property
    def splits_file(self) -> Path:
        """Which image trained, which validated, which tested."""
        return self.folder / SPLITS_FILE

    @property
    def last(self) -> Path:
        """The checkpoint that it is resumed from."""
        return self.folder / "checkpoints/last.ckpt"

    @property
    def result(self) -> dict[str, Any]:
        """The content of its result; empty before it is finished, or where that is damaged."""
        try:
            content = json.loads(read_regular(self.folder / RESULT))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration; empty where there is none."""
        file = self.folder / CONFIG
        if not file.is_file():
            return {}
        try:
            content = yaml.safe_load(read_regular(file))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file}: is no YAML any more ({' '.join(str(error).split())})") from error
        return content if isinstance(content, dict) else {}

    @property
    def data(self) -> dict[str, Any]:
        """The data options of its configuration; empty where they name no data."""
        found = self.config.get("data")
        named = [found.get(name) for name in ("root", "csv", "source")] if isinstance(found, dict) else []
        known = all(isinstance(value, str | None) and "\0" not in (value or "") for value in named)
        return found if isinstance(found, dict) and known and any(named[:2]) else {}

    def images(self) -> list[Path]:
        """The images that it split; empty where it says of none."""
        data = self.data
        if not data or not self.splits_file.is_file():
            return []
        root = Path(data.get("csv") or data["root"])
        if data.get("csv") or data.get("source") == "csv":  # a list, whose paths are relative to it
            root = root.parent
        rows = read_csv("--ckpt_path", self.splits_file, ["path"], errors="surrogateescape")
        return [root / row["path"] for row in rows]


def newest_unfinished(logs: Path, name: str) -> Run:
    """The newest run of the name, which may hold wildcards, that has a ``last.ckpt`` and no ``result.json``."""
    started = logs.glob(f"{name}/*/checkpoints/last.ckpt")
    for path in sorted(started, key=lambda path: path.parts[-3], reverse=True):
        run = Run.of(path)
        if not (run.folder / RESULT).exists():
            return run
    raise UserError(
        f"--ckpt_path=last: no unfinished run below {logs / name}; give a checkpoint's path, or leave it out"
    )
