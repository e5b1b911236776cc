"""Compares backbones on the same images and the same split, each by the best head on its features."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from headstart.data.module import ImageData
from headstart.data.splits import Split
from headstart.errors import UserError
from headstart.features.arithmetic import BATCH, Arithmetic
from headstart.features.int8 import network_of
from headstart.files import csv_bytes, write_atomically
from headstart.model.backbone import FrozenBackbone
from headstart.model.multilabel import task_of
from headstart.search.bank import HeadSettings, TrainedHead, logits_of
from headstart.search.intervals import mean_and_half_width
from headstart.terminal import Seconds, one_line, say

TIMED = 3  # batches, after one that is not counted


@dataclass(frozen=True)
class Heads:
    """The heads on the features of one backbone."""

    ranked: list[tuple[HeadSettings, TrainedHead]]  # those of the grid, best first
    exact: TrainedHead  # the exact optimum
    exact_scores: dict[str, float]  # its penalty and its scores
    knn: dict[str, float] = field(default_factory=dict)  # the number of neighbours and its scores

    @property
    def best(self) -> TrainedHead:
        """The best by validation."""
        return min((self.ranked[0][1], self.exact), key=lambda head: head.rank)


@dataclass(frozen=True)
class Trial:
    """What the heads reach on one backbone."""

    backbone: str
    weights: str
    heads: Heads
    right: dict[Split, Tensor]  # how right the best head is, per image, [N] in [0, 1]
    scored: str  # what that is called, such as acc
    parameters: float  # of the backbone, in millions
    width: int  # of the features
    milliseconds: float  # per image
    licence: str | None
    seconds: float  # for the features and the heads


def name_and_weights(given: str) -> list[tuple[str, str]]:
    """The names and weights in NAME,NAME@WEIGHTS,…; weights may hold a further @."""
    parts = [entry.strip().partition("@") for entry in given.split(",")]
    if not all(name and bool(at) == bool(weights) for name, at, weights in parts):
        raise UserError(f"--backbones={given}: give names, with @WEIGHTS or without, as in resnet18,resnet18@random")
    return [(name, weights or "auto") for name, _, weights in parts]


def check_backbones(backbones: Iterable[FrozenBackbone]) -> None:
    """Builds each once, so that one that is unknown, lacks its weights or comes twice stops before any work."""
    seen = set()
    try:
        for backbone in backbones:
            if (named := (backbone.name, backbone.weights)) in seen:
                raise UserError(f"{backbone.name} with the weights {backbone.weights} is given twice; remove one")
            seen.add(named)
    except UserError as error:
        raise UserError(f"--backbones: {error}") from error


def compare(
    data: ImageData, backbones: Iterable[FrozenBackbone], device: torch.device, fit_heads: Callable[[], Heads]
) -> list[Trial]:
    """Loads the features of one backbone after the other, and fits heads on them.

    The data must be loaded for the first already; all the others have to see the same images in the same splits.
    """
    trials, spent, items = [], 0.0, data.items
    for backbone in backbones:
        data.load(backbone, device)
        if data.items != items:
            raise UserError("--backbones: the images changed while they were compared; start again")
        seconds = Seconds()
        heads = fit_heads()
        loaded = sum(data.store.seconds.values())
        trials.append(
            Trial(
                backbone.name,
                backbone.weights,
                heads,
                _right(heads.best, data),
                task_of(data.labels("val")).paired,
                sum(parameter.numel() for parameter in backbone.parameters()) / 1e6,
                backbone.num_features,
                milliseconds_per_image(backbone, data.store.arithmetic, device, data.store.cache_dir),
                backbone.licence,
                loaded - spent + seconds.with_total()["total"],
            )
        )
        spent = loaded
    return trials


def _right(head: TrainedHead, data: ImageData) -> dict[Split, Tensor]:
    splits: list[Split] = ["val", "test"] if data.items_in("test") else ["val"]
    labels = {split: data.labels(split) for split in splits}
    return {
        split: task_of(truth).per_image(logits_of(head.head, data.labelled(split)), truth)
        for split, truth in labels.items()
    }


@torch.no_grad()
def milliseconds_per_image(
    backbone: FrozenBackbone, arithmetic: Arithmetic, device: torch.device, folder: Path
) -> float:
    """What the extraction takes here to compute an image, without decoding it: the median of a few batches."""
    fast, took = network_of(backbone, arithmetic, device, folder), list[float]()
    images = torch.zeros(BATCH, 3, *[backbone.preprocessing.crop_size] * 2, dtype=torch.uint8, device=device)
    for _ in range(1 + TIMED):
        started = time.perf_counter()
        fast(images).cpu()  # waits for an accelerator
        took.append(time.perf_counter() - started)
    return statistics.median(took[1:]) / BATCH * 1000


def best_of(trials: Sequence[Trial]) -> Trial:
    """The best by validation; of equals the first."""
    return min(trials, key=lambda trial: trial.heads.best.rank)


def rows_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """A row per backbone; differences are to the first, paired by image, with half their 95 % interval."""
    rows = []
    for trial in trials:
        row: dict[str, Any] = {"backbone": trial.backbone, "weights": trial.weights}
        row["head"] = "exact" if trial.heads.best is trial.heads.exact else "grid"
        for split, right in trial.right.items():
            difference, half_width = mean_and_half_width(right - trials[0].right[split])
            row |= {f"{split}/{trial.scored}": float(right.mean())}
            row |= {f"{split}/difference": difference, f"{split}/half_width": half_width}
        for name in ("parameters", "width", "milliseconds", "licence", "seconds"):
            row[name] = getattr(trial, name)
        rows.append(row)
    return rows


def reported(trials: Sequence[Trial], folder: Path) -> list[dict[str, Any]]:
    """Writes the comparison to ``backbones.csv`` in a folder, and prints it; returns its rows."""
    rows, best, file = rows_of(trials), best_of(trials), folder / "backbones.csv"
    write_atomically(file, csv_bytes([rows[0], *(row.values() for row in rows)]))
    say(_table(rows))
    say(f"backbone: {best.backbone}, weights {best.weights}, chosen by validation; all in {file}")
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows for the terminal, in narrow columns; of a file of weights its name."""
    scores = {name.removesuffix("/difference"): rows[0] for name in rows[0] if name.endswith("/difference")}
    splits = {split: next(name for name in rows[0] if name.startswith(f"{split}/")) for split in scores}
    title = f"{len(rows)} backbones on the same images; differences to the first, with 95 % intervals"
    table = Table(title=title, show_lines=True)
    table.add_column("backbone\n@weights\nlicence", overflow="fold")
    for name in (*splits.values(), "params\n(M)", "width", "ms per\nimage", "s"):
        table.add_column(name)
    for number, row in enumerate(rows):
        cells = [f"{row['backbone']}\n@{one_line(Path(row['weights']).name)}\n{row['licence'] or '-'}"]
        for split, score in splits.items():
            difference = f"\n{row[f'{split}/difference']:+.3f} ± {row[f'{split}/half_width']:.3f}"
            cells.append(f"{row[score]:.3f}{difference if number else ''}")
        sizes = f"{row['parameters']:.1f}", str(row["width"]), f"{row['milliseconds']:.1f}", f"{row['seconds']:.1f}"
        table.add_row(*cells, *sizes)
    return table
