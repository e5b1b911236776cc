"""Logs an evaluation to TensorBoard: figures, pictures, the embedding projector and the graph."""

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from PIL import Image, ImageOps
from pytorch_lightning import LightningModule
from torchvision.transforms.v2 import functional

from headstart.data.module import ImageData
from headstart.errors import UserError
from headstart.report.evaluation import Evaluation
from headstart.report.figures import TILES, pixels, png, tiles_figure
from headstart.terminal import one_line

SPRITE_SIDE, TILE_SIDE = 32, 128
MAX_CLASSES_IN_TEXT = 100


def thumbnails(data: ImageData, evaluation: Evaluation) -> Callable[[int], Image.Image]:
    """Returns a function from a position in the evaluation to its picture, padded to 128 x 128 pixels."""

    small = replace(data.store.backbone.preprocessing, resize_size=TILE_SIDE)

    def thumbnail(position: int) -> Image.Image:
        try:
            image = data.source.read(evaluation.items[position], small, data.store.max_pixels)
        except UserError:  # the file was removed after its evaluation, which still stands
            image = Image.new("RGB", (TILE_SIDE, TILE_SIDE), "grey")
        return ImageOps.pad(image, (TILE_SIDE, TILE_SIDE), color="white")

    return thumbnail


def log_evaluation(
    experiment: Any, evaluation: Evaluation, figures: Mapping[str, bytes], data: ImageData, module: LightningModule
) -> None:
    """Logs the figures, the tiles, the projector, the graph and the confusion table to TensorBoard."""
    thumbnail, split = thumbnails(data, evaluation), evaluation.split
    tiles = {
        name: png(tiles_figure(evaluation, evaluation.surest(right, TILES), thumbnail))
        for name, right in (("worst_mistakes", False), ("surest_right", True))
        if evaluation.surest(right, 1)
    }
    for name, drawn in {**figures, **tiles}.items():
        experiment.add_image(f"{split}/{name}", pixels(drawn), dataformats="HWC")
    if len(evaluation.class_names) <= MAX_CLASSES_IN_TEXT:
        experiment.add_text(f"{split}/confusion_counts", confusion_table(evaluation))
    _project(experiment, evaluation, thumbnail, data.num_workers)
    with warnings.catch_warnings():
        # `add_graph` uses tracing, which torch warns about, but TensorBoard reads nothing else.
        warnings.simplefilter("ignore")
        images = torch.as_tensor(module.example_input_array, device=module.device)
        experiment.add_graph(module, images)


def confusion_table(evaluation: Evaluation) -> str:
    """The confusion matrix's counts as a Markdown table."""
    names = [one_line(name) for name in evaluation.class_names]
    lines = ["| true \\ predicted | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    rows = zip(names, evaluation.confusion.tolist(), strict=True)
    lines += [f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows]
    return "\n".join(lines)


def _project(
    experiment: Any, evaluation: Evaluation, thumbnail: Callable[[int], Image.Image], num_workers: int
) -> None:
    """The embedding projector: features with picture, class, prediction and whether it is right."""

    def sprite(position: int) -> torch.Tensor:
        small = thumbnail(position).resize((SPRITE_SIDE, SPRITE_SIDE))
        drawn: torch.Tensor = functional.to_dtype(functional.pil_to_tensor(small), torch.float32, scale=True)
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
