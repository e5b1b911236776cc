"""The meta-learning module: a batch is several tasks, and the head learns each from its support."""

from typing import Any, Literal

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn import functional

from headstart.errors import UserError
from headstart.fewshot.episodes import Episode
from headstart.fewshot.heads import HeadName, make_head
from headstart.ranges import Count, Positive, Rate, plain
from headstart.search.intervals import mean_and_half_width


class MetaLearner(LightningModule):
    """Meta-trains a few-shot head on tasks, so that it does well on tasks with new classes.

    Args:
        n_way: classes per task.
        width: number of features.
        head: prototype, ridge, logistic, anil or projection.
        lr: learning rate of Adam in meta-training.
        metric: distance of the prototype head: euclidean, or cosine with a learnt scale.
        centre: subtract the mean of the support; anil always does.
        l2: divide features by their length, after centring; None: only logistic does; anil always does.
        inner_lr: initial learning rate of anil's inner loop.
        inner_steps: gradient steps of anil's inner loop.
        first_order: leave out second derivatives; anil only.
    """

    def __init__(
        self,
        n_way: Positive,
        width: Positive,
        head: HeadName = "prototype",
        lr: Rate = 0.001,
        metric: Literal["euclidean", "cosine"] = "euclidean",
        centre: bool = False,
        l2: bool | None = None,
        inner_lr: Rate = 10.0,
        inner_steps: Count = 5,
        first_order: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.hparams.update(plain(dict(self.hparams)))
        self.head = make_head(head, **self.hparams)
        self.accuracies: list[Tensor] = []

    @property
    def learns(self) -> bool:
        """Whether there is anything to meta-train."""
        return any(parameter.requires_grad for parameter in self.head.parameters())

    def forward(self, episode: Episode) -> Tensor:
        """Logits [B, N * Q, N] of a batch of tasks."""
        logits: Tensor = self.head(episode.support, episode.query)
        return logits

    def training_step(self, episode: Episode) -> Tensor:
        loss, accuracy = self._score(episode)
        if not loss.isfinite():
            raise UserError(f"the loss is not finite in epoch {self.current_epoch}: lower --model.lr")
        self.log_dict(
            {"train/loss": loss, "train/acc": accuracy.mean()}, on_step=False, on_epoch=True, batch_size=len(accuracy)
        )
        return loss

    def on_validation_epoch_start(self) -> None:
        self.accuracies = []

    def on_test_epoch_start(self) -> None:
        self.accuracies = []

    def validation_step(self, episode: Episode) -> None:
        self._evaluate(episode, "val")

    def test_step(self, episode: Episode) -> None:
        self._evaluate(episode, "test")

    def on_validation_epoch_end(self) -> None:
        self._log_interval("val")

    def on_test_epoch_end(self) -> None:
        self._log_interval("test")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.head.parameters(), lr=self.hparams["lr"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Rejects a checkpoint of another head."""
        made, names = checkpoint["hyper_parameters"], ("head", "n_way", "width")
        theirs, mine = ({name: values.get(name) for name in names} for values in (made, self.hparams))
        if theirs != mine:
            raise UserError(f"--ckpt_path: was trained with {theirs}, but this run has {mine}")

    def _score(self, episode: Episode) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch of tasks, and the accuracy of each, [B]."""
        logits = self(episode)
        labels = episode.labels.expand(len(logits), -1)
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss, (logits.argmax(dim=-1) == labels).float().mean(dim=1)

    def _evaluate(self, episode: Episode, split: str) -> None:
        loss, accuracy = self._score(episode)
        self.accuracies.append(accuracy)
        self.log(f"{split}/loss", loss, on_epoch=True, batch_size=len(accuracy))

    def _log_interval(self, split: str) -> None:
        mean, half_width = mean_and_half_width(torch.cat(self.accuracies))
        self.log_dict({f"{split}/acc": mean, f"{split}/acc_ci95": half_width})
