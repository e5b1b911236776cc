"""Metrics averaged over the classes or labels present in a split."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassF1Score, MulticlassRecall, MulticlassStatScores
from torchmetrics.functional.classification import binary_average_precision

from headstart.terminal import say_once


class _MeanOverPresent(MulticlassStatScores):
    """The mean of a score over the classes present; a mixin that precedes the class of the score.

    The average of torchmetrics counts a class without images as 0 if it is predicted at least once.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none")

    def compute(self) -> Tensor:
        """The mean -> []."""
        assert isinstance(self.tp, Tensor)
        assert isinstance(self.fn, Tensor)
        scores: Tensor = super().compute()
        return scores[self.tp + self.fn > 0].mean()


class MeanRecall(_MeanOverPresent, MulticlassRecall):
    """Mean recall over the classes present, as scikit-learn's ``balanced_accuracy_score``."""


class MeanF1(_MeanOverPresent, MulticlassF1Score):
    """Mean F1 over the classes present, as scikit-learn's ``f1_score(labels=present, average="macro")``."""


def auroc(positives: Tensor, negatives: Tensor) -> float:
    """The share of pairs in which the positive, of [P], scores higher than the negative, of [N]; ties count half.

    It is the area under the ROC curve, exactly: Hanley and McNeil, 1982.
    """
    ordered, scores = np.sort(negatives.numpy()), np.sort(positives.numpy())  # several times faster than torch's
    below = sum(int(np.searchsorted(ordered, scores, side=side).sum()) for side in ("left", "right"))
    return below / (2 * len(scores) * len(ordered))


def aurocs(scores: Tensor, truth: Tensor) -> Tensor:
    """The area under the ROC curve of each label, from scores and truth [N, C] -> [C]; NaN without both kinds."""
    scores, truth = scores.cpu(), truth.cpu().bool()
    found = torch.full((truth.shape[1],), math.nan)
    for label in (truth.any(dim=0) & ~truth.all(dim=0)).nonzero()[:, 0].tolist():
        found[label] = auroc(scores[truth[:, label], label], scores[~truth[:, label], label])
    return found


def mean_auroc(probabilities: Tensor, labels: Tensor) -> float:
    """The mean over the classes present of the area under the one-vs-rest ROC curve; NaN if there is only one.

    Args:
        probabilities: [N, C].
        labels: class indices, [N].
    """
    classes = torch.arange(probabilities.shape[1], device=labels.device)
    return float(aurocs(probabilities, labels[:, None] == classes).nanmean())


def average_precisions(scores: Tensor, truth: Tensor) -> Tensor:
    """The average precision of each label, from scores and truth [N, C] -> [C]; NaN without positives."""
    scores, truth = scores.cpu(), truth.cpu().bool()
    found = torch.full((truth.shape[1],), math.nan)
    for label in truth.any(dim=0).nonzero()[:, 0].tolist():
        places = torch.unique(scores[:, label], return_inverse=True)[1]
        ranks = places.double() / len(places)  # in [0, 1], which torchmetrics takes as they are
        found[label] = binary_average_precision(ranks, truth[:, label].long(), validate_args=False)
    return found


def defined(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores as floats, without undefined ones (NaN), which JSON cannot hold."""
    values = {name: float(value) for name, value in scores.items()}
    for name in (name for name, value in values.items() if math.isnan(value)):
        say_once(f"{name}: is undefined and left out, since its split has images of only one class")
    return {name: value for name, value in values.items() if not math.isnan(value)}
