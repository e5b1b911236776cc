"""A run's report: one HTML file with everything in it, to open from a disk, send, or print."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from PIL import Image
from pytorch_lightning import Trainer

from headstart.data.module import ImageData
from headstart.data.splits import SPLITS
from headstart.files import csv_bytes, write_atomically
from headstart.model.classifier import TransferClassifier
from headstart.report.evaluation import Evaluation
from headstart.report.figures import TILES, curves_figure, evaluation_figures, learning_figure, png
from headstart.report.learning_curve import LearningCurve, learning_curve
from headstart.report.tensorboard import show, thumbnails
from headstart.runs.folder import RunLogger, versions
from headstart.search.bank import Setting

REPORT = "report.html"
MAX_SKIPPED_SHOWN = 50
TITLES = {
    "confusion_matrix": "Confusion matrix, counts",
    "confusion_normalised": "Confusion matrix, shares of the true class",
    "per_class": "Scores by class",
    "roc": "Receiver operating characteristic",
    "precision_recall": "Precision and recall",
    "reliability": "Is it as sure as it is right?",
}


@dataclass(frozen=True)
class About:
    """What the report says beside the figures.

    Attributes:
        title: of the page.
        command: that started the run.
        config: its configuration as YAML; empty: none.
        scores: by name, such as val/acc.
    """

    title: str
    command: str
    config: str
    scores: Mapping[str, float]


def inspect(
    trainer: Trainer,
    module: TransferClassifier,
    data: ImageData,
    evaluation: Evaluation,
    about: About,
    folder: Path,
    setting: Setting | None = None,
) -> None:
    """Draws the figures once, puts them into TensorBoard, and writes the report.

    Args:
        trainer: whose logger is the run's.
        module: that was evaluated.
        data: that it was evaluated on.
        evaluation: what came of it.
        about: what the report says of the run.
        folder: where the report goes.
        setting: of the optimizer, for the learning curve; None: no such curve.
    """
    figures = evaluation_figures(evaluation)
    scalars: dict[str, list[tuple[int, float]]] = {}
    if isinstance(trainer.logger, RunLogger):
        show(trainer.logger.experiment, evaluation, figures, data, module)
        trainer.logger.experiment.flush()
        scalars = read_scalars(folder)
    curve = None
    if setting and data.cache and evaluation.split == "test":
        epochs, warmup = int(trainer.max_epochs or 1), float(module.hparams["warmup"])
        curve = learning_curve(data, setting, max(1, epochs), warmup, seed=0)
    pictures = [("Scores by training step", png(curves_figure(scalars)))] if scalars else []
    pictures += [(TITLES.get(name, name.replace("_", " ")), drawn) for name, drawn in figures.items()]
    write_atomically(
        folder / REPORT, render(data, evaluation, about, pictures, curve).encode(errors="backslashreplace")
    )


def render(
    data: ImageData,
    evaluation: Evaluation,
    about: About,
    pictures: Sequence[tuple[str, bytes]],
    curve: LearningCurve | None,
) -> str:
    """The report as HTML; whatever comes from file names is escaped.

    Args:
        data: whose images it counts.
        evaluation: that it shows.
        about: what it says of the run.
        pictures: title and PNG of each figure.
        curve: None: without one.
    """
    environment = Environment(loader=PackageLoader("headstart", "report"), autoescape=True, trim_blocks=True)
    thumbnail = thumbnails(data, evaluation)
    return environment.get_template("page.html.jinja").render(
        about=about,
        scores=_score_rows(about.scores),
        evaluation=evaluation,
        errors=(evaluation.calibration_error(1.0), evaluation.calibration_error(evaluation.temperature)),
        classes=_class_rows(evaluation),
        counts=[(split, data.counts(split).tolist()) for split in SPLITS if data.of(split)],
        class_names=evaluation.class_names,
        skipped=list(data.skipped.items())[:MAX_SKIPPED_SHOWN],
        total_skipped=len(data.skipped),
        pictures=[(title, embedded(drawn, "png")) for title, drawn in pictures],
        curve=curve,
        curve_picture=embedded(png(learning_figure(curve.images, curve.accuracies)), "png") if curve else None,
        mistakes=_tiles(evaluation, evaluation.surest(False, TILES), thumbnail),
        surest=_tiles(evaluation, evaluation.surest(True, TILES), thumbnail),
        versions=versions(),
    )


def embedded(data: bytes, kind: str) -> Markup:
    """A picture as an address that holds it."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows of a run: (step, value) by name."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    return {name: [(point.step, point.value) for point in events.Scalars(name)] for name in events.Tags()["scalars"]}


def _score_rows(scores: Mapping[str, float]) -> list[tuple[str, list[str]]]:
    names = list(dict.fromkeys(name.split("/", 1)[1] for name in scores if "/" in name))
    columns = [(name, [scores.get(f"{split}/{name}") for split in ("val", "test")]) for name in names]
    return [(name, ["" if value is None else f"{value:.3f}" for value in values]) for name, values in columns]


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
        tiles.append(
            {
                "picture": embedded(file.getvalue(), "jpeg"),
                "path": evaluation.items[position].path,
                "true": evaluation.class_names[int(evaluation.labels[position])],
                "predicted": evaluation.class_names[int(evaluation.predicted[position])],
                "confidence": f"{float(evaluation.confidence[position]):.3f}",
            }
        )
    return tiles


def predictions_csv(evaluation: Evaluation) -> bytes:
    """Path, true class, predicted class and its probability of each image."""
    rows = []
    for position, item in enumerate(evaluation.items):
        names = (evaluation.class_names[int(at[position])] for at in (evaluation.labels, evaluation.predicted))
        rows.append([item.path, *names, f"{float(evaluation.confidence[position]):.6f}"])
    return csv_bytes([["path", "class", "prediction", "probability"], *rows])
