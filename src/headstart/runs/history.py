"""Runs found on disk. Does not import torch."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from headstart.config_files import MOST, written_out
from headstart.errors import UserError
from headstart.files import read_csv, read_regular
from headstart.terminal import program

RESULT, REPORT, CONFIG, SPLITS_FILE = "result.json", "report.html", "config.yaml", "splits.csv"
DEFAULTS = Path(__file__).parent.parent / "help/defaults.json"  # of `train` and the like, made by docs/help.py
PREDICTIONS = "predictions.csv"  # of the test images


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path

    @classmethod
    def of(cls, checkpoint: Path) -> "Run":
        """The run that a checkpoint belongs to, if it is in a run's folder."""
        return cls(checkpoint.resolve().parent.parent)

    @classmethod
    def all_in(cls, logs: Path) -> Iterator["Run"]:
        """All runs in the logs folder, sorted by path."""
        for folder in sorted({path.parent for name in (RESULT, CONFIG) for path in logs.glob(f"*/*/{name}")}):
            yield cls(folder)

    @property
    def splits_file(self) -> Path:
        """The file that gives the split of each image."""
        return self.folder / SPLITS_FILE

    @property
    def last(self) -> Path:
        """The checkpoint from which the run is resumed."""
        return self.folder / "checkpoints/last.ckpt"

    @property
    def verb(self) -> str:
        """The command that started the run."""
        if "unfreeze" in self.config:  # wing: finetune
            return "finetune"  # wing: finetune
        if "n_way" in self.config:  # wing: fewshot
            return "fewshot"  # wing: fewshot
        return "train"

    def resume_command(self) -> str:
        """The command line that resumes the run, as long as it is the newest unfinished one of its name."""
        logs, name = self.folder.resolve().parent.parent, self.folder.parent.name
        where = [] if logs == Path("logs").resolve() else [f"--logs={logs}"]
        return shlex.join([*program(self.verb).split(), "--ckpt_path=last", f"--name={name}", *where])

    @property
    def result(self) -> dict[str, Any]:
        """The content of ``result.json``; empty if the run is unfinished or the file is damaged."""
        try:
            content = json.loads(read_regular(self.folder / RESULT))
        except (OSError, ValueError, RecursionError):
            return {}
        return content if isinstance(content, dict) else {}

    @property
    def config(self) -> dict[str, Any]:
        """The run's configuration; empty if there is none."""
        file = self.folder / CONFIG
        if not file.is_file():
            return {}
        try:
            text = read_regular(file)
            if b"*" in text and written_out(yaml.compose(text, yaml.SafeLoader)) > MOST:
                raise ValueError("too many values by aliases")
            content = yaml.safe_load(text)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise UserError(f"{file}: is not valid YAML ({' '.join(str(error).split())})") from error
        return content if isinstance(content, dict) else {}

    @property
    def data(self) -> dict[str, Any]:
        """The data options of the configuration; empty if they name no data."""
        found = self.config.get("data")
        named = [found.get(name) for name in ("root", "csv", "source")] if isinstance(found, dict) else []
        known = all(isinstance(value, str | None) and "\0" not in (value or "") for value in named)
        return found if isinstance(found, dict) and known and any(named[:2]) else {}

    def images(self) -> list[Path]:
        """The paths of the run's images; empty if they are not recorded."""
        data = self.data
        if not data or not self.splits_file.is_file():
            return []
        root = Path(data.get("csv") or data["root"])
        if data.get("csv") or data.get("source") == "csv":  # paths in a CSV file are relative to its folder
            root = root.parent
        rows = read_csv("--ckpt_path", self.splits_file, ["path"], errors="surrogateescape")
        return [root / row["path"] for row in rows]


def newest_unfinished(logs: Path, verb: str, name: str | None = None, data: Path | None = None) -> Run:
    """The newest run of a command with a ``last.ckpt`` but no ``result.json``; of this name and data, if given.

    Raises:
        UserError: there is none; the message lists the commands that resume others.
    """
    started = sorted(Run.all_in(logs), key=lambda run: run.folder.name, reverse=True)
    unfinished = [run for run in started if run.last.is_file() and not (run.folder / RESULT).exists()]
    for run in unfinished:
        of_data = data is None or Path(run.data.get("csv") or run.data.get("root") or "").resolve() == data.resolve()
        if run.verb == verb and name in (None, run.folder.parent.name) and of_data:
            return run
    others = "; there are: ".join(["", ", ".join(run.resume_command() for run in unfinished[:3])]) if unfinished else ""
    wanted = f"{f' named {name}' if name else ''}{f' on {data}' if data else ''}"
    raise UserError(f"--ckpt_path=last: no unfinished run of {verb}{wanted} in {logs}{others}")
