"""Would more images help? A ridge classifier fitted on shares of the training images, from cached features."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.data.module import ImageData
from headstart.features.matrix import Labelled
from headstart.model.classifier import TransferClassifier
from headstart.model.heads import as_linear
from headstart.search.bank import ROWS_AT_ONCE
from headstart.search.exact import predicted

SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
DRAWS = 3  # smaller shares are drawn several times, and averaged
MAX_IMAGES = 100_000  # with more training images, the curve ends here
# L2 penalties, as multiples of the mean eigenvalue.
PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class LearningCurve:
    """Test accuracy by number of training images."""

    images: list[int]  # training images of each point
    accuracies: list[float]  # on the test images, means over draws
    gain: float  # rise in accuracy from half of the training images to all
    error: float  # the standard error of the gain, over the test images

    @property
    def rises(self) -> bool:
        """Whether more images would probably help."""
        return self.gain > max(2 * self.error, 0.005)

    @property
    def advice(self) -> str:
        """One sentence on whether more photos would help."""
        half, whole = self.images[-2:]
        points, noise = 100 * self.gain, 200 * self.error
        found = f"From {half} to {whole} training images the test accuracy rose by {points:.1f} points"
        if points < 0:
            found = f"From {half} to {whole} training images the test accuracy fell by {-points:.1f} points"
        if self.rises:
            return f"{found} (± {noise:.1f}): more photos like these would probably help."
        if points + noise < 2:
            return f"{found} (± {noise:.1f}): more photos like these would help little; other photos or weights might."
        return f"{found}, within ± {noise:.1f}: too few test images to tell whether more photos would help."


def learning_curve_of(module: TransferClassifier, data: ImageData) -> LearningCurve | None:
    """The learning curve of a run's features; None without cache or validation, for several labels, if fine-tuned."""
    usable = data.store.cache and data.items_in("val") and not module.finetuned and not data.multilabel
    return learning_curve(data) if usable else None


def learning_curve(data: ImageData) -> LearningCurve:
    """Fits ridge classifiers on 5, 10, 25, 50 and 100 % of the training images per class, and tests them.

    Each has the penalty of the lowest squared error on the validation images. A ridge classifier has a closed form, so
    that a curve takes a fraction of a second, and it scores as a trained linear head does, or close to it. The data
    must be loaded, with a cache, and validation and test images.
    """
    train, val, test = (data.labelled(split) for split in ("train", "val", "test"))
    limit, classes = min(1.0, MAX_IMAGES / len(train)), len(data.class_names)
    images, right = [], []
    for share in SHARES:
        draws = []
        for draw in range(DRAWS if share < 1 else 1):
            part = train.take(stratified(train.labels, share * limit, draw))
            best = min(ridge(part.views[0].whole(), part.labels, classes), key=lambda head: squared_error(head, val))
            draws.append((predicted(best, test) == test.labels).float())
        images.append(len(part))
        right.append(torch.stack(draws).mean(dim=0))
    gain = right[-1] - right[-2]
    return LearningCurve(
        images=images,
        accuracies=[float(of_share.mean()) for of_share in right],
        gain=float(gain.mean()),
        error=float(gain.std(correction=0)) / math.sqrt(len(gain)),
    )


def ridge(features: Tensor, labels: Tensor, num_classes: int) -> list[nn.Linear]:
    """Ridge regression of the classes on features [N, D]: a linear head for each penalty.

    A class counts as the square root of its images, else small classes would never be predicted. One
    eigendecomposition, of the Gram matrix or the covariance, whichever is smaller, serves all penalties.
    """
    device = features.device
    targets = functional.one_hot(labels.to(device), num_classes).float()
    weights = targets.sum(dim=0).rsqrt()[labels][:, None]
    weights = weights / weights.mean()
    mean, shares = (weights * features).mean(dim=0), (weights * targets).mean(dim=0)
    centred, targets = weights.sqrt() * (features - mean), weights.sqrt() * (targets - shares)
    dual = len(features) < features.shape[1]
    values, vectors = torch.linalg.eigh((centred @ centred.T if dual else centred.T @ centred).cpu())
    values, vectors = values.clamp(min=0).to(device), vectors.to(device)  # Apple's GPUs have no such decomposition
    axes = centred.T @ vectors if dual else vectors
    along = vectors.T @ (targets if dual else centred.T @ targets)
    found = [axes @ (along / (values + penalty * values.mean() + 1e-12)[:, None]) for penalty in PENALTIES]
    return [as_linear(weight.T.contiguous(), shares - mean @ weight) for weight in found]


def squared_error(head: nn.Linear, labelled: Labelled) -> float:
    """The sum of squared differences between a head's outputs and the classes, as one-hot vectors."""
    classes = head.out_features
    differences = (head(block) - functional.one_hot(truth, classes) for block, truth in labelled.blocks(ROWS_AT_ONCE))
    return sum(float(difference.square().sum()) for difference in differences)


def stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """Positions of a random share of each class, at least one image; larger shares contain the smaller ones."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    classes = [shuffled[labels[shuffled] == label] for label in sorted(set(labels.tolist()))]
    return torch.cat([of_class[: max(1, round(share * len(of_class)))] for of_class in classes]).sort().values
