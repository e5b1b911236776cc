"""Output for the user while a command runs: lines, tables and a progress bar, from rank zero only."""

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
    """The rank of this process in distributed training; 0 for a single process."""
    return getattr(rank_zero_only, "rank", 0)


def say(message: str | Table) -> None:
    """Prints a message verbatim: brackets are not markup, and long lines are not wrapped."""
    if rank() != 0:
        return
    shown = one_line(message) if isinstance(message, str) else message
    rich.get_console().print(shown, markup=False, highlight=False, soft_wrap=isinstance(message, str))


@cache
def say_once(message: str) -> None:
    """Prints a message once per process."""
    say(message)


def program(verb: str) -> str:
    """How to call a command in the way this process was called, for suggestions that can be pasted."""
    return "python train.py" if verb == "train" and Path(sys.argv[0]).name == "train.py" else f"headstart {verb}"


def say_all(messages: Sequence[str], shown: int = 5) -> None:
    """Prints the first few messages of one kind, and the number of the others."""
    for message in messages[:shown]:
        say(message)
    if len(messages) > shown:
        say(f"… and {len(messages) - shown} more like these")


def one_line(message: str) -> str:
    """Escapes control characters: a file name may contain line breaks and terminal codes."""
    printable = message.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], printable)


def listing(names: Sequence[str], others: Sequence[str] = ()) -> str:
    """The first five names, with code points where one looks like another in ``names`` or ``others``."""
    looks = Counter(map(_look, {*names, *others}))
    doubtful = {name for name in names if looks[_look(name)] > 1 and not name.isascii()}
    shown = [f"{name} ({name!a})" if name in doubtful else name for name in names[:5]]
    return ", ".join([*shown, "…"] if len(names) > 5 else shown)


def say_look_alikes(names: Sequence[str]) -> None:
    """Warns of class names that differ only in case or Unicode form."""
    looks = Counter(map(_look, names))
    if found := sorted((name for name in names if looks[_look(name)] > 1), key=_look):
        say(f"data: {len(found)} classes have names that differ only in case or Unicode form: {listing(found)}")


def _look(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@contextmanager
def images_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar with images per second and time left; call its value with the number of images just processed."""
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
    """Durations of the parts of a run, by name, in seconds."""

    def __init__(self, *parts: str) -> None:
        super().__init__(dict.fromkeys(parts, 0.0))
        self._started = time.perf_counter()

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Adds the duration of the block to a part."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self[part] = self.get(part, 0.0) + (time.perf_counter() - started)

    def with_total(self) -> dict[str, float]:
        """The parts, and ``total``: the time since construction."""
        return self | {"total": time.perf_counter() - self._started}


SCORES = {
    "acc": "accuracy",
    "balanced_acc": "balanced accuracy",
    "map": "mean average precision",
    "f1": "F1, mean of classes",
    "f1_micro": "F1, all classes together",
    "exact_match": "all labels right",
    "hamming_loss": "share of labels wrong",
    "auroc": "AUROC, mean of classes",
    "loss": "loss",
    "calibration_error": "calibration error",
    "calibration_error_scaled": "calibration error, scaled",
    "temperature": "temperature",
    "coverage_90": "sets for 90 %: hold the class",
    "set_size_90": "sets for 90 %: classes in each",
}
HEADLINES = ("acc", "map")  # the main score, of one label per image or several
SPLIT_NAMES = {"test": "test", "val": "validation"}


def score_rows(scores: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The splits with scores, under an empty name; then each score's name and its values, empty where missing."""
    splits = [split for split in SPLIT_NAMES if any(f"{split}/{name}" in scores for name in HEADLINES)]
    found = dict.fromkeys(name.split("/")[1] for name in scores if name.startswith(("val/", "test/")))
    names = [*(name for name in SCORES if name in found), *(name for name in found if name not in SCORES)]
    rows = [("", [SPLIT_NAMES[split] for split in splits])]
    for name in names:
        values = [scores.get(f"{split}/{name}") for split in splits]
        shown = ["" if value is None else f"{value:.3f}" for value in values]
        rows.append((SCORES.get(name, name.replace("_", " ")), shown))
    return rows


def say_scores(result: Mapping[str, Any], title: str) -> None:
    """Prints a table of the scores in a run's result, one column per split."""
    (_, splits), *rows = score_rows(result)
    table = Table("", *splits, title=title)
    for name, values in rows:
        table.add_row(name, *values)
    say(table)


def quiet_libraries() -> None:
    """Hides messages of Lightning and its libraries that a user cannot act on."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Lightning 2.6 makes calls that jsonargparse 5 drops; pyproject.toml bounds their versions.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in (
        ".*in eval mode at the start of training.*",  # intended for the backbone
        ".*does not have many workers.*",  # features need none
        ".*No positive samples in targets.*",  # a class missing from a split is left out of the mean
        ".*No negative samples in targets.*",
        ".*exists and is not empty.*",  # the folder of a resumed run
        ".*The dirpath has changed.*",  # a new run from an old checkpoint keeps its own best
        ".*smaller than the logging interval.*",  # the loss is logged once per epoch
        ".*could not find the monitored key.*",  # `fit` reports that nothing was validated
        ".*Total length of `list` across ranks is zero.*",  # a split without images, as the table shows
        ".*AMP with fp16 is not supported.*",  # refused with our own message
        ".*loader strategy is deprecated.*",  # in SQLAlchemy, used by MLflow
        ".*LeafSpec.*",  # deprecated in torch, called by Lightning
    ):
        warnings.filterwarnings("ignore", message)
