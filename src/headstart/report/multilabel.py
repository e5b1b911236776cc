"""Predictions of several labels per image: scores and curves of each label, which occur together, what is missed."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from PIL import Image
from rich.table import Table
from torch import Tensor

from headstart.data.splits import BETWEEN
from headstart.model.metrics import aurocs, average_precisions
from headstart.model.multilabel import MultiLabel
from headstart.report.drawing import BLUE, ORANGE, Drawing, Series, chart
from headstart.report.evaluation import Predictions, Row
from headstart.report.figures import (
    TILES,
    in_bins,
    matrix_figure,
    precision_recall_figure,
    roc_figure,
    short,
    tiles_figure,
)
from headstart.terminal import one_line, say

SHOWN = 24  # labels in the terminal, the worst first


@dataclass(frozen=True)
class MultilabelEvaluation(Predictions):
    """Predictions of several labels per image."""

    task: MultiLabel

    @cached_property
    def probabilities(self) -> Tensor:
        """Calibrated probabilities, [N, C]."""
        return self.task.probabilities(self.logits)

    @cached_property
    def truth(self) -> Tensor:
        """Whether an image has a label, [N, C] bool."""
        return self.labels.bool()

    @cached_property
    def predicted(self) -> Tensor:
        """Whether a label reaches its threshold, [N, C] bool."""
        return self.probabilities >= self.task.thresholds

    @cached_property
    def together(self) -> Tensor:
        """The number of images with both of two labels, [C, C]; on the diagonal, with the label."""
        truth = self.truth.float()
        return (truth.T @ truth).long()

    def truth_of(self, label: int) -> Tensor:
        return self.truth[:, label]

    def row(self, position: int) -> Row:
        true, predicted = (self.names(each[position]) for each in (self.truth, self.predicted))
        return Row(self.items[position].path, true, predicted, float(self.probabilities[position].max()))

    def names(self, chosen: Tensor) -> str:
        """The names of the labels chosen by a mask [C]."""
        return BETWEEN.join(self.class_names[label] for label in chosen.nonzero()[:, 0].tolist())

    @cached_property
    def by_label(self) -> dict[str, Tensor]:
        """The scores of each label, NaN where undefined, its threshold and the number of images that have it; [C]."""
        both = (self.truth & self.predicted).sum(dim=0)
        true, predicted = self.truth.sum(dim=0), self.predicted.sum(dim=0)
        return {
            "images": true,
            "ap": average_precisions(self.logits, self.labels),
            "auroc": aurocs(self.logits, self.labels),
            "precision": both / predicted,
            "recall": both / true,
            "f1": 2 * both / (true + predicted),
            "threshold": self.task.thresholds,
        }

    def worst(self, missed: bool, count: int) -> list[tuple[int, int]]:
        """Positions and labels of the least probable labels that were missed, or the most probable false alarms."""
        wrong = self.truth & ~self.predicted if missed else ~self.truth & self.predicted
        found = wrong.nonzero()
        order = self.probabilities[wrong].argsort(descending=not missed, stable=True)[:count]
        return [cast("tuple[int, int]", tuple(pair)) for pair in found[order].tolist()]


def label_scores(evaluation: Predictions | None) -> dict[str, Any]:
    """Scores of each label for ``result.json``, as `labels`; what is undefined is None. Nothing for one per image."""
    if not isinstance(evaluation, MultilabelEvaluation):
        return {}
    columns = {name: values.tolist() for name, values in evaluation.by_label.items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    clean = [{name: None if math.isnan(value) else value for name, value in row.items()} for row in rows]
    return {"labels": dict(zip(evaluation.class_names, clean, strict=True))}


def say_labels(result: dict[str, Any]) -> None:
    """Prints the scores of each label, the worst first."""
    if "labels" not in result:
        return
    found = sorted(result["labels"].items(), key=lambda entry: math.inf if entry[1]["ap"] is None else entry[1]["ap"])
    columns = {"ap": "average precision", "f1": "F1", "precision": "precision", "recall": "recall"}
    table = Table("label", "images", *columns.values(), "threshold", title="by label, the worst first")
    for name, scores in found[:SHOWN]:
        values = ("" if scores[key] is None else f"{scores[key]:.3f}" for key in columns)
        table.add_row(one_line(name), str(scores["images"]), *values, f"{scores['threshold']:.3f}")
    say(table)
    if absent := [name for name, scores in found if not scores["images"]]:
        say(f"labels:   no image has {', '.join(map(one_line, absent[:SHOWN]))}; means leave such labels out")


def multilabel_figures(evaluation: MultilabelEvaluation) -> dict[str, Drawing]:
    """All charts of an evaluation, by name."""
    return {
        "precision_recall": precision_recall_figure(evaluation),
        "roc": roc_figure(evaluation),
        "calibration": calibration_figure(evaluation),
        "together": together_figure(evaluation),
    }


def together_figure(evaluation: MultilabelEvaluation) -> Drawing:
    """How many images with one label also have another."""
    names, counts = [short(name) for name in evaluation.class_names], evaluation.together
    return matrix_figure(counts, counts.diag(), names, "images with both labels")


def calibration_figure(evaluation: MultilabelEvaluation) -> Drawing:
    """The share of labels that are there, by their probability, before and after calibration."""
    series = [Series([(0, 0), (1, 1)], width=1)]
    for when, probabilities, colour in (
        ("before", evaluation.task.activation(evaluation.logits), ORANGE),
        ("after", evaluation.probabilities, BLUE),
    ):
        sure, there, _ = in_bins(probabilities.flatten(), evaluation.truth.flatten())
        series.append(Series(list(zip(sure, there, strict=True)), colour, f"{when} calibration", dots=True))
    return chart(series, "probability of a label", "share of images that have it")


def multilabel_tiles(
    evaluation: MultilabelEvaluation, thumbnail: Callable[[int], Image.Image]
) -> dict[str, "np.ndarray[Any, np.dtype[np.uint8]]"]:
    """The worst misses and false alarms as pictures, [H, W, 3] by name."""
    found = {}
    for name, missed in (("worst_misses", True), ("worst_false_alarms", False)):
        if pairs := evaluation.worst(missed, TILES):
            tiles = [(position, *tile_lines(evaluation, position, label)) for position, label in pairs]
            found[name] = np.asarray(tiles_figure(tiles, thumbnail))
    return found


def tile_lines(evaluation: MultilabelEvaluation, position: int, label: int) -> tuple[str, str]:
    """What is said below the picture of a miss or a false alarm."""
    name, probability = evaluation.class_names[label], float(evaluation.probabilities[position, label])
    missed = bool(evaluation.truth[position, label])
    said = f"{'missed' if missed else 'false'}: {name} {probability:.3f}"
    return said, f"has: {evaluation.names(evaluation.truth[position]) or 'no label'}"
