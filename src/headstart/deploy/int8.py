"""The cost of an export in int8: both files compared on the same validation images."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.features.int8 import session

# More lost images than this number and this share refuse the export.
MAX_LOST, MAX_LOST_SHARE = 2, 0.01


@dataclass(frozen=True)
class Trial:
    """An ONNX file on labelled images."""

    megabytes: float
    milliseconds: float  # per image, the fastest batch
    right: int
    images: int

    @property
    def acc(self) -> float:
        """The accuracy."""
        return self.right / self.images

    def __str__(self) -> str:
        return f"{self.megabytes:.1f} MB, {self.milliseconds:.1f} ms per image, accuracy {self.acc:.4f}"


def compared(fp32: bytes, int8: bytes, batches: Iterable[tuple[Tensor, Tensor]]) -> list[Trial]:
    """Both files on batches of (images [B, 3, H, W] uint8, labels [B]), in turn."""
    models, total = (fp32, int8), 0
    sessions, seconds, right = [session(model) for model in models], [float("inf")] * 2, [0, 0]
    for images, labels in batches:
        total += len(labels)
        for place, each in enumerate(sessions):
            started = time.perf_counter()
            found = _labels(each, images)
            seconds[place] = min(seconds[place], (time.perf_counter() - started) / len(labels))
            right[place] += int((found == labels).sum())
    return [Trial(len(m) / 1e6, s * 1000, r, total) for m, s, r in zip(models, seconds, right, strict=True)]


def loses_too_much(fp32: Trial, int8: Trial) -> bool:
    """Whether int8 loses more than two images, and more than one point of accuracy."""
    lost = fp32.right - int8.right
    return lost > MAX_LOST and lost > MAX_LOST_SHARE * fp32.images


def _labels(model: Any, images: Tensor) -> Tensor:
    return torch.from_numpy(model.run(None, {"images": images.numpy()})[0]).argmax(dim=1)
