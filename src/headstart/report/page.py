"""A run's report: one self-contained HTML file to open, send or print."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image
from pytorch_lightning import LightningModule

from headstart.data.module import ImageData
from headstart.data.splits import SPLITS
from headstart.files import csv_bytes, write_atomically
from headstart.report.evaluation import Evaluation
from headstart.report.figures import TILES, curves_figure, evaluation_figures, learning_figure, png
from headstart.report.learning_curve import LearningCurve
from headstart.report.mirror import MirrorCheck
from headstart.report.tensorboard import log_evaluation, thumbnails
from headstart.runs.folder import command_line, versions
from headstart.runs.history import CONFIG, REPORT
from headstart.runs.logger import RunLogger
from headstart.terminal import score_rows

MAX_SKIPPED_SHOWN = 50
TITLES = {
    "confusion_matrix": "Confusion matrix, counts",
    "confusion_normalised": "Confusion matrix, shares of the true class",
    "per_class": "Scores by class",
    "roc": "Receiver operating characteristic",
    "precision_recall": "Precision and recall",
    "reliability": "Reliability: accuracy by confidence",
}


def write_report(
    folder: Path,
    evaluation: Evaluation,
    data: ImageData,
    module: LightningModule,
    scores: Mapping[str, float],
    logger: RunLogger | None = None,
    curve: LearningCurve | None = None,
    mirror: MirrorCheck | None = None,
) -> Path:
    """Draws the figures once, logs them to TensorBoard, writes the report and returns its path.

    The folder is a run's; the report shows its configuration, if any. Without a logger TensorBoard is skipped.
    """
    figures = evaluation_figures(evaluation)
    scalars: dict[str, list[tuple[int, float]]] = {}
    if logger:
        log_evaluation(logger.experiment, evaluation, figures, data, module)
        logger.experiment.flush()
        scalars = read_scalars(folder)
    pictures = [("Scores by training step", png(curves_figure(scalars)))] if scalars else []
    pictures += [(TITLES.get(name, name.replace("_", " ")), drawn) for name, drawn in figures.items()]
    page = render(folder, evaluation, data, scores, pictures, curve, mirror)
    write_atomically(folder / REPORT, page.encode(errors="backslashreplace"))
    return folder / REPORT


def render(
    folder: Path,
    evaluation: Evaluation,
    data: ImageData,
    scores: Mapping[str, float],
    pictures: Sequence[tuple[str, bytes]],
    curve: LearningCurve | None,
    mirror: MirrorCheck | None,
) -> str:
    """Renders the report as HTML; ``pictures`` are (title, PNG) pairs. Text from file names is escaped."""
    environment = Environment(loader=PackageLoader("headstart", "report"), autoescape=True, trim_blocks=True)
    config, thumbnail = folder / CONFIG, thumbnails(data, evaluation)
    return environment.get_template("page.html.jinja").render(
        title=f"{folder.parent.name}, {folder.name}",
        command=command_line(),
        config=config.read_text() if config.is_file() else "",
        scores=score_rows(scores),
        evaluation=evaluation,
        errors=(evaluation.calibration_error(1.0), evaluation.calibration_error(evaluation.temperature)),
        classes=_class_rows(evaluation),
        counts=[(split, data.counts(split).tolist()) for split in SPLITS if data.items_in(split)],
        class_names=evaluation.class_names,
        skipped=list(data.store.skipped.items())[:MAX_SKIPPED_SHOWN],
        total_skipped=len(data.store.skipped),
        pictures=[(title, embedded(drawn, "png")) for title, drawn in pictures],
        curve=curve,
        mirror=mirror,
        curve_picture=embedded(png(learning_figure(curve.images, curve.accuracies)), "png") if curve else None,
        mistakes=_tiles(evaluation, evaluation.surest(False, TILES), thumbnail),
        surest=_tiles(evaluation, evaluation.surest(True, TILES), thumbnail),
        versions=versions(),
    )


def embedded(data: bytes, kind: str) -> Markup:
    """A picture as a data URI."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars that a run logged to TensorBoard: (step, value) pairs by name."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def _class_rows(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    scores = evaluation.by_class()
    rows = []
    for label, name in enumerate(evaluation.class_names):
        shares = [float(scores[score][label]) for score in ("precision", "recall", "f1")]
        rows.append((name, [str(int(scores["images"][label])), *("–" if s != s else f"{s:.3f}" for s in shares)]))
    return rows


def _tiles(
    evaluation: Evaluation, positions: Sequence[int], thumbnail: Callable[[int], Image.Image]
) -> list[dict[str, Any]]:
    tiles = []
    for position in positions:
        file = io.BytesIO()
        thumbnail(position).save(file, "JPEG", quality=80)
        row = evaluation.row(position)
        about = asdict(row) | {"confidence": f"{row.confidence:.3f}"}
        tiles.append({"picture": embedded(file.getvalue(), "jpeg"), **about})
    return tiles


def predictions_csv(evaluation: Evaluation) -> bytes:
    """A row per image: path, true class, predicted class and its probability."""
    rows = (evaluation.row(position) for position in range(len(evaluation.items)))
    lines = ([row.path, row.true, row.predicted, f"{row.confidence:.6f}"] for row in rows)
    return csv_bytes([["path", "class", "prediction", "probability"], *lines])
