"""What the user reads while a command runs: plain lines, tables and a progress bar, from rank zero alone."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich
from pytorch_lightning.utilities import rank_zero_only
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@rank_zero_only
def say(message: str | Table) -> None:
    """Prints a line, as it is: a path with brackets is no markup, and a long one is not broken."""
    rich.get_console().print(message, markup=False, highlight=False, soft_wrap=isinstance(message, str))


@contextmanager
def images_bar(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar with images a second and the time left; what it gives is called with the images newly done."""
    rank = getattr(rank_zero_only, "rank", 0)  # set by Lightning at run time
    hidden = rank != 0 or not rich.get_console().is_terminal
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} images/s"), TimeRemainingColumn()
    started, done = time.perf_counter(), 0
    with Progress(TextColumn(description), *columns, transient=True, disable=hidden) as progress:
        task = progress.add_task(description, total=total, rate=0.0)

        def advance(images: int) -> None:
            nonlocal done
            done += images
            progress.update(task, completed=done, rate=done / (time.perf_counter() - started))

        yield advance
