"""Figures of an evaluation and of a run, for both TensorBoard and the report."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import binary_precision_recall_curve, binary_roc

from headstart.report.answered import answered
from headstart.report.drawing import BLUE, FAINT, GREEN, GREY, INK, ORANGE, PINK, Drawing, Series, chart, ticks
from headstart.report.evaluation import CALIBRATION_BINS, Evaluation, Predictions, evenly_spaced
from headstart.terminal import SCORES, one_line

MAX_CELLS_WITH_NUMBERS, MAX_NAMES = 30, 100
# The curves with the smallest area are coloured and named; of the others, the lowest are grey.
NAMED_COLOURS, MAX_CURVES = (ORANGE, GREEN, PINK), 100
GRID, MAX_POINTS = np.linspace(0, 1, 101), 200
TILES, TILE_COLUMNS, TILE_SIDE = 24, 6, 128


def evaluation_figures(evaluation: Evaluation) -> dict[str, Drawing]:
    """All charts of an evaluation, by name."""
    drawn = {
        "coverage": coverage_figure(evaluation),
        "reliability": reliability_figure(evaluation),
        "roc": roc_figure(evaluation),
        "precision_recall": precision_recall_figure(evaluation),
    }
    if evaluation.domains:
        drawn["roc_by_domain"] = domains_figure(evaluation.domains)
    return drawn


def confusion_figure(evaluation: Evaluation) -> Drawing:
    """The confusion matrix: counts, coloured by their share of the true class; similar classes are neighbours."""
    order = evaluation.by_similarity
    counts, names = evaluation.confusion[order][:, order], [short(evaluation.class_names[label]) for label in order]
    return matrix_figure(counts, counts.sum(dim=1), names, "rows: true, columns: predicted")


def matrix_figure(counts: Tensor, totals: Tensor, names: Sequence[str], about: str) -> Drawing:
    """Counts [C, C] as a matrix, coloured by their share of their row's total [C]."""
    size, shares = len(names), counts / totals[:, None].clamp(min=1)
    side, edge = (26, 140) if size <= MAX_CELLS_WITH_NUMBERS else (max(2, min(14, 1200 // size)), 140)
    drawing = Drawing(edge + side * size + 10, edge + side * size + 10)
    few, far = size <= MAX_CELLS_WITH_NUMBERS, edge + side * size
    for row, column in counts.nonzero().tolist():
        share, x, y = float(shares[row, column]), edge + side * column, edge + side * row
        drawing.box(x, y, side, side, f"{BLUE}{round(40 + 215 * share):02x}")
        if few:
            number, colour = str(int(counts[row, column])), "#ffffff" if share > 0.5 else INK
            drawing.text(x + side / 2, y + side / 2, number, colour=colour)
    for place, name in enumerate(names if size <= MAX_NAMES else []):
        at = edge + side * (place + 0.5)
        drawing.text(edge - 6, at, name, "end")
        drawing.text(at, edge - 6, name, "start", turned=True)
    for at in range(edge, far + 1, side if few else side * size):
        drawing.line([(edge, at), (far, at)], FAINT)
        drawing.line([(at, edge), (at, far)], FAINT)
    drawing.text(6, 12, about, "start")
    return drawing


def coverage_figure(evaluation: Evaluation) -> Drawing:
    """Accuracy of the most confident share of the images, against that share."""
    curve = answered(evaluation)
    points = torch.stack([curve.share, curve.accuracy], dim=1)
    return chart(
        [Series(points[evenly_spaced(len(points), MAX_POINTS)].tolist(), BLUE)],
        "share of the images that are answered, the most confident first",
        "accuracy on them",
    )


def reliability_figure(evaluation: Evaluation) -> Drawing:
    """Accuracy by confidence, before and after temperature scaling; a calibrated head lies on the diagonal."""
    series = [Series([(0, 0), (1, 1)], width=1)]
    for when, temperature, colour in (("before", 1.0, ORANGE), ("after", evaluation.temperature, BLUE)):
        confidence = (evaluation.logits / temperature).softmax(dim=1).amax(dim=1)
        sure, right, part = in_bins(confidence, evaluation.right)
        error = evaluation.calibration_error(temperature)
        name = f"{when} scaling (temperature {temperature:.2f}), calibration error {error:.3f}"
        series.append(Series(list(zip(sure, right, strict=True)), colour, name, dots=True))
        bars = zip(sure, part, strict=True)
        series += [Series([(x, 0), (x, share)], f"{colour}66", width=4) for x, share in bars]
    return chart(series, "confidence", "accuracy (line), share of the images (bar)")


def in_bins(probabilities: Tensor, true: Tensor) -> tuple[list[float], list[float], list[float]]:
    """The mean probability, the share that is true, and the share of all, in each bin of probabilities [N] with any."""
    bins = (probabilities * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    counts = torch.bincount(bins, minlength=CALIBRATION_BINS)
    filled = counts > 0
    mean, share = (
        (torch.bincount(bins, values, CALIBRATION_BINS)[filled] / counts[filled]).tolist()
        for values in (probabilities, true.float())
    )
    return mean, share, (counts[filled] / len(bins)).tolist()


def roc_figure(evaluation: Predictions) -> Drawing:
    """The receiver operating characteristic of each class against the rest, and their mean."""
    curves = _one_against_rest(evaluation, binary_roc)
    return _curves_figure(evaluation, curves, "false positive rate", "true positive rate")


def domains_figure(domains: Mapping[str, Evaluation]) -> Drawing:
    """The mean receiver operating characteristic of the classes, in each domain."""
    series = []
    for (name, part), colour in zip(domains.items(), cycle((BLUE, *NAMED_COLOURS, GREY)), strict=False):
        if curves := [np.interp(GRID, *curve) for curve in _one_against_rest(part, binary_roc).values()]:
            mean = _on_grid(np.mean(curves, axis=0))
            series.append(Series(mean, colour, f"{short(name) or '(none)'}, area {part.auroc:.3f}"))
    return chart(series, "false positive rate", "true positive rate")


def precision_recall_figure(evaluation: Predictions) -> Drawing:
    """Precision against recall of each class against the rest, and their mean."""
    curves = _one_against_rest(evaluation, binary_precision_recall_curve)
    # torchmetrics goes from recall 1 to 0.
    turned = {label: (recall.flip(0), precision.flip(0)) for label, (precision, recall) in curves.items()}
    return _curves_figure(evaluation, turned, "recall", "precision")


def training_figures(scalars: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Drawing]:
    """Losses and scores by training step: (step, value) pairs by name, such as train/loss and val/acc."""
    panels = {
        "loss": {"train/loss": "training", "val/loss": "validation"},
        "score": {f"val/{name}": SCORES[name] for name in ("acc", "balanced_acc", "map", "f1", "auroc")},
    }
    figures = {}
    for value, names in panels.items():
        colours = zip(filter(scalars.get, names), (BLUE, ORANGE, GREEN, PINK), strict=False)
        series = [Series(scalars[name], colour, names[name]) for name, colour in colours]
        steps = [step for line in series for step, _ in line.points]
        top = max((y for line in series for _, y in line.points if math.isfinite(y)), default=1.0)
        if steps:
            between = [tick for tick in ticks(0, max(steps)) if min(steps) < tick < 0.9 * max(steps)]
            steps = [min(steps), *between, max(steps)]
            figures[value] = chart(series, "step", value, (0, 1 if value == "score" else top), steps)
    return figures


def learning_figure(images: Sequence[int], accuracies: Sequence[float]) -> Drawing:
    """Test accuracy against the number of training images, on a logarithmic axis."""
    points = list(zip(images, accuracies, strict=True))
    return chart([Series(points, BLUE, dots=True)], "training images", "test accuracy", x_ticks=images, log=True)


def tiles_figure(tiles: Sequence[tuple[int, str, str]], thumbnail: Callable[[int], Image.Image]) -> Image.Image:
    """Pictures in rows of six, given as positions, with two lines below each."""
    width, height = TILE_SIDE + 12, TILE_SIDE + 40
    drawing = Drawing(width * TILE_COLUMNS, height * -(-len(tiles) // TILE_COLUMNS))
    corners = [(width * (number % TILE_COLUMNS), height * (number // TILE_COLUMNS)) for number in range(len(tiles))]
    for (_, *lines), (x, y) in zip(tiles, corners, strict=True):
        for line, below in zip(lines, (10, 26), strict=True):
            drawing.text(x, y + TILE_SIDE + below, one_line(line), "start")
    image = drawing.image()
    for (position, *_), corner in zip(tiles, corners, strict=True):
        image.paste(thumbnail(position).resize((TILE_SIDE, TILE_SIDE)), corner)
    return image


def _one_against_rest(evaluation: Predictions, curve: Callable[..., Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """The curve's first two coordinates per class, without classes that have no images or all of them."""
    found = {}
    for label, probabilities in enumerate(evaluation.probabilities.T):
        truth = evaluation.truth_of(label)
        if 0 < truth.sum() < len(truth):
            first, second, _ = curve(probabilities, truth.long(), validate_args=False)
            found[label] = (first, second)
    return found


def _curves_figure(
    evaluation: Predictions, curves: Mapping[int, tuple[Tensor, Tensor]], x_name: str, y_name: str
) -> Drawing:
    areas = {label: float(torch.trapezoid(y, x)) for label, (x, y) in curves.items()}
    even = {label: np.interp(GRID, x, y) for label, (x, y) in curves.items()}
    lowest = sorted(areas, key=areas.__getitem__)[:MAX_CURVES]
    series = [Series(_on_grid(even[label]), f"{GREY}88", width=1) for label in lowest[len(NAMED_COLOURS) :]]
    for label, colour in zip(lowest, NAMED_COLOURS, strict=False):
        points = torch.stack(curves[label], dim=1)
        name = f"{short(evaluation.class_names[label])}, area {areas[label]:.3f}"
        series.append(Series(points[evenly_spaced(len(points), MAX_POINTS)].tolist(), colour, name, 1.5))
    if curves:
        mean = sum(areas.values()) / len(areas)
        average = _on_grid(np.mean(list(even.values()), axis=0))
        series.append(Series(average, BLUE, f"mean of {len(areas)} classes, area {mean:.3f}", 3))
    return chart(series, x_name, y_name)


def _on_grid(values: Any) -> list[tuple[float, float]]:
    return list(zip(GRID.tolist(), values.tolist(), strict=True))


def short(name: str) -> str:
    """A class name that fits next to an axis."""
    name = one_line(name)
    return name if len(name) <= 18 else f"{name[:17]}…"
