"""Would more images help? The head retrained on shares of the training images, from cached features."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.data.module import ImageData
from headstart.model.classifier import TransferClassifier
from headstart.search.bank import HeadSettings, Schedule, train_bank
from headstart.search.exact import predicted
from headstart.terminal import images_bar

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
# Small shares get more epochs, up to this many steps; else the curve would measure too short a training.
MIN_STEPS = 300
# With few training images, several draws are averaged.
DRAWS, MAX_IMAGES_DRAWN_OFTEN = 3, 10_000


@dataclass(frozen=True)
class LearningCurve:
    """Test accuracy by number of training images."""

    images: list[int]  # training images of each point
    accuracies: list[float]  # on the test images, means over draws
    gain: float  # rise in accuracy from half of the training images to all
    error: float  # the standard error of the gain, over the test images

    @property
    def advice(self) -> str:
        """One sentence on whether more photos would help."""
        half, whole = self.images[-2:]
        points, noise = 100 * self.gain, 200 * self.error
        found = f"From {half} to {whole} training images the test accuracy rose by {points:.1f} points"
        if points < 0:
            found = f"From {half} to {whole} training images the test accuracy fell by {-points:.1f} points"
        if points > noise and points > 0.5:
            return f"{found} (± {noise:.1f}): more photos like these would probably help."
        if points + noise < 2:
            return f"{found} (± {noise:.1f}): more photos like these would help little; other photos or weights might."
        return f"{found}, within ± {noise:.1f}: too few test images to tell whether more photos would help."


def learning_curve_of(module: TransferClassifier, data: ImageData, epochs: int | None) -> LearningCurve | None:
    """The learning curve of a run's linear head; None without a cache and for other heads or fine-tuned backbones."""
    if module.finetuned or not data.store.cache or not isinstance(module.head, nn.Linear):
        return None
    settings = HeadSettings(*(float(module.hparams[name]) for name in ("lr", "weight_decay", "label_smoothing")))
    warmup, weights = module.hparams["warmup"], module.loss_weights
    return learning_curve(data, settings, max(1, epochs or 1), warmup, seed=0, class_weights=weights)


def learning_curve(
    data: ImageData,
    settings: HeadSettings,
    epochs: int,
    warmup: float,
    seed: int,
    class_weights: Tensor | None = None,
) -> LearningCurve:
    """Trains on 5, 10, 25, 50 and 100 % of the training images per class, and tests.

    Each head is taken at its lowest validation loss, as in `train`. The data must be loaded, with a cache and a test
    split; ``epochs`` is the number for all images.
    """
    train, val, test = data.labelled("train"), data.labelled("val"), data.labelled("test")
    wanted_steps = min(epochs * math.ceil(len(train) / data.batch_size), MIN_STEPS)
    draws = DRAWS if len(train) <= MAX_IMAGES_DRAWN_OFTEN else 1
    parts = [
        (share, stratified(train.labels, share, seed + draw))
        for share in SHARES
        for draw in range(draws if share < 1 else 1)
    ]
    lengths = [max(epochs, math.ceil(wanted_steps / math.ceil(len(part) / data.batch_size))) for _, part in parts]
    right: dict[float, list[Tensor]] = {share: [] for share in SHARES}
    sizes: dict[float, int] = {}
    total = sum(len(part) * length for (_, part), length in zip(parts, lengths, strict=True))
    with images_bar("learning curve", total) as advance:
        for (share, part), length in zip(parts, lengths, strict=True):
            schedule = Schedule(length, data.batch_size, warmup, seed)
            classes, rows = len(data.class_names), train.take(part)
            (trained,) = train_bank([settings], rows, val, classes, schedule, advance, class_weights=class_weights)
            right[share].append((predicted(trained.head, test) == test.labels).float())
            sizes[share] = len(part)
    means = {share: torch.stack(found).mean(dim=0) for share, found in right.items()}
    gain = means[1.0] - means[0.5]
    return LearningCurve(
        images=list(sizes.values()),
        accuracies=[float(mean.mean()) for mean in means.values()],
        gain=float(gain.mean()),
        error=float(gain.std(correction=0)) / math.sqrt(len(gain)),
    )


def stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """Positions of a random share of each class, at least one image; larger shares contain the smaller ones."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    classes = [shuffled[labels[shuffled] == label] for label in sorted(set(labels.tolist()))]
    return torch.cat([of_class[: max(1, round(share * len(of_class)))] for of_class in classes]).sort().values
