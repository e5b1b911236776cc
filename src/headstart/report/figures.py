"""Figures of an evaluation and of a run; each is drawn once, as a PNG, for both TensorBoard and the report.

The colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind people can tell apart.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import multiclass_precision_recall_curve, multiclass_roc

from headstart.report.evaluation import CALIBRATION_BINS, Evaluation
from headstart.terminal import one_line

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
DPI = 100
MAX_CELLS_WITH_NUMBERS = 25
MAX_TICKS = 50
MAX_BARS = 40
# The curves with the smallest area are coloured and named; all others are grey.
MAX_NAMED_CURVES = 3
# With more probabilities, curves are drawn at fixed thresholds, which bounds the memory.
MAX_EXACT = 4_000_000
TILES, TILE_COLUMNS = 24, 6


def png(figure: Figure) -> bytes:
    """Draws a figure as PNG; needs no display."""
    file = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png")
    return file.getvalue()


def pixels(drawn: bytes) -> np.ndarray:
    """Decodes a PNG for TensorBoard, [H, W, 3] uint8."""
    return np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB"))


def evaluation_figures(evaluation: Evaluation) -> dict[str, bytes]:
    """All figures of an evaluation that need no images, by name, as PNG."""
    drawn = {
        "confusion_matrix": confusion_figure(evaluation, normalised=False),
        "confusion_normalised": confusion_figure(evaluation, normalised=True),
        "per_class": per_class_figure(evaluation),
        "roc": roc_figure(evaluation),
        "precision_recall": precision_recall_figure(evaluation),
        "reliability": reliability_figure(evaluation),
    }
    return {name: png(figure) for name, figure in drawn.items()}


def confusion_figure(evaluation: Evaluation, normalised: bool) -> Figure:
    """The confusion matrix as counts or as shares of the true class in [0, 1]; colours always show the shares."""
    counts, names = evaluation.confusion, evaluation.class_names
    size = len(names)
    side = min(3.5 + 0.35 * size, 16)
    figure = Figure(figsize=(side + 1, side), dpi=DPI, layout="tight")
    axes = figure.add_subplot()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", fraction=0.046)
    step = -(-size // MAX_TICKS)
    axes.set_xticks(range(0, size, step), [_short(name) for name in names[::step]], rotation=90)
    axes.set_yticks(range(0, size, step), [_short(name) for name in names[::step]])
    axes.set(xlabel="predicted", ylabel="true")
    if size <= MAX_CELLS_WITH_NUMBERS:
        for true, predicted in torch.cartesian_prod(torch.arange(size), torch.arange(size)).tolist():
            share = float(shares[true, predicted])
            text = f"{share:.2f}".removeprefix("0") if normalised else str(int(counts[true, predicted]))
            if share > 0:
                colour = "white" if share > 0.5 else "black"
                axes.text(predicted, true, text, ha="center", va="center", color=colour, fontsize=8)
    return figure


def per_class_figure(evaluation: Evaluation) -> Figure:
    """Precision, recall and F1 per class as bars; at most the 40 classes with the lowest F1."""
    scores, names = evaluation.by_class(), evaluation.class_names
    order = scores["f1"].nan_to_num(0).argsort(stable=True)[:MAX_BARS].flip(0).tolist()
    figure = Figure(figsize=(8, 1.5 + 0.32 * len(order)), dpi=DPI, layout="tight")
    axes = figure.add_subplot()
    places = np.arange(len(order))
    for offset, (name, colour) in enumerate((("f1", BLUE), ("recall", ORANGE), ("precision", GREEN))):
        axes.barh(places + (offset - 1) * 0.27, scores[name].nan_to_num(0)[order].numpy(), 0.27, color=colour)
        axes.plot([], [], color=colour, linewidth=6, label=name)
    axes.set_yticks(places, [f"{_short(names[label])} ({int(scores['images'][label])})" for label in order])
    axes.set(xlim=(0, 1), ylim=(-0.6, len(order) - 0.4))
    axes.set_title(_title(len(order), len(names), "classes with the lowest F1"), fontsize=10)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=3, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    return figure


def roc_figure(evaluation: Evaluation) -> Figure:
    """The receiver operating characteristic of each class against the rest, and their mean."""
    curves = _one_against_rest(evaluation, multiclass_roc)
    return _curves_figure(evaluation, curves, "false positive rate", "true positive rate")


def precision_recall_figure(evaluation: Evaluation) -> Figure:
    """Precision against recall of each class against the rest, and their mean."""
    curves = _one_against_rest(evaluation, multiclass_precision_recall_curve)
    # torchmetrics goes from recall 1 to 0.
    turned = {label: (recall.flip(0), precision.flip(0)) for label, (precision, recall) in curves.items()}
    return _curves_figure(evaluation, turned, "recall", "precision")


def reliability_figure(evaluation: Evaluation) -> Figure:
    """Accuracy by confidence, before and after temperature scaling; a calibrated head lies on the diagonal."""
    figure = Figure(figsize=(6, 6), dpi=DPI, layout="tight")
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    stages = (("before", 1.0, ORANGE, "s"), ("after", evaluation.temperature, BLUE, "o"))
    for when, temperature, colour, marker in stages:
        confidence = (evaluation.logits / temperature).softmax(dim=1).amax(dim=1)
        bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
        counts = torch.bincount(bins, minlength=CALIBRATION_BINS)
        filled = counts > 0
        sure = torch.bincount(bins, confidence, CALIBRATION_BINS)[filled] / counts[filled]
        right = torch.bincount(bins, evaluation.right.float(), CALIBRATION_BINS)[filled] / counts[filled]
        error = evaluation.calibration_error(temperature)
        axes.plot(
            sure.numpy(),
            right.numpy(),
            color=colour,
            marker=marker,
            label=f"{when} scaling, calibration error {error:.3f}",
        )
        axes.vlines(sure.numpy(), 0, (counts[filled] / len(bins)).numpy(), color=colour, alpha=0.4, linewidth=4)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy (line), share of the images (bar)")
    axes.set_title(f"temperature {evaluation.temperature:.2f}", fontsize=10)
    axes.legend(loc="upper left", frameon=False)
    return figure


def tiles_figure(evaluation: Evaluation, positions: Sequence[int], thumbnail: Callable[[int], Image.Image]) -> Figure:
    """Pictures with their true class, the predicted class and its probability."""
    rows = max(1, -(-len(positions) // TILE_COLUMNS))
    figure = Figure(figsize=(2.1 * TILE_COLUMNS, 2.5 * rows), dpi=DPI)
    for number, position in enumerate(positions):
        axes = figure.add_subplot(rows, TILE_COLUMNS, number + 1)
        axes.imshow(np.asarray(thumbnail(position)))
        axes.set_axis_off()
        row = evaluation.row(position)
        axes.set_title(f"true: {_short(row.true)}\n{_short(row.predicted)} {row.confidence:.2f}", fontsize=8)
    return figure


def curves_figure(scalars: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Losses and scores by training step: (step, value) pairs by name, such as train/loss and val/acc."""
    figure = Figure(figsize=(11, 4), dpi=DPI, layout="tight")
    panels = (("train/loss", "val/loss"), ("val/acc", "val/balanced_acc", "val/f1", "val/auroc"))
    for number, names in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), number + 1)
        for name, colour, style in zip(names, (ORANGE, BLUE, GREEN, GREY), ("-", "-", "--", ":"), strict=False):
            if points := scalars.get(name):
                axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker=".", label=name)
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(frameon=False)
    return figure


def learning_figure(images: Sequence[int], accuracies: Sequence[float]) -> Figure:
    """Test accuracy against the number of training images, on a logarithmic axis."""
    figure = Figure(figsize=(7, 4), dpi=DPI, layout="tight")
    axes = figure.add_subplot()
    axes.plot(images, accuracies, color=BLUE, marker="o")
    axes.set_xscale("log")
    axes.set_xticks(images, [str(count) for count in images])
    axes.minorticks_off()
    axes.set(xlabel="training images", ylabel="test accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    return figure


def _one_against_rest(evaluation: Evaluation, curve: Callable[..., Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """The curve's first two coordinates per class, without classes that have no images or all of them."""
    probabilities, classes = evaluation.probabilities, len(evaluation.class_names)
    thresholds = None if probabilities.numel() <= MAX_EXACT else 500
    first, second, _ = curve(probabilities, evaluation.labels, num_classes=classes, thresholds=thresholds)
    counts = torch.bincount(evaluation.labels, minlength=classes)
    present = ((counts > 0) & (counts < len(evaluation.labels))).nonzero()[:, 0].tolist()
    return {label: (first[label], second[label]) for label in present}


def _curves_figure(
    evaluation: Evaluation, curves: Mapping[int, tuple[Tensor, Tensor]], x_name: str, y_name: str
) -> Figure:
    figure = Figure(figsize=(6, 6), dpi=DPI, layout="tight")
    axes = figure.add_subplot()
    areas = {label: float(torch.trapezoid(y, x)) for label, (x, y) in curves.items()}
    worst = sorted(areas, key=areas.__getitem__)[:MAX_NAMED_CURVES]
    colours = dict(zip(worst, (ORANGE, GREEN, "#CC79A7"), strict=False))
    for label, (x, y) in curves.items():
        named = f"{_short(evaluation.class_names[label])} {areas[label]:.3f}" if label in colours else None
        width = 1.5 if named else 0.6
        axes.plot(x.numpy(), y.numpy(), color=colours.get(label, GREY), linewidth=width, label=named, alpha=0.9)
    if curves:
        grid = np.linspace(0, 1, 201)
        mean = np.mean([np.interp(grid, x.numpy(), y.numpy()) for x, y in curves.values()], axis=0)
        average = sum(areas.values()) / len(areas)
        axes.plot(grid, mean, color=BLUE, linewidth=2.5, label=f"mean of {len(curves)} classes {average:.3f}")
        axes.legend(title="area under the curve; the lowest are named", loc="lower left", framealpha=0.85)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=x_name, ylabel=y_name)
    return figure


def _title(shown: int, total: int, which: str) -> str:
    return f"the {shown} of {total} {which}" if shown < total else f"{total} classes (images)"


def _short(name: str) -> str:
    """A class name that fits beside an axis; dollar signs would start a formula."""
    name = one_line(name)
    return (name if len(name) <= 18 else f"{name[:17]}…").replace("$", r"\$")
