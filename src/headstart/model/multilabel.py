"""Several labels per image, or none: each label is a binary problem of its own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headstart.errors import UserError
from headstart.model.metrics import aurocs, average_precisions
from headstart.model.task import SingleLabel, Task

MOST = 20_000  # images that a calibration uses, evenly spread
STEPS, HALVINGS = 30, 10  # of Newton's method, and of each of its steps
FLATTEST = 1e-3  # a smaller slope would turn the order of the images around, or forget it


class MultiLabel(Task):
    """Several labels per image, [N, C] of 0 and 1: sigmoid, binary cross entropy, average precision, thresholds.

    Args:
        num_classes: the number of labels.
        min_precision: precision that the thresholds aim at on the validation images; None: they maximise F1.
    """

    headline, paired = "map", "ranking_precision"
    best_by = ("val/loss", "val/map")
    whole = ("map", "auroc", "f1", "f1_micro", "exact_match", "hamming_loss")

    def __init__(self, num_classes: int, min_precision: float | None = None) -> None:
        super().__init__(num_classes)
        self.min_precision = min_precision
        self.scale, self.shift = torch.ones(num_classes), torch.zeros(num_classes)  # Platt's, per label
        self.thresholds = torch.full((num_classes,), 0.5)  # of calibrated probabilities

    @staticmethod
    def activation(logits: Tensor) -> Tensor:
        return logits.sigmoid()

    @staticmethod
    def losses(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
        weights = None if weights is None else weights.to(logits.device)
        found = functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), pos_weight=weights, reduction="none"
        )
        return found.mean(dim=1)

    @staticmethod
    def shares(labels: Tensor, weights: Tensor | None) -> Tensor:
        return torch.full((len(labels),), 1 / len(labels))

    @staticmethod
    def problems(labels: Tensor) -> int:
        return labels.shape[1]

    @staticmethod
    def score(logits: Tensor, labels: Tensor) -> float:
        return float(average_precisions(logits, labels).nanmean())

    @staticmethod
    def per_image(logits: Tensor, labels: Tensor) -> Tensor:
        """Label ranking average precision, as scikit-learn's; 1 for an image with all labels or none."""
        truth = labels.bool()
        order = logits.argsort(dim=1, descending=True, stable=True)
        ranked = truth.gather(1, order).double()
        precision = ranked.cumsum(dim=1) / torch.arange(1, logits.shape[1] + 1)
        found = (precision * ranked).sum(dim=1) / ranked.sum(dim=1)
        return found.where(truth.any(dim=1), torch.ones_like(found))

    @staticmethod
    def errors(logits: Tensor, labels: Tensor, smoothing: Tensor, weights: Tensor | None) -> Tensor:
        target = _smoothed(labels, smoothing[:, None, None])
        weighted = target if weights is None else target * weights
        return (logits.sigmoid() * (weighted + 1 - target) - weighted) / labels.numel()

    @staticmethod
    def balanced(counts: Tensor, images: int) -> Tensor:
        return (images - counts).clamp(min=1) / counts.clamp(min=1)

    def training_loss(self, smoothing: float, weights: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        return partial(_smoothed_loss, smoothing=smoothing, weights=weights)

    def calibrate(self, logits: Tensor, labels: Tensor) -> None:
        self.scale, self.shift = fit_platt(logits, labels)
        self.thresholds = fit_thresholds(self.probabilities(logits), labels, self.min_precision)

    def calibrated(self, logits: Tensor) -> Tensor:
        return logits * self.scale.to(logits.device) + self.shift.to(logits.device)

    def folded(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight * self.scale[:, None], bias * self.scale + self.shift

    def about(self) -> dict[str, Any]:
        return {"thresholds": self.thresholds.tolist()}

    def scores(self, split: str, logits: Tensor, labels: Tensor) -> dict[str, float]:
        found = {"map": self.score(logits, labels), "auroc": float(aurocs(logits, labels).nanmean())}
        found |= threshold_scores(self.probabilities(logits) >= self.thresholds.to(logits.device), labels)
        return {f"{split}/{name}": value for name, value in found.items()}

    def state(self, validated: bool) -> dict[str, Any]:
        return {"temperature": 1.0, "scale": self.scale, "shift": self.shift, "thresholds": self.thresholds}

    def take(self, made: Mapping[str, Any]) -> None:
        found = [made.get(name) for name in ("scale", "shift", "thresholds")]
        for tensor in found:
            if not isinstance(tensor, Tensor) or tensor.shape != (self.num_classes,) or not tensor.isfinite().all():
                raise UserError("checkpoint: its thresholds are damaged; train it again")
        self.scale, self.shift, self.thresholds = (tensor.float() for tensor in found if tensor is not None)


def make_task(num_classes: int, multilabel: bool, best_by: str, min_precision: float | None) -> Task:
    """The task of a module with these options; ``UserError`` if they contradict each other."""
    task = MultiLabel(num_classes, min_precision) if multilabel else SingleLabel(num_classes)
    if best_by not in task.best_by:
        raise UserError(f"--model.best_by={best_by}: choose from {', '.join(task.best_by)} for these labels")
    if min_precision is not None and not multilabel:
        raise UserError("--model.min_precision: is for images with several labels; leave it out")
    return task


def task_of(labels: Tensor) -> type[Task]:
    """The task of labels [N], or of [N, C] with 0 and 1."""
    return MultiLabel if labels.ndim == 2 else SingleLabel


def fit_platt(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of each label at which sigmoid(scale * logits + shift) has the lowest cross entropy.

    Platt, "Probabilistic Outputs for Support Vector Machines", 1999, with his smoothed targets; by Newton's method, in
    float64. Labels that all images have, or none, and those whose scale would not be positive, keep 1 and 0.
    """
    every = -(-len(logits) // MOST) or 1
    logits, truth = logits[::every].cpu().double(), labels[::every].cpu().bool()
    positives = truth.sum(dim=0)
    negatives = len(truth) - positives
    target = torch.where(truth, (positives + 1) / (positives + 2), 1 / (negatives + 2)).double()

    def loss(scale: Tensor, shift: Tensor) -> Tensor:
        losses = functional.binary_cross_entropy_with_logits(logits * scale + shift, target, reduction="none")
        return losses.mean(dim=0)

    scale, shift = torch.ones_like(logits[:1]).sum(dim=0), torch.zeros_like(logits[:1]).sum(dim=0)
    for _ in range(STEPS):
        probability = (logits * scale + shift).sigmoid()
        error, spread = probability - target, probability * (1 - probability)
        slope, own = (error * logits).mean(dim=0), error.mean(dim=0)
        first, mixed, last = ((spread * logits**power).mean(dim=0) for power in (2, 1, 0))
        first, last = first + 1e-9, last + 1e-9
        determinant = first * last - mixed**2
        steps = (last * slope - mixed * own) / determinant, (first * own - mixed * slope) / determinant
        before, factor = loss(scale, shift), torch.ones_like(scale)
        for _ in range(HALVINGS):
            worse = loss(scale - factor * steps[0], shift - factor * steps[1]) >= before
            if not worse.any():
                break
            factor = torch.where(worse, factor / 2, factor)
        factor = factor * ~worse
        scale, shift = scale - factor * steps[0], shift - factor * steps[1]
        if not factor.any():  # all have converged
            break
    usable = (positives > 0) & (negatives > 0) & (scale > FLATTEST) & shift.isfinite()
    return torch.where(usable, scale, 1).float(), torch.where(usable, shift, 0).float()


def fit_thresholds(probabilities: Tensor, labels: Tensor, min_precision: float | None) -> Tensor:
    """The threshold of each label, [C]: the one with the highest F1, or the lowest that reaches the wanted precision.

    A label that never reaches the precision gets its most precise threshold; one without positives, 0.5.
    """
    columns = zip(probabilities.cpu().T, labels.cpu().T, strict=True)
    return torch.tensor([_threshold(own, truth, min_precision) for own, truth in columns])


def _threshold(probabilities: Tensor, labels: Tensor, min_precision: float | None) -> float:
    total = int(labels.sum())
    if not total:
        return 0.5
    found, order = probabilities.sort(descending=True, stable=True)
    last = torch.ones(len(found), dtype=torch.bool)
    last[:-1] = found[:-1] != found[1:]  # of those with the same probability, which are answered together
    places = last.nonzero()[:, 0]
    hits, count = labels[order].long().cumsum(dim=0)[places].double(), (places + 1).double()
    precision = hits / count
    if min_precision is None:
        best = int((2 * hits / (count + total)).argmax())
    else:
        enough = (precision >= min_precision).nonzero()[:, 0]
        best = int(enough[-1]) if len(enough) else int(precision.argmax())
    if best + 1 == len(places):
        return float(found[places[best]])
    return float(found[places[best]] + found[places[best + 1]]) / 2


def threshold_scores(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """F1, exact match and Hamming loss of predicted labels [N, C]; a mean leaves out labels without positives."""
    truth = labels.bool()
    both, either = (predicted & truth).sum(dim=0).double(), (predicted.sum(dim=0) + truth.sum(dim=0)).double()
    f1 = (2 * both / either)[truth.any(dim=0)]
    return {
        "f1": float(f1.mean()),
        "f1_micro": float(2 * both.sum() / either.sum().clamp(min=1)),
        "exact_match": float((predicted == truth).all(dim=1).double().mean()),
        "hamming_loss": float((predicted != truth).double().mean()),
    }


def _smoothed_loss(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor | None) -> Tensor:
    target = _smoothed(labels.to(logits.dtype), smoothing)
    return functional.binary_cross_entropy_with_logits(logits, target, pos_weight=weights)


def _smoothed(labels: Tensor, smoothing: Any) -> Tensor:
    """The targets of labels of 0 and 1, by a number or a tensor that is broadcast."""
    target: Tensor = (1 - smoothing) * labels + smoothing / 2
    return target
