"""Figures of a trained head; each is built here once, for whoever shows it."""

from typing import cast

import matplotlib
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor

MAX_CELLS_WITH_NUMBERS = 25
MAX_CLASSES_IN_TEXT = 100


def confusion_figure(counts: Tensor, class_names: list[str]) -> Figure:
    """The confusion matrix, [true, predicted] counts; coloured by the share of the true class, in [0, 1]."""
    size = len(class_names)
    side = min(3 + 0.45 * size, 24)
    figure = Figure(figsize=(side + 1, side), layout="tight")
    axes = figure.add_subplot()
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", fraction=0.046)
    step = max(1, size // 50)
    axes.set_xticks(range(0, size, step), class_names[::step], rotation=90)
    axes.set_yticks(range(0, size, step), class_names[::step])
    axes.set(xlabel="predicted", ylabel="true")
    if size <= MAX_CELLS_WITH_NUMBERS:
        for true, row in enumerate(counts.tolist()):
            for predicted, count in enumerate(row):
                colour = "white" if shares[true, predicted] > 0.5 else "black"
                axes.text(predicted, true, str(count), ha="center", va="center", color=colour)
    return figure


def confusion_table(counts: Tensor, class_names: list[str]) -> str:
    """The confusion matrix's counts as a Markdown table."""
    lines = ["| true \\ predicted | " + " | ".join(class_names) + " |", "|---" * (len(class_names) + 1) + "|"]
    lines += [
        f"| {name} | {' | '.join(map(str, row))} |" for name, row in zip(class_names, counts.tolist(), strict=True)
    ]
    return "\n".join(lines)


class Inspection(Callback):
    """Puts the figures of an evaluation outside the fit into TensorBoard."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._show(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._show(trainer, pl_module, "val")

    def _show(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        logger = trainer.logger
        if not trainer.is_global_zero or not isinstance(logger, TensorBoardLogger):
            return
        counts, names = cast(Tensor, module.confusion_counts), cast("list[str]", module.class_names)
        matplotlib.use("agg")  # TensorBoard imports pyplot, which would look for a screen
        logger.experiment.add_figure(f"{split}/confusion_matrix", confusion_figure(counts, names), trainer.global_step)
        if len(names) <= MAX_CLASSES_IN_TEXT:
            table = confusion_table(counts, names)
            logger.experiment.add_text(f"{split}/confusion_counts", table, trainer.global_step)
