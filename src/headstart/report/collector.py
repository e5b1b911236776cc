"""Collects a head's predictions while Lightning tests or validates it."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

from headstart.data.loaders import BatchOrder
from headstart.data.splits import Split
from headstart.model.multilabel import MultiLabel
from headstart.report.evaluation import Evaluation, Predictions, evenly_spaced
from headstart.report.multilabel import MultilabelEvaluation

# Maximum images in the embedding projector, evenly spread over the split; only their features are kept.
MAX_PROJECTED = 2000


class EvaluationCollector(Callback):
    """Keeps the ``evaluation`` of the last test, or of the last validation outside a fit; on rank zero only."""

    def __init__(self) -> None:
        self.evaluation: Predictions | None = None
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
        found: dict[str, Any] = {
            "split": split,
            "class_names": module.class_names,
            "items": [items[position] for position in positions.tolist()],
            "labels": data.labels(split)[positions],
            "logits": logits,
            "projected": torch.searchsorted(positions, kept),
            "features": features,
        }
        task: Any = module.task
        if isinstance(task, MultiLabel):
            self.evaluation = MultilabelEvaluation(**found, task=task)
        else:
            self.evaluation = Evaluation(**found, temperature=task.temperature)


def _in_order(shares: Iterable[Iterable[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """The positions and values of all ranks, in the order of the split."""
    positions, values = (torch.cat(parts) for parts in zip(*chain.from_iterable(shares), strict=True))
    order = positions.argsort()
    return positions[order], values[order]
