"""Do left and right matter? The trained head is tested on mirrored validation images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.data.module import ImageData
from headstart.images import Views
from headstart.model.classifier import TransferClassifier
from headstart.report.evaluation import evenly_spaced
from headstart.terminal import listing

MAX_IMAGES = 256
MIN_LOSS, MIN_LOST = 0.05, 5  # a smaller drop, in accuracy or in images, may be chance
MIN_SWAPPED = 3  # fewer images of a class predicted as another may be chance


@dataclass(frozen=True)
class MirrorCheck:
    """Accuracy on validation images, as they are and mirrored."""

    images: int
    accuracy: float  # on the original images
    mirrored: float  # on their mirror images
    swapped: list[tuple[str, str]]  # a class, and the one that most of its mirrored images are predicted as

    @property
    def advice(self) -> str:
        """One sentence on the effect of mirroring; empty if there is none."""
        loss = self.accuracy - self.mirrored
        if not self.swapped and (loss < MIN_LOSS or loss * self.images < MIN_LOST):
            return ""
        said = listing([f"{name} becomes {other}" for name, other in self.swapped])
        return (
            f"Mirrored, {100 * self.mirrored:.1f} % of {self.images} validation images are right instead of "
            f"{100 * self.accuracy:.1f} %{f' ({said})' if said else ''}: left and right matter here, so do not mirror "
            "in augmentation (--data.flip=false)."
        )


def mirror_check_of(module: TransferClassifier, data: ImageData) -> MirrorCheck | None:
    """Compares a head's predictions on up to 256 validation images with those on their mirror images.

    The mirrored features are cached as a view. Returns None without a cache or validation, and for several labels.
    """
    items = data.items_in("val")
    if not data.store.cache or not items or data.multilabel:
        return None
    chosen = evenly_spaced(len(items), MAX_IMAGES)
    mirrored = data.store.matrix([items[place] for place in chosen.tolist()], Views("mirrored"), 1).whole()
    plain, labels = data.labelled("val").views[0].gather(chosen), data.labels("val")[chosen]
    with torch.no_grad():
        before, after = (module(rows.to(module.device)).argmax(dim=1).cpu() for rows in (plain, mirrored))
    return MirrorCheck(
        images=len(chosen),
        accuracy=float((before == labels).float().mean()),
        mirrored=float((after == labels).float().mean()),
        swapped=[(data.class_names[own], data.class_names[other]) for own, other in _swapped(labels, before, after)],
    )


def _swapped(labels: Tensor, before: Tensor, after: Tensor) -> list[tuple[int, int]]:
    """Pairs of a class and the one that most of its correctly predicted images become when mirrored."""
    found = []
    for own in sorted(set(labels.tolist())):
        now = after[(labels == own) & (before == own)]
        other = int(now.mode().values) if len(now) else own
        count = int((now == other).sum())
        if other != own and count >= MIN_SWAPPED and count > len(now) / 2:
            found.append((own, other))
    return found
