"""Scores that are means over the classes of a split: over those that have an image in it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score, MulticlassRecall, MulticlassStatScores
from torchmetrics.utilities import dim_zero_cat

from headstart.terminal import say_once


class _MeanOverPresent(MulticlassStatScores):
    """The mean of a score over the classes present, as a base before that score's own class.

    torchmetrics' own average counts a class without an image as 0 where it is predicted once.
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
    """Mean recall over the classes present, scikit-learn's ``balanced_accuracy_score``."""


class MeanF1(_MeanOverPresent, MulticlassF1Score):
    """Mean F1 over the classes present, scikit-learn's ``f1_score(labels=present, average="macro")``."""


class MeanAUROC(MulticlassAUROC):
    """Mean over the classes present of the area under the ROC curve of a class against the rest.

    NaN where there is one class alone, since nothing is ranked then.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average="none")

    def compute(self) -> Tensor:  # type: ignore[override]  # as torchmetrics' own
        """The mean -> []."""
        present = torch.unique(dim_zero_cat(self.target))
        if len(present) < 2:
            return torch.tensor(math.nan, device=self.device)
        auroc: Tensor = super().compute()
        return auroc[present].mean()


def defined(scores: Mapping[str, Any]) -> dict[str, float]:
    """The scores as numbers, without those that the images do not define; NaN is not JSON."""
    values = {name: float(value) for name, value in scores.items()}
    for name in (name for name, value in values.items() if math.isnan(value)):
        say_once(f"{name}: is left out, since its split has images of one class alone")
    return {name: value for name, value in values.items() if not math.isnan(value)}
