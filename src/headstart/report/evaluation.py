"""A head's predictions on a split, from which every figure and the report are made."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from headstart.data.splits import Item, Split
from headstart.model.metrics import mean_auroc

CALIBRATION_BINS = 15
MAX_ORDERED = 300  # classes; the best order of more takes long


@dataclass(frozen=True)
class Row:
    """The prediction for one image."""

    path: str
    true: str  # name of the true class, or of several
    predicted: str  # name of the predicted class, or of several
    confidence: float  # the calibrated probability of the predicted class


@dataclass(frozen=True)
class Predictions(ABC):
    """The N images of a split and the head's logits for them."""

    split: Split
    class_names: list[str]  # by label
    items: Sequence[Item]
    labels: Tensor  # [N]; of several labels, 0 or 1 for each, [N, C]
    logits: Tensor  # [N, C]
    projected: Tensor  # [M], the positions of at most 2,000 images, evenly spread
    features: Tensor  # [M, D], of those images

    @property
    @abstractmethod
    def probabilities(self) -> Tensor:
        """Calibrated probabilities, [N, C]."""

    @abstractmethod
    def truth_of(self, label: int) -> Tensor:
        """Whether each image is of a class, or has a label, [N] bool."""

    @abstractmethod
    def row(self, position: int) -> Row:
        """The prediction for the image at a position."""


@dataclass(frozen=True)
class Evaluation(Predictions):
    """Predictions of one label per image."""

    temperature: float = 1.0  # divides the logits, for calibrated probabilities

    @cached_property
    def probabilities(self) -> Tensor:
        """Calibrated probabilities, [N, C]."""
        return (self.logits / self.temperature).softmax(dim=1)

    def truth_of(self, label: int) -> Tensor:
        return self.labels == label

    @cached_property
    def predicted(self) -> Tensor:
        """The label of the highest logit, [N]."""
        return self.logits.argmax(dim=1)

    @cached_property
    def confidence(self) -> Tensor:
        """The calibrated probability of the predicted class, [N]."""
        return self.probabilities.gather(1, self.predicted[:, None])[:, 0]

    @cached_property
    def right(self) -> Tensor:
        """Whether the prediction is the true class, [N] bool."""
        return self.predicted == self.labels

    @cached_property
    def confusion(self) -> Tensor:
        """[true, predicted] counts, [C, C]."""
        return multiclass_confusion_matrix(self.predicted, self.labels, num_classes=len(self.class_names))

    @cached_property
    def by_similarity(self) -> list[int]:
        """The labels, in an order in which classes that the head confuses are neighbours."""
        from scipy.cluster.hierarchy import leaves_list, linkage  # scipy is slow to import
        from scipy.spatial.distance import squareform

        classes = len(self.class_names)
        if classes < 3:
            return list(range(classes))
        sums = torch.zeros(classes, classes).index_add_(0, self.labels, self.probabilities)
        means = sums / self.confusion.sum(dim=1, keepdim=True).clamp(min=1)
        apart = 1 - (means + means.T).fill_diagonal_(1) / 2
        tree = linkage(squareform(apart.numpy(), checks=False), "average", optimal_ordering=classes <= MAX_ORDERED)
        return cast("list[int]", leaves_list(tree).tolist())

    def most_confused(self, count: int) -> list[tuple[int, int, int]]:
        """The most frequent mistakes: true label, predicted label and number of images."""
        wrong = self.confusion.clone().fill_diagonal_(0)
        size = len(self.class_names)
        counts, cells = wrong.flatten().sort(descending=True, stable=True)
        found = zip(cells[:count].tolist(), counts[:count].tolist(), strict=True)
        return [(cell // size, cell % size, number) for cell, number in found if number]

    @property
    def acc(self) -> float:
        """Accuracy, in [0, 1]."""
        return float(self.right.float().mean())

    def by_class(self) -> dict[str, Tensor]:
        """Precision, recall, F1 (NaN where undefined) and the number of images, each [C]."""
        right, true, predicted = self.confusion.diag(), self.confusion.sum(dim=1), self.confusion.sum(dim=0)
        return {
            "precision": right / predicted,
            "recall": right / true,
            "f1": 2 * right / (true + predicted),
            "images": true,
        }

    @cached_property
    def domains(self) -> dict[str, "Evaluation"]:
        """The images of each domain; empty if there are not several."""
        names = sorted({item.domain for item in self.items})
        where = {name: torch.tensor([item.domain == name for item in self.items]) for name in names}
        return {name: self._only(where[name]) for name in names} if len(names) > 1 else {}

    def _only(self, mask: Tensor) -> "Evaluation":
        """Of the images under a mask, [N] bool; without features."""
        items = [item for item, kept in zip(self.items, mask.tolist(), strict=True) if kept]
        labels, logits, none = self.labels[mask], self.logits[mask], torch.empty(0, dtype=torch.long)
        return replace(self, items=items, labels=labels, logits=logits, projected=none, features=self.features[:0])

    @cached_property
    def auroc(self) -> float:
        """Mean area under the one-vs-rest ROC curve over the classes present; NaN if there is only one."""
        return mean_auroc(self.probabilities, self.labels)

    def calibration_error(self, temperature: float) -> float:
        """Expected calibration error of softmax(logits / temperature), in [0, 1], over 15 bins of confidence."""
        error = multiclass_calibration_error(
            (self.logits / temperature).softmax(dim=1),
            self.labels,
            num_classes=len(self.class_names),
            n_bins=CALIBRATION_BINS,
        )
        return float(error)

    def row(self, position: int) -> Row:
        true, predicted = (self.class_names[int(labels[position])] for labels in (self.labels, self.predicted))
        return Row(self.items[position].path, true, predicted, float(self.confidence[position]))

    def surest(self, right: bool, count: int) -> list[int]:
        """Positions of the most confident right (or wrong) predictions, most confident first."""
        among = (self.right == right).nonzero()[:, 0]
        order = self.confidence[among].argsort(descending=True, stable=True)
        return cast("list[int]", among[order[:count]].tolist())


def evenly_spaced(size: int, count: int) -> Tensor:
    """``count`` positions among ``size``, evenly spread; all if there are fewer."""
    return torch.linspace(0, size - 1, min(size, count)).round().long() if size else torch.empty(0, dtype=torch.long)
