"""Logs an evaluation to TensorBoard: figures, pictures, the embedding projector and the graph."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from colorsys import hsv_to_rgb
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from headstart.data.module import ImageData
from headstart.data.splits import Item
from headstart.data.store import FeatureStore
from headstart.errors import UserError
from headstart.model.classifier import TransferClassifier
from headstart.report.drawing import Drawing
from headstart.report.evaluation import Evaluation, Predictions
from headstart.report.figures import TILES, confusion_figure, short, tiles_figure
from headstart.report.multilabel import MultilabelEvaluation, multilabel_tiles
from headstart.terminal import one_line

SPRITE_SIDE, FRAME, THUMBNAIL_SIDE = 32, 2, 160
MAX_CLASSES_IN_TEXT = 100


def thumbnails(store: FeatureStore, items: Sequence[Item]) -> Callable[[int], Image.Image]:
    """Returns a function from an item's position to its picture, padded to a square of 160 pixels."""

    small = replace(store.backbone.preprocessing, resize_size=THUMBNAIL_SIDE)

    @lru_cache(maxsize=1000)
    def thumbnail(position: int) -> Image.Image:
        try:
            image = store.source.read(items[position], small, store.max_pixels)
        except UserError:  # the file was removed after its evaluation, which still stands
            image = Image.new("RGB", (THUMBNAIL_SIDE, THUMBNAIL_SIDE), "grey")
        return ImageOps.pad(image, (THUMBNAIL_SIDE, THUMBNAIL_SIDE), color="white")

    return thumbnail


def pictures_of(
    evaluation: Predictions, figures: Mapping[str, Drawing], thumbnail: Callable[[int], Image.Image]
) -> dict[str, "np.ndarray[Any, np.dtype[np.uint8]]"]:
    """The figures and the tiles of an evaluation as pixels, [H, W, 3] by name."""
    shown = {name: figure.pixels() for name, figure in figures.items()}
    if isinstance(evaluation, MultilabelEvaluation):
        return shown | multilabel_tiles(evaluation, thumbnail)
    assert isinstance(evaluation, Evaluation)
    shown["confusion_matrix"] = confusion_figure(evaluation).pixels()
    for name, right in (("worst_mistakes", False), ("surest_right", True)):
        if positions := evaluation.surest(right, TILES):
            rows = [(position, evaluation.row(position)) for position in positions]
            tiles = [
                (position, f"true: {short(row.true)}", f"{short(row.predicted)} {row.confidence:.2f}")
                for position, row in rows
            ]
            shown[name] = np.asarray(tiles_figure(tiles, thumbnail))
    return shown


def log_evaluation(
    experiment: Any,
    evaluation: Predictions,
    pictures: Mapping[str, "np.ndarray[Any, np.dtype[np.uint8]]"],
    thumbnail: Callable[[int], Image.Image],
    data: ImageData,
    module: TransferClassifier,
) -> None:
    """Logs ``pictures_of`` the evaluation, the projector, the graph and the tables to TensorBoard."""
    split = evaluation.split
    for name, pixels in pictures.items():
        experiment.add_image(f"{split}/{name}", pixels, dataformats="HWC")
    if isinstance(evaluation, Evaluation) and len(evaluation.class_names) <= MAX_CLASSES_IN_TEXT:
        experiment.add_text(f"{split}/confusion_counts", confusion_table(evaluation))
    _project(experiment, evaluation, thumbnail, data.num_workers)
    with warnings.catch_warnings():
        # Tracing is deprecated, but TensorBoard reads nothing else. The metrics are left out, which take long.
        warnings.simplefilter("ignore")
        network = torch.nn.Sequential(module.backbone, module.head).eval()
        images = torch.as_tensor(module.example_input_array, device=module.device)
        traced = torch.jit.trace(network, images, check_trace=False)  # type: ignore[no-untyped-call]
        experiment.add_graph(traced, images)


def confusion_table(evaluation: Evaluation) -> str:
    """The confusion matrix's counts as a Markdown table."""
    names = [one_line(name) for name in evaluation.class_names]
    lines = ["| true \\ predicted | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    rows = zip(names, evaluation.confusion.tolist(), strict=True)
    lines += [f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows]
    return "\n".join(lines)


def _project(
    experiment: Any, evaluation: Predictions, thumbnail: Callable[[int], Image.Image], num_workers: int
) -> None:
    """The embedding projector: features with class, prediction and picture, framed in the class's colour."""
    classes = len(evaluation.class_names)

    def sprite(position: int) -> torch.Tensor:
        hue = sum(evaluation.items[position].labels[:1]) / classes
        small = thumbnail(position).resize((SPRITE_SIDE - 2 * FRAME,) * 2)
        framed = ImageOps.expand(small, FRAME, tuple(round(255 * part) for part in hsv_to_rgb(hue, 0.9, 0.9)))
        drawn: torch.Tensor = functional.to_dtype(functional.pil_to_tensor(framed), torch.float32, scale=True)
        return drawn

    positions = evaluation.projected.tolist()
    rows = [evaluation.row(position) for position in positions]
    metadata = [
        [
            *map(_one_cell, (row.true, row.predicted)),
            "right" if row.true == row.predicted else "wrong",
            _one_cell(row.path),
        ]
        for row in rows
    ]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        sprites = list(pool.map(sprite, positions))
    experiment.add_embedding(
        evaluation.features,
        metadata=metadata,
        label_img=torch.stack(sprites),
        tag=f"{evaluation.split}_features",
        metadata_header=["class", "prediction", "correct", "path"],
    )


def _one_cell(text: str) -> str:
    """Text for a cell of a tab-separated table."""
    return one_line(" ".join(text.split()))
