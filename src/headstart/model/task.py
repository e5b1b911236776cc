"""What differs between one label per image and several: losses, scores, calibration and decision.

``SingleLabel`` is the usual case; ``MultiLabel`` is in multilabel.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric
from torchmetrics import classification as metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from headstart.model.calibration import fit_temperature
from headstart.model.metrics import MeanF1, MeanRecall, mean_auroc
from headstart.model.sets import set_scores, true_probabilities


class Task(ABC):
    """One label per image, or several; an instance holds what is fitted on the validation images.

    ``losses``, ``score`` and the other static methods take only logits and labels, for fits without a module.
    """

    headline: ClassVar[str]  # the score by which heads are compared, as in val/acc
    paired: ClassVar[str]  # the name of ``per_image``
    best_by: ClassVar[tuple[str, ...]]  # validation scores that may choose the best head
    whole: ClassVar[tuple[str, ...]]  # the names of the ``scores`` of a validation

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    @staticmethod
    @abstractmethod
    def activation(logits: Tensor) -> Tensor:
        """Logits [B, C] -> uncalibrated probabilities [B, C]."""

    @staticmethod
    @abstractmethod
    def losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        """The cross entropy of each image, [B]; with the class weights [C] that are not in ``shares``."""

    @staticmethod
    @abstractmethod
    def shares(labels: Tensor, weights: Tensor | None) -> Tensor:
        """The weight of each image in a loss, [N] with the sum 1, from class weights [C]."""

    @staticmethod
    @abstractmethod
    def problems(labels: Tensor) -> int:
        """The number of independent problems whose mean a loss is."""

    @staticmethod
    @abstractmethod
    def score(logits: Tensor, labels: Tensor) -> float:
        """The ``headline``, in [0, 1]."""

    @staticmethod
    @abstractmethod
    def per_image(logits: Tensor, labels: Tensor) -> Tensor:
        """How right the logits are about each image, [N] in [0, 1]: for paired differences."""

    @staticmethod
    @abstractmethod
    def errors(logits: Tensor, labels: Tensor, smoothing: Tensor, weights: Tensor | None) -> Tensor:
        """The gradient of H training losses by their logits [H, B, C]; ``smoothing`` is [H] -> [H, B, C]."""

    @staticmethod
    @abstractmethod
    def balanced(counts: Tensor, images: int) -> Tensor:
        """Class weights [C] that make up for rare classes, from the images per class [C] and their total."""

    @abstractmethod
    def training_loss(self, smoothing: float, weights: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The training loss: logits [B, C], labels -> []."""

    def metrics(self) -> dict[str, Metric]:
        """Scores of uncalibrated probabilities that are updated by batches, by name."""
        return {}

    @abstractmethod
    def calibrate(self, logits: Tensor, labels: Tensor) -> None:
        """Fits what later checkpoints hold to validation logits [N, C] and their labels."""

    @abstractmethod
    def calibrated(self, logits: Tensor) -> Tensor:
        """Logits [B, C] -> logits whose ``activation`` is calibrated, [B, C]."""

    @abstractmethod
    def scores(self, split: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
        """Scores of a whole split, which need all logits [N, C] at once or what was fitted, by full name."""

    @abstractmethod
    def state(self, validated: bool) -> dict[str, Any]:
        """What was fitted, for a checkpoint; unless ``validated``, without what belongs to an earlier head."""

    @abstractmethod
    def take(self, made: Mapping[str, Any]) -> None:
        """Takes the ``state`` in a checkpoint."""

    @abstractmethod
    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [C, D] and bias [C] of a linear head -> those whose logits are ``calibrated``."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """What a program needs in addition to the probabilities, or about them, as plain values."""

    def recalibrated(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Another head's logits [N, C], calibrated on their own labels; keeps what is fitted here."""
        other = copy(self)
        other.calibrate(logits, labels)
        return other.calibrated(logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [B, C] -> calibrated probabilities [B, C]."""
        return self.activation(self.calibrated(logits))


class SingleLabel(Task):
    """One label per image, [N]: softmax, cross entropy, accuracy, temperature scaling, sets of classes."""

    headline = paired = "acc"
    best_by = ("val/loss", "val/balanced_acc", "val/f1")
    whole = ("auroc", "temperature")

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.temperature = 1.0  # divides the logits
        self.true_probabilities = torch.empty(0)  # of the validation images' classes, ascending; for sets

    @staticmethod
    def activation(logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)

    @staticmethod
    def losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        return functional.cross_entropy(logits, labels, reduction="none")

    @staticmethod
    def shares(labels: Tensor, weights: Tensor | None) -> Tensor:
        found = torch.ones(len(labels)) if weights is None else weights.cpu()[labels]
        return found / found.sum()

    @staticmethod
    def problems(labels: Tensor) -> int:
        return 1

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> float:
        return float((logits.argmax(dim=1) == labels).float().mean())

    @staticmethod
    def per_image(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(dim=1) == labels).double()

    @staticmethod
    def errors(logits: Tensor, labels: Tensor, smoothing: Tensor, weights: Tensor | None) -> Tensor:
        # The gradient of cross entropy with smoothed labels: softmax minus target.
        heads, rows, classes = logits.shape
        uniform = (smoothing / classes)[:, None, None].expand(heads, rows, classes)
        target = uniform + (1 - smoothing)[:, None, None] * functional.one_hot(labels, classes)
        if weights is None:
            return (logits.softmax(dim=2) - target) / rows
        target = target * weights
        error = logits.softmax(dim=2) * target.sum(dim=2, keepdim=True) - target
        return error / weights[labels].sum()

    @staticmethod
    def balanced(counts: Tensor, images: int) -> Tensor:
        return counts.sum() / (len(counts) * counts.clamp(min=1))

    def training_loss(self, smoothing: float, weights: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(functional.cross_entropy, weight=weights, label_smoothing=smoothing)

    def metrics(self) -> dict[str, Metric]:
        return {
            "acc": metrics.MulticlassAccuracy(self.num_classes, average="micro"),
            "balanced_acc": MeanRecall(self.num_classes),
            "f1": MeanF1(self.num_classes),
            "calibration_error": metrics.MulticlassCalibrationError(self.num_classes, n_bins=15),
        }

    def calibrate(self, logits: Tensor, labels: Tensor) -> None:
        self.temperature = fit_temperature(logits, labels)
        self.true_probabilities = true_probabilities(self.probabilities(logits), labels)

    def calibrated(self, logits: Tensor) -> Tensor:
        return logits / self.temperature

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight / self.temperature, bias / self.temperature

    def about(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def scores(self, split: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
        found = {f"{split}/auroc": mean_auroc(self.activation(logits), labels)}
        if split == "val":
            return found | {"val/temperature": self.temperature}
        probabilities = self.probabilities(logits)
        error = multiclass_calibration_error(probabilities, labels, num_classes=self.num_classes, n_bins=15)
        found["test/calibration_error_scaled"] = float(error)
        return found | set_scores(self.true_probabilities, probabilities, labels)

    def state(self, validated: bool) -> dict[str, Any]:
        kept = self.true_probabilities if validated else torch.empty(0)
        return {"temperature": self.temperature, "true_probabilities": kept}

    def take(self, made: Mapping[str, Any]) -> None:
        self.temperature = float(made["temperature"])
        self.true_probabilities = made.get("true_probabilities", torch.empty(0))  # older checkpoints have none
