"""The `runs` command: lists runs with their scores and the settings that differ. Does not import torch."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.errors import UserError
from headstart.files import csv_bytes, flat, write_new
from headstart.parser import parser_of
from headstart.runs.history import Run
from headstart.terminal import say

SHOWN, ABOUT = ("val/acc", "test/acc"), ("run", "state", "seconds")
# Names, paths and the report do not count as settings.
NO_SETTINGS = (
    *("name", "ckpt_path", "report", "logs", "save", "trainer.default_root_dir"),
    *("data.cache_dir", "data.splits"),
)


def runs(options: Sequence[str]) -> list[dict[str, Any]]:
    """Lists the runs, best first; returns a row per run, as in the CSV file."""
    parser = parser_of("runs")
    parser.add_argument("--logs", type=str, default="logs", help="folder that contains the runs")
    parser.add_argument("--sort", type=str, default="test/acc", help="score or setting to sort by, best first")
    parser.add_argument("--csv", type=str | None, help="new file for all scores and all settings that differ")
    given = parser.parse_args(list(options))
    rows = _rows(Path(given.logs))
    if not rows:
        raise UserError(f"--logs={given.logs}: no runs in there; python train.py makes one")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not any(given.sort in row for row in rows):
        raise UserError(f"--sort={given.sort}: no such column; choose from {', '.join(columns)}")
    rows.sort(key=lambda row: _sort_key(row.get(given.sort), given.sort))
    _say(rows)
    if given.csv:
        lines = ([row.get(name) for name in columns] for row in rows)
        say(f"table:    {write_new('--csv', given.csv, csv_bytes([columns, *lines]))}")
    return rows


def _rows(logs: Path) -> list[dict[str, Any]]:
    """A row per run: its scores, its state, and the settings that differ between runs."""
    found = {run: _settings(run) for run in Run.all_in(logs)}
    configured = [settings for settings in found.values() if settings]
    names = dict.fromkeys(name for settings in configured for name in settings)
    differing = [name for name in names if len({repr(settings.get(name)) for settings in configured}) > 1]
    rows = []
    for run, settings in found.items():
        result = run.result
        scores = {name: value for name, value in result.items() if isinstance(value, float)}
        about = {"seconds": result.get("seconds", {}).get("total"), "state": "finished" if result else "unfinished"}
        own = {name: settings[name] for name in differing if name in settings}
        rows.append({"run": run.folder.relative_to(logs).as_posix()} | scores | about | own)
    return rows


def _settings(run: Run) -> dict[str, Any]:
    with suppress(UserError):  # a damaged configuration must not hide the run
        return {name: value for name, value in flat(run.config).items() if name not in NO_SETTINGS}
    return {}


def _sort_key(value: Any, name: str) -> tuple[bool, float, str]:
    """Sorts numbers first, best first; then text; then missing values."""
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
        settings = {name: value for name, value in row.items() if name not in ABOUT and not _is_score(name, value)}
        shown = " ".join(f"{name.split('.')[-1]}={value}" for name, value in settings.items())
        table.add_row(row["run"], *scores, seconds, shown)
    say(table)


def _is_score(name: str, value: Any) -> bool:
    return "/" in name and isinstance(value, float)
