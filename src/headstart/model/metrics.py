"""Metrics averaged over the classes or labels present in a split."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import (
    MulticlassAUROC,
    MulticlassF1Score,
    MulticlassRecall,
    MulticlassStatScores,
    MultilabelAUROC,
    MultilabelAveragePrecision,
)
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchmetrics.utilities import dim_zero_cat

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


class MeanAUROC(MulticlassAUROC):
    """Mean over the classes present of the area under the one-vs-rest ROC curve.

    NaN if only one class is present.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none")

    def compute(self) -> Tensor:  # type: ignore[override]  # as in torchmetrics
        """The mean -> []."""
        probabilities, labels = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        present = torch.unique(labels)
        if len(present) < 2:
            return torch.tensor(math.nan, device=self.device)
        # One class at a time: all together take four times the memory of the probabilities.
        areas = [binary_auroc(probabilities[:, label], labels == label, validate_args=False) for label in present]
        return torch.stack(areas).mean()


class MeanAveragePrecision(MultilabelAveragePrecision):
    """Mean of the average precision over the labels with positives; NaN if there are none."""

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels, average="none", validate_args=False)

    def compute(self) -> Tensor:  # type: ignore[override]  # as in torchmetrics
        """The mean -> []."""
        return average_precisions(dim_zero_cat(self.preds), dim_zero_cat(self.target)).nanmean()


class MultilabelMeanAUROC(MultilabelAUROC):
    """Mean of the area under the ROC curve over the labels with positives and negatives; NaN if there are none."""

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels, average="none", validate_args=False)

    def compute(self) -> Tensor:  # type: ignore[override]  # as in torchmetrics
        """The mean -> []."""
        return aurocs(dim_zero_cat(self.preds), dim_zero_cat(self.target)).nanmean()


def average_precisions(scores: Tensor, labels: Tensor) -> Tensor:
    """The average precision of each label, from scores and labels [N, C] -> [C]; NaN without positives."""
    return _by_label(binary_average_precision, scores, labels, labels.bool().any(dim=0))


def aurocs(scores: Tensor, labels: Tensor) -> Tensor:
    """The area under the ROC curve of each label, from scores and labels [N, C] -> [C]; NaN without both kinds."""
    return _by_label(binary_auroc, scores, labels, labels.bool().any(dim=0) & ~labels.bool().all(dim=0))


def _by_label(score: Callable[..., Tensor], scores: Tensor, labels: Tensor, defined: Tensor) -> Tensor:
    found = torch.full((labels.shape[1],), math.nan)
    scores, labels = scores.cpu(), labels.cpu().long()  # Apple's GPUs have no float64
    for label in defined.nonzero()[:, 0].tolist():
        found[label] = score(_ranks(scores[:, label]), labels[:, label], validate_args=False)
    return found


def _ranks(scores: Tensor) -> Tensor:
    """The order of scores [N] as numbers in [0, 1], which torchmetrics takes as they are, in float64."""
    places: Tensor = torch.unique(scores, return_inverse=True)[1]
    return places.double() / len(scores)


def defined(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores as floats, without undefined ones (NaN), which JSON cannot hold."""
    values = {name: float(value) for name, value in scores.items()}
    for name in (name for name, value in values.items() if math.isnan(value)):
        say_once(f"{name}: is undefined and left out, since its split has images of only one class")
    return {name: value for name, value in values.items() if not math.isnan(value)}
