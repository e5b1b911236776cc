"""The verb `runs`: the run folders with their scores and the settings in which they differ."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from headstart.errors import UserError
from headstart.files import csv_bytes, flat, write_atomically
from headstart.parser import parser_of
from headstart.runs.folder import RESULT
from headstart.terminal import say

SHOWN, ABOUT = ("val/acc", "test/acc"), ("run", "state", "seconds")
# Where things lie, and what is said of a run, are no settings of it.
NO_SETTINGS = (
    "name",
    "ckpt_path",
    "report",
    "trainer.default_root_dir",
    "data.cache_dir",
    "data.splits",
    "logs",
    "save",
)


@dataclass(frozen=True)
class Run:
    """A run's folder, as it is found.

    Attributes:
        folder: relative to the logs.
        result: the content of its `result.json`; empty before it is finished.
        settings: of its configuration, by dotted name.
    """

    folder: str
    result: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def state(self) -> str:
        """Whether it is finished."""
        return "finished" if self.result else "unfinished"


def runs(options: Sequence[str]) -> list[dict[str, Any]]:
    """Lists the runs, the best first.

    Args:
        options: of the command line.

    Returns:
        A row a run, as the CSV file has it.

    Raises:
        UserError: a mistake in the options, or there is no run.
    """
    parser = parser_of("runs")
    parser.add_argument("--logs", type=str, default="logs", help="where the runs are")
    parser.add_argument("--sort", type=str, default="test/acc", help="the score or setting to sort by, best first")
    parser.add_argument("--csv", type=str | None, help="a new file for all scores and all settings that differ")
    given = parser.parse_args(list(options))
    found = list(_found(Path(given.logs)))
    if not found:
        raise UserError(f"--logs={given.logs}: no runs in there; python train.py makes one")
    rows = [_row(run, differing(found)) for run in found]
    if not any(given.sort in row for row in rows):
        raise UserError(f"--sort={given.sort}: no such column; there are {', '.join(_columns(rows))}")
    rows.sort(key=lambda row: _place(row.get(given.sort), given.sort))
    _say(rows)
    if given.csv:
        _write(Path(given.csv).expanduser(), rows)
    return rows


def _found(logs: Path) -> Iterator[Run]:
    for folder in sorted({path.parent for name in (RESULT, "config.yaml") for path in logs.glob(f"*/*/{name}")}):
        result, config = _read(folder / RESULT, json.loads), _read(folder / "config.yaml", yaml.safe_load)
        yield Run(
            folder.relative_to(logs).as_posix(),
            result,
            {name: value for name, value in flat(config).items() if name not in NO_SETTINGS},
        )


def _read(file: Path, parse: Any) -> dict[str, Any]:
    """Empty where there is no file, or a damaged one."""
    try:
        content = parse(file.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def differing(found: Sequence[Run]) -> list[str]:
    """The names of the settings that are not the same in all runs that have a configuration."""
    configured = [run.settings for run in found if run.settings]
    names = dict.fromkeys(name for settings in configured for name in settings)
    return [name for name in names if len({repr(settings.get(name)) for settings in configured}) > 1]


def _row(run: Run, names: Sequence[str]) -> dict[str, Any]:
    scores = {name: value for name, value in run.result.items() if isinstance(value, float)}
    about = {"seconds": run.result.get("seconds", {}).get("total"), "state": run.state}
    return {"run": run.folder} | scores | about | {name: run.settings[name] for name in names if name in run.settings}


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _place(value: Any, name: str) -> tuple[bool, float, str]:
    """Numbers first, the best of them before the others; then text; then what has none."""
    if isinstance(value, int | float):
        return False, value if "loss" in name or "error" in name or name == "seconds" else -value, ""
    return True, 0.0, "~" if value is None else str(value)


def _say(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=f"{len(rows)} runs")
    for name in ("run", *SHOWN, "s", "settings"):
        table.add_column(name, overflow="fold")
    for row in rows:
        scores = (f"{row[name]:.3f}" if name in row else "" for name in SHOWN)
        seconds = row["state"] if row["seconds"] is None else f"{row['seconds']:.0f}"
        settings = (
            f"{name.split('.')[-1]}={row[name]}" for name in row if name not in ABOUT and not _is_score(row, name)
        )
        table.add_row(row["run"], *scores, seconds, " ".join(settings))
    say(table)


def _is_score(row: Mapping[str, Any], name: str) -> bool:
    return "/" in name and isinstance(row[name], float)


def _write(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    if file.exists():
        raise UserError(f"--csv={file}: is there already; give another name")
    columns = _columns(rows)
    try:
        write_atomically(file, csv_bytes([columns, *([row.get(name) for name in columns] for row in rows)]))
    except OSError as error:
        raise UserError(f"--csv={file}: cannot be written ({error.strerror})") from error
    say(f"table:    {file}")
