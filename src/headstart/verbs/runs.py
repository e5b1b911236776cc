"""The `runs` command: lists runs with their scores and settings, and compares two. Does not import torch."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.errors import UserError
from headstart.files import csv_bytes, flat, write_new
from headstart.parser import OptionParser, parser_of
from headstart.runs.history import DEFAULTS, REPORT, Run
from headstart.terminal import HEADLINES, say

ABOUT = ("run", "state", "seconds")
# Names, paths and the report do not count as settings.
NO_SETTINGS = (
    *("name", "ckpt_path", "report", "logs", "save", "trainer.default_root_dir"),
    *("data.cache_dir", "data.splits", "data.feature_precision"),
)
LONGEST, WIDEST = 24, 100  # characters of a value, and of all settings of a run


def runs(options: Sequence[str]) -> list[dict[str, Any]]:
    """Lists the runs, best first, or compares two; returns a row per run, as in the CSV file."""
    given = _parser().parse_args(list(options))
    logs = Path(given.logs)
    found = list(Run.all_in(logs))
    if not found:
        raise UserError(f"--logs={given.logs}: contains no runs; python train.py makes one")
    if given.runs:
        if given.csv:
            raise UserError("--csv: is for the list of runs; leave it out, or compare on a --page")
        return _compare([_named(name, found, logs) for name in given.runs], logs, given.page)
    if given.page:
        raise UserError("--page: is for two runs; name them")
    rows = _rows(found, logs)
    sort = given.sort or next(
        (f"test/{name}" for name in HEADLINES if any(f"test/{name}" in row for row in rows)), "run"
    )
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if not any(sort in row for row in rows):
        raise UserError(f"--sort={given.sort}: no such column; choose from {', '.join(columns)}")
    rows.sort(key=lambda row: _sort_key(row.get(sort), sort))
    if given.open:
        for row in rows:
            if (report := logs / row["run"] / REPORT).is_file():
                print(report)
        return rows
    _say(rows, _verbs(found, logs))
    if given.csv:
        lines = ([row.get(name) for name in columns] for row in rows)
        say(f"table:    {write_new('--csv', given.csv, csv_bytes([columns, *lines]))}")
    return rows


def _parser() -> OptionParser:
    parser = parser_of("runs", "[RUN RUN]    (two runs, by name or folder: compares them)")
    parser.paths = False
    parser.add_argument("runs", nargs="*", type=str, help="two runs to compare")
    parser.add_argument("--logs", type=str, default="logs", help="folder that contains the runs")
    parser.add_argument(
        "--sort", type=str | None, help="score or setting to sort by, best first; None: the main test score"
    )
    parser.add_argument("--csv", type=str | None, help="new CSV file for all scores and all settings that differ")
    parser.add_argument("--open", action="store_true", help="print only the paths of the reports")
    parser.add_argument("--page", type=str | None, help="new HTML file that shows two runs side by side")
    return parser


def _named(name: str, found: Sequence[Run], logs: Path) -> Run:
    """The run with this folder, or the only one whose name starts with this; of several with one name, the newest."""
    folder = Path(name)
    same = [run for run in found if run.folder.resolve() == folder.resolve()]
    names = {run.folder.relative_to(logs).as_posix(): run for run in found}
    same = same or [run for path, run in names.items() if path.split("/")[0] == name][-1:]
    same = same or [run for path, run in names.items() if path.startswith(name)]
    if len(same) != 1:
        why = f"{len(same)} runs begin like this" if same else "no such run"
        raise UserError(f"{name}: {why}; choose from {', '.join(names)}")
    return same[0]


def _compare(pair: Sequence[Run], logs: Path, file: str | None) -> list[dict[str, Any]]:
    """Prints two runs side by side, and draws them on a page."""
    from headstart.runs.compare import compared, page  # a list needs neither templates nor tests

    if len(pair) != 2 or pair[0] == pair[1]:
        raise UserError("runs: give two different runs to compare, or none for a list of all")
    rows, names = _rows(pair, logs), [run.folder.relative_to(logs).as_posix() for run in pair]
    found = compared(pair[0], pair[1], [_settings(run) for run in pair])
    table = Table()
    for name in ("", *names, "difference"):
        table.add_column(name, overflow="fold")
    for name, (values, difference) in found.rows.items():
        table.add_row(name, *values, difference)
    say(table)
    say(f"paired:   {found.paired}")
    if file:
        say(f"page:     {write_new('--page', file, page(names, found, [run.folder / REPORT for run in pair]))}")
    return rows


def _rows(found: Sequence[Run], logs: Path) -> list[dict[str, Any]]:
    """A row per run: its scores, its state, and the settings that differ between runs."""
    settings_of = {run: _settings(run) for run in found}
    configured = [settings for settings in settings_of.values() if settings]
    names = dict.fromkeys(name for settings in configured for name in settings)
    differing = [name for name in names if len({repr(settings.get(name)) for settings in configured}) > 1]
    rows = []
    for run, settings in settings_of.items():
        result = run.result
        scores = {name: value for name, value in result.items() if isinstance(value, float)}
        seconds = result.get("seconds")
        total = seconds.get("total") if isinstance(seconds, dict) else None
        total = total if isinstance(total, int | float) else None
        about = {"seconds": total, "state": "finished" if result else "unfinished"}
        own = {name: settings[name] for name in differing if name in settings}
        rows.append({"run": run.folder.relative_to(logs).as_posix()} | scores | about | own)
    return rows


def _settings(run: Run) -> dict[str, Any]:
    with suppress(UserError):  # a damaged configuration must not hide the run
        return {name: value for name, value in flat(run.config).items() if name not in NO_SETTINGS}
    return {}


def _verbs(found: Sequence[Run], logs: Path) -> dict[str, dict[str, Any]]:
    """The defaults of each run's settings, by run."""
    defaults = json.loads(DEFAULTS.read_bytes())
    of_runs = {}
    for run in found:
        with suppress(UserError):
            of_runs[run.folder.relative_to(logs).as_posix()] = defaults.get(run.verb, {})
    return of_runs


def _sort_key(value: Any, name: str) -> tuple[bool, float, str]:
    """Sorts numbers first, best first; then text; then missing values."""
    if isinstance(value, int | float):
        return False, value if "loss" in name or "error" in name or name == "seconds" else -value, ""
    return True, 0.0, "~" if value is None else str(value)


def _say(rows: Sequence[Mapping[str, Any]], defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints the runs with the settings that differ from each other and from the defaults."""
    table = Table(title=f"{len(rows)} runs")
    scores = [f"{split}/{name}" for name in HEADLINES for split in ("val", "test")]
    scores = [name for name in scores if any(name in row for row in rows)]
    for name in ("run, and its settings", *scores, "s"):
        table.add_column(name, overflow="fold")
    for row in rows:
        values = (f"{row[name]:.3f}" if name in row else "" for name in scores)
        seconds = row["state"] if row["seconds"] is None else f"{row['seconds']:.0f}"
        usual = defaults.get(row["run"], {})
        settings = {name: value for name, value in row.items() if name not in ABOUT and not _is_score(name, value)}
        own = {name: value for name, value in settings.items() if name not in usual or value != usual[name]}
        shown = " ".join(f"{name.split('.')[-1]}={_short(str(value), LONGEST)}" for name, value in own.items())
        table.add_row("\n".join(filter(None, (row["run"], _short(shown, WIDEST)))), *values, seconds)
    say(table)


def _short(text: str, most: int) -> str:
    """The end of a long value, such as a path, or the start of long settings."""
    if len(text) <= most:
        return text
    return f"…{text[1 - most :]}" if most == LONGEST else f"{text[: most - 1]}…"


def _is_score(name: str, value: Any) -> bool:
    return "/" in name and isinstance(value, float)
