"""Check pictures for an export, to test that a program in any language decodes images as headstart does."""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from headstart.decoding import decode
from headstart.images import Preprocessing, preprocess
from headstart.model.classifier import TransferClassifier

# Maximum difference of a program's probabilities from the expected ones.
TOLERANCE = 1e-3
DRAWN = 40
ORIENTATION, TURNED = 0x0112, 6  # EXIF's tag, and its value for an image that is stored on its side


def check_files(module: TransferClassifier, run: Callable[[Tensor], Tensor]) -> dict[str, bytes]:
    """The content of five pictures and of ``expected.json``, by name; ``run`` maps images to probabilities.

    The pictures are drawn, since a run's images may be private. They are the least confident of 40 drawings, so that
    wrong decoding changes the probabilities.
    """
    preprocessing = module.backbone.preprocessing
    drawings = [_encoded(_drawing(seed), "PNG") for seed in range(DRAWN)]
    sure = _probabilities(preprocessing, run, drawings).max(dim=1).values
    plain, gray, clear, turned, large = sure.argsort()[:5].tolist()
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    fading = _drawing(clear)
    fading.putalpha(Image.linear_gradient("L").resize(fading.size))
    on_its_side = _drawing(turned).transpose(Image.Transpose.ROTATE_90)
    pictures = {
        "plain.png": _encoded(_drawing(plain), "PNG"),
        "gray16.png": _encoded(_of_16_bits(_drawing(gray), preprocessing), "PNG"),
        "transparent.png": _encoded(fading, "PNG"),
        "turned.jpg": _encoded(on_its_side, "JPEG", exif=exif, quality=95, subsampling=0),
        "large.jpg": _encoded(_drawing(large, scale=12), "JPEG", quality=85),
    }
    rows = _probabilities(preprocessing, run, list(pictures.values())).tolist()
    expected = {
        "class_names": module.class_names,
        "tolerance": TOLERANCE,
        "probabilities": dict(zip(pictures, rows, strict=True)),
    }
    return pictures | {"expected.json": json.dumps(expected, indent=1).encode()}


def _drawing(seed: int, scale: int = 1) -> Image.Image:
    """Discs and triangles of random colours, 300 x 200 pixels times the scale."""
    random = np.random.default_rng(seed)
    side = np.array([300, 200])
    image = Image.new("RGB", tuple((side * scale).tolist()), tuple(random.integers(256, size=3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        colour = tuple(random.integers(256, size=3).tolist())
        corners = random.uniform(-0.2, 1.2, (3, 2)) * side * scale
        draw.polygon(list(map(tuple, corners)), fill=colour[::-1])
        draw.ellipse([*corners.min(axis=0) / 2, *corners.max(axis=0) / 2], fill=colour)
    return image


def _of_16_bits(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """16-bit gray in the training data's range; scaled back, it has exactly the image's 8-bit values."""
    white = min(preprocessing.white, 2**16 - 1)
    return Image.fromarray((-(-np.asarray(image.convert("L"), np.int64) * white // 255)).astype(np.uint16))


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


@torch.no_grad()
def _probabilities(preprocessing: Preprocessing, run: Callable[[Tensor], Tensor], pictures: list[bytes]) -> Tensor:
    """The probabilities [N, C] for the content of image files."""
    images = [preprocess(decode(data, preprocessing), preprocessing) for data in pictures]
    return run(torch.stack(images))
