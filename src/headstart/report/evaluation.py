"""A head's predictions on a split, from which every figure and the report are made."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from headstart.data.loaders import BatchOrder
from headstart.data.splits import Item, Split
from headstart.model.metrics import MeanAUROC

# Maximum images in the embedding projector, evenly spread over the split; only their features are kept.
MAX_PROJECTED = 2000
CALIBRATION_BINS = 15
MAX_ORDERED = 300  # classes; the best order of more takes long


@dataclass(frozen=True)
class Evaluation:
    """The N images of a split and the head's logits for them."""

    split: Split
    class_names: list[str]  # by label
    items: Sequence[Item]
    labels: Tensor  # [N]
    logits: Tensor  # [N, C]
    temperature: float  # divides the logits, for calibrated probabilities
    projected: Tensor  # [M], the positions of at most 2,000 images, evenly spread
    features: Tensor  # [M, D], of those images

    @cached_property
    def probabilities(self) -> Tensor:
        """Calibrated probabilities, [N, C]."""
        return (self.logits / self.temperature).softmax(dim=1)

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
        """The labels, in an order in which classes that the head tells apart with difficulty are neighbours."""
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
        metric = MeanAUROC(len(self.class_names))
        metric.update(self.probabilities, self.labels)
        return float(metric.compute())

    def calibration_error(self, temperature: float) -> float:
        """Expected calibration error of softmax(logits / temperature), in [0, 1], over 15 bins of confidence."""
        error = multiclass_calibration_error(
            (self.logits / temperature).softmax(dim=1),
            self.labels,
            num_classes=len(self.class_names),
            n_bins=CALIBRATION_BINS,
        )
        return float(error)

    def row(self, position: int) -> "Row":
        """The prediction for the image at a position."""
        true, predicted = (self.class_names[int(labels[position])] for labels in (self.labels, self.predicted))
        return Row(self.items[position].path, true, predicted, float(self.confidence[position]))

    def surest(self, right: bool, count: int) -> list[int]:
        """Positions of the most confident right (or wrong) predictions, most confident first."""
        among = (self.right == right).nonzero()[:, 0]
        order = self.confidence[among].argsort(descending=True, stable=True)
        return cast("list[int]", among[order[:count]].tolist())


@dataclass(frozen=True)
class Row:
    """The prediction for one image."""

    path: str
    true: str  # name of the true class
    predicted: str  # name of the predicted class
    confidence: float  # the calibrated probability of the predicted class


def evenly_spaced(size: int, count: int) -> Tensor:
    """``count`` positions among ``size``, evenly spread; all if there are fewer."""
    return torch.linspace(0, size - 1, min(size, count)).round().long() if size else torch.empty(0, dtype=torch.long)


class EvaluationCollector(Callback):
    """Keeps the ``evaluation`` of the last test, or of the last validation outside a fit; on rank zero only."""

    def __init__(self) -> None:
        self.evaluation: Evaluation | None = None
        # Per batch of this rank: positions and logits of all images; positions and features of projected ones.
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._batches: list[Tensor] = []
        self._projected = torch.empty(0, dtype=torch.long)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer.test_dataloaders)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._start(trainer.val_dataloaders)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        self._add(outputs, batch_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, _: int = 0
    ) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._add(outputs, batch_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._finish(trainer, pl_module, "val")

    def _start(self, loader: Any) -> None:
        order = loader.batch_sampler
        assert isinstance(order, BatchOrder)
        self._seen, self._kept, self._batches = [], [], order.batches()
        self._projected = evenly_spaced(order.size, MAX_PROJECTED)

    def _add(self, outputs: dict[str, Tensor], batch: int) -> None:
        positions = self._batches[batch]
        self._seen.append((positions, outputs["logits"].cpu()))
        kept = torch.isin(positions, self._projected)
        self._kept.append((positions[kept], outputs["features"].cpu()[kept].float()))

    def _finish(self, trainer: Trainer, module: LightningModule, split: Split) -> None:
        shares = [trainer.strategy.broadcast((self._seen, self._kept), src=rank) for rank in range(trainer.world_size)]
        if not trainer.is_global_zero:
            return
        positions, logits = _in_order(seen for seen, _ in shares)
        kept, features = _in_order(kept for _, kept in shares)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        items = data.items_in(split)
        self.evaluation = Evaluation(
            split=split,
            class_names=cast("list[str]", module.class_names),
            items=[items[position] for position in positions.tolist()],
            labels=data.labels(split)[positions],
            logits=logits,
            temperature=cast(float, module.temperature),
            projected=torch.searchsorted(positions, kept),
            features=features,
        )


def _in_order(shares: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """The positions and values of all ranks, in the order of the split."""
    positions, values = (torch.cat(parts) for parts in zip(*chain.from_iterable(shares), strict=True))
    order = positions.argsort()
    return positions[order], values[order]
