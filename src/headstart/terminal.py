"""What the user reads while a command runs: plain lines, tables and a progress bar, from rank zero alone."""

import logging
import os
import re
import sys
import time
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import rich
from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning sets its rank; it imports no torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


def rank() -> int:
    """The number of this process among those that train together; 0 where there is one."""
    return getattr(rank_zero_only, "rank", 0)


def say(message: str | Table) -> None:
    """Prints a line, as it is: a path with brackets is not markup, and a long one is not broken."""
    if rank() != 0:
        return
    shown = one_line(message) if isinstance(message, str) else message
    rich.get_console().print(shown, markup=False, highlight=False, soft_wrap=isinstance(message, str))


@cache
def say_once(message: str) -> None:
    """Prints a line that a process has not printed yet."""
    say(message)


def program(verb: str) -> str:
    """How the verb is called, as this command was, so that what is suggested can be typed."""
    return "python train.py" if verb == "train" and Path(sys.argv[0]).name == "train.py" else f"headstart {verb}"


def say_all(messages: Sequence[str], shown: int = 5) -> None:
    """Prints messages of one kind: the first few, and how many more there are."""
    for message in messages[:shown]:
        say(message)
    if len(messages) > shown:
        say(f"… and {len(messages) - shown} more like these")


def one_line(message: str) -> str:
    """The message with control characters escaped: a file's name may hold line breaks, and codes for the terminal."""
    printable = message.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], printable)


def told(names: Sequence[str], others: Sequence[str] = ()) -> str:
    """The first five names; one that looks like another, among these or the others, with its code points."""
    looks = Counter(map(_look, {*names, *others}))
    doubtful = {name for name in names if looks[_look(name)] > 1 and not name.isascii()}
    shown = [f"{name} ({name!a})" if name in doubtful else name for name in names[:5]]
    return ", ".join([*shown, "…"] if len(names) > 5 else shown)


def say_look_alikes(names: Sequence[str]) -> None:
    """Says which classes have names that differ by case or Unicode form alone."""
    looks = Counter(map(_look, names))
    if found := sorted((name for name in names if looks[_look(name)] > 1), key=_look):
        say(f"data: {len(found)} classes have names that differ by case or Unicode form alone: {told(found)}")


def _look(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@contextmanager
def images_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar with images a second and the time left; what it gives is called with the images newly done."""
    hidden = rank() != 0 or not rich.get_console().is_terminal
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} images/s"), TimeRemainingColumn()
    started, done = time.perf_counter(), 0
    with Progress(TextColumn(description), *columns, transient=True, disable=hidden) as progress:
        task = progress.add_task(description, total=total, rate=0.0)

        def advance(images: int) -> None:
            nonlocal done
            done += images
            progress.update(task, completed=done, rate=done / (time.perf_counter() - started))

        yield advance


class Seconds(dict[str, float]):
    """What the parts of a run took, by name, and with ``total`` the time since it was made."""

    def __init__(self, *parts: str) -> None:
        super().__init__(dict.fromkeys(parts, 0.0))
        self._started = time.perf_counter()

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Adds what happens within."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self[part] = self.get(part, 0.0) + (time.perf_counter() - started)

    def with_total(self) -> dict[str, float]:
        """The parts and the total."""
        return self | {"total": time.perf_counter() - self._started}


def score_rows(scores: Mapping[str, Any], splits: Sequence[str] = ("val", "test")) -> list[tuple[str, list[str]]]:
    """Each score's name with its values of the splits, where they are there."""
    names = dict.fromkeys(name.split("/")[1] for name in scores if name.startswith(("val/", "test/")))
    rows = [(name, [scores.get(f"{split}/{name}") for split in splits]) for name in names]
    return [(name, ["" if value is None else f"{value:.3f}" for value in values]) for name, values in rows]


def say_scores(result: Mapping[str, Any], title: str) -> None:
    """A table of the scores in a run's result, one column per split."""
    splits = [split for split in ("val", "test") if f"{split}/acc" in result]
    table = Table("", *splits, title=title)
    for name, values in score_rows(result, splits):
        table.add_row(name, *values)
    say(table)


def quiet_libraries() -> None:
    """Hides what Lightning and its libraries say that a user can do nothing about."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 makes calls that jsonargparse 5 drops; the floor and the ceiling in pyproject.toml see to it.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in (
        ".*in eval mode at the start of training.*",  # the backbone is, on purpose
        ".*does not have many workers.*",  # features need none
        ".*No positive samples in targets.*",  # of a class that a split lacks: it is left out of the mean
        ".*No negative samples in targets.*",
        ".*exists and is not empty.*",  # the folder of a run that goes on
        ".*The dirpath has changed.*",  # a new run that goes on from an old one's checkpoint keeps its own best
        ".*smaller than the logging interval.*",  # the loss is logged once an epoch
        ".*could not find the monitored key.*",  # `fit` says that nothing was validated
        ".*Total length of `list` across ranks is zero.*",  # a split without images, whose table says so
        ".*AMP with fp16 is not supported.*",  # refused in our own words
        ".*LeafSpec.*",  # a call of Lightning's that torch will drop
    ):
        warnings.filterwarnings("ignore", message)
