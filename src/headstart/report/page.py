"""A run's report: one self-contained HTML file to open, send or print."""

import base64
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from PIL import Image
from pytorch_lightning.loggers import Logger

from headstart.data.module import ImageData
from headstart.data.splits import SPLITS
from headstart.files import write_atomically
from headstart.model.classifier import TransferClassifier
from headstart.report.answered import WANTED, answered
from headstart.report.drawing import BOTTOM, LEFT, RIGHT, TOP
from headstart.report.evaluation import Evaluation, Predictions
from headstart.report.figures import TILES, evaluation_figures, learning_figure, short, training_figures
from headstart.report.learning_curve import LearningCurve
from headstart.report.mirror import MirrorCheck
from headstart.report.multilabel import MultilabelEvaluation, multilabel_figures, tile_lines
from headstart.report.tensorboard import log_evaluation, pictures_of, thumbnails
from headstart.report.verdict import Verdict
from headstart.runs.folder import command_line, versions
from headstart.runs.history import REPORT
from headstart.runs.logger import RunLogger
from headstart.runs.trackers import show
from headstart.templates import rendered
from headstart.terminal import score_rows

MAX_SKIPPED_SHOWN = 50
# Pictures behind the numbers of the confusion matrix: at most so many, and bytes, for a page under 5 MB.
MAX_PICTURES, MAX_BYTES = 300, 2_500_000
TOP_PAIRS, TOP_PICTURES = 6, 8  # of the most confused classes
MAX_CELLS = 5000
TITLES = {
    "loss": "Loss by training step",
    "score": "Validation scores by training step",
    "reliability": "Reliability: accuracy by confidence",
    "roc": "Receiver operating characteristic",
    "precision_recall": "Precision and recall",
    "calibration": "Calibration: how often a label is there, by its probability",
    "together": "Images with both labels",
    "roc_by_domain": "Receiver operating characteristic by domain, mean of the classes",
}
Thumbnail = Callable[[int], Image.Image]


def write_report(
    folder: Path,
    evaluation: Predictions,
    data: ImageData,
    module: TransferClassifier,
    scores: Mapping[str, float],
    verdict: Verdict,
    loggers: Sequence[Logger] = (),
    curve: LearningCurve | None = None,
    mirror: MirrorCheck | None = None,
    leaks: str = "",
    changed: Mapping[str, Any] | None = None,
) -> Path:
    """Draws the figures once, writes the report to the folder, shows both to the loggers, and returns the path.

    ``changed`` are the settings that differ from the defaults.
    """
    thumbnail = thumbnails(data.store, evaluation.items)
    if isinstance(evaluation, MultilabelEvaluation):
        figures, template = multilabel_figures(evaluation), "report/multilabel.html.jinja"
        own = _labels(evaluation, data, thumbnail)
    else:
        assert isinstance(evaluation, Evaluation)
        figures, template = evaluation_figures(evaluation), "report/page.html.jinja"
        own = _sureness(evaluation) | _classes(evaluation, data) | _pictures(evaluation, thumbnail)
    pictures = pictures_of(evaluation, figures, thumbnail) if loggers else {}
    for logger in loggers:
        if isinstance(logger, RunLogger):
            log_evaluation(logger.experiment, evaluation, pictures, thumbnail, data, module)
            logger.experiment.flush()
            figures = training_figures(read_scalars(folder)) | figures
    page = rendered(
        template,
        title=f"{folder.parent.name}, {folder.name}",
        verdict=verdict,
        command=command_line(),
        changed=changed,
        scores=score_rows(scores),
        evaluation=evaluation,
        skipped=list(data.store.skipped.items())[:MAX_SKIPPED_SHOWN],
        total_skipped=len(data.store.skipped),
        leaks=leaks,
        figures=figures,
        titles=TITLES,
        curve=curve,
        mirror=mirror,
        curve_figure=learning_figure(curve.images, curve.accuracies) if curve else None,
        versions=versions(),
        **own,
    )
    write_atomically(folder / REPORT, page)
    named = {f"{evaluation.split}/{name}": pixels for name, pixels in pictures.items()}
    for logger in loggers:
        show(logger, named, folder / REPORT)
    return folder / REPORT


def jpeg(image: Image.Image) -> Markup:
    """A picture as a data URI."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return Markup(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")


def common_folder(paths: Sequence[str]) -> str:
    """The folder that all paths lie in, with a slash at its end; empty if there is none."""
    levels = zip(*(path.split("/")[:-1] for path in paths), strict=False)
    return "".join(f"{parts[0]}/" for parts in takewhile(lambda parts: len(set(parts)) == 1, levels))


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that a run logged to TensorBoard: (step, value) pairs by name."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def _sureness(evaluation: Evaluation) -> dict[str, Any]:
    """Calibration, and accuracy by the share of the images that are answered."""
    sure_enough = answered(evaluation)
    return {
        "errors": (evaluation.calibration_error(1.0), evaluation.calibration_error(evaluation.temperature)),
        "axes": (LEFT, RIGHT, TOP, BOTTOM),
        "thresholds": _thresholds(evaluation),
        "wanted": [(accuracy, sure_enough.at(accuracy)) for accuracy in WANTED],
    }


def _labels(evaluation: MultilabelEvaluation, data: ImageData, thumbnail: Thumbnail) -> dict[str, Any]:
    """The table of the labels, the worst first, and the galleries of what is missed and of false alarms."""
    scores, common = evaluation.by_label, common_folder([item.path for item in evaluation.items])
    counts = {split: data.counts(split) for split in SPLITS if data.items_in(split)}
    shown, rows = ("ap", "auroc", "f1", "precision", "recall", "threshold"), []
    for label in scores["ap"].nan_to_num(2.0).argsort(stable=True).tolist():
        values = (float(scores[score][label]) for score in shown)
        images = [int(of_split[label]) for of_split in counts.values()]
        rows.append((evaluation.class_names[label], [*images, *map(_shown, values)]))

    def tile(position: int, label: int) -> dict[str, Any]:
        path = evaluation.items[position].path.removeprefix(common)
        return {"picture": jpeg(thumbnail(position)), "lines": tile_lines(evaluation, position, label), "path": path}

    misses, alarms = ([tile(*pair) for pair in evaluation.worst(missed, TILES)] for missed in (True, False))
    columns = [*counts, "average precision", "AUROC", "F1", "precision", "recall", "threshold"]
    return {"columns": columns, "labels": rows, "misses": misses, "alarms": alarms, "common": common}


def _shown(score: float) -> str:
    """A score for a table, where undefined ones are NaN."""
    return "–" if score != score else f"{score:.3f}"


def _thresholds(evaluation: Evaluation) -> list[tuple[int, int]]:
    """The number of images that are at least as probable as 0, 1, …, 100 %, and of right ones among them."""
    percent = (100 * evaluation.confidence).floor().long().clamp(0, 100)
    found = [torch.bincount(each, minlength=101) for each in (percent, percent[evaluation.right])]
    return list(zip(*(counts.flip(0).cumsum(0).flip(0).tolist() for counts in found), strict=True))


def _classes(evaluation: Evaluation, data: ImageData) -> dict[str, Any]:
    """The table of the classes: images, scores, and the most frequent confusion; and the confusion matrix."""
    scores, names, order = evaluation.by_class(), evaluation.class_names, evaluation.by_similarity
    counts = {split: data.counts(split) for split in SPLITS if data.items_in(split)}
    wrong, rows = evaluation.confusion.clone().fill_diagonal_(0), []
    for label in order:
        shares = [float(scores[score][label]) for score in ("recall", "precision", "f1")]
        taken = names[int(wrong[label].argmax())] if wrong[label].any() else ""
        images = [int(of_split[label]) for of_split in counts.values()]
        rows.append((names[label], [*images, *map(_shown, shares), taken]))
    side, shown = 24 if len(names) <= 30 else 15, [short(names[label]) for label in order]
    place = {label: side * number for number, label in enumerate(order)}
    largest = evaluation.confusion.flatten().argsort(descending=True, stable=True)[:MAX_CELLS].tolist()
    pairs = [divmod(cell, len(names)) for cell in largest]
    cells = [
        _cell(evaluation, true, predicted) | {"x": place[predicted], "y": place[true]}
        for true, predicted in pairs
        if evaluation.confusion[true, predicted]
    ]
    return {
        "matrix": {"side": side, "edge": 12 + 7 * max(map(len, shown)), "names": shown, "cells": cells},
        "columns": [*counts, "recall", "precision", "F1", "most often taken for"],
        "classes": rows,
        "totals": [*(int(of_split.sum()) for of_split in counts.values()), "", "", "", ""],
    }


def _cell(evaluation: Evaluation, true: int, predicted: int) -> dict[str, Any]:
    """A cell of the confusion matrix."""
    names, count = evaluation.class_names, int(evaluation.confusion[true, predicted])
    total = int(evaluation.confusion[true].sum())
    said = f"{names[true]}, right" if true == predicted else f"{names[true]} taken for {names[predicted]}"
    about = f"{said}: {count} of {total} images"
    return {"id": f"cell-{true}-{predicted}", "about": about, "count": count, "share": count / total}


def _pictures(evaluation: Evaluation, thumbnail: Thumbnail) -> dict[str, Any]:
    """The galleries: the most confused classes, the cells of the confusion matrix, mistakes, the surest."""
    common, room = common_folder([item.path for item in evaluation.items]), MAX_BYTES

    def tile(position: int) -> dict[str, Any]:
        row = evaluation.row(position)
        lines = [f"true: {row.true}", f"{row.predicted} {row.confidence:.3f}"]
        return {"picture": jpeg(thumbnail(position)), "lines": lines, "path": row.path.removeprefix(common)}

    top = [(true, predicted) for true, predicted, _ in evaluation.most_confused(TOP_PAIRS)]
    galleries = {cell: _cell(evaluation, *cell) | {"top": True, "tiles": []} for cell in top}
    for position in _by_interest(evaluation, top):
        cell, shown = (int(evaluation.labels[position]), int(evaluation.predicted[position])), tile(position)
        room -= len(shown["picture"])
        if room < 0:
            break
        galleries.setdefault(cell, _cell(evaluation, *cell) | {"top": False, "tiles": []})["tiles"].append(shown)
    mistakes, surest = (list(map(tile, evaluation.surest(right, TILES))) for right in (False, True))
    by_id = {found["id"]: found for found in galleries.values()}
    return {"galleries": by_id, "mistakes": mistakes, "surest": surest, "common": common}


def _by_interest(evaluation: Evaluation, top: Sequence[tuple[int, int]]) -> list[int]:
    """Positions whose pictures are kept: of the most confused classes, then the surest of each pair, mistakes first."""
    seen: Counter[tuple[int, int]] = Counter()
    found = []
    for position in evaluation.confidence.argsort(descending=True, stable=True).tolist():
        cell = int(evaluation.labels[position]), int(evaluation.predicted[position])
        rank = seen[cell]
        seen[cell] += 1
        found.append((cell not in top or rank >= TOP_PICTURES, rank, cell[0] == cell[1], position))
    return [position for *_, position in sorted(found, key=lambda key: key[:3])[:MAX_PICTURES]]
