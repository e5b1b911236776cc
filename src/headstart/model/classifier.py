"""The trained module: a frozen backbone and a head."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection

from headstart.errors import UserError
from headstart.images import Fit
from headstart.model.backbone import FrozenBackbone, Layers
from headstart.model.calibration import Logits
from headstart.model.checkpoints import HeadModule
from headstart.model.heads import check_classes, class_weights, make_head
from headstart.model.multilabel import make_task
from headstart.model.schedule import warmup_cosine
from headstart.ranges import Fraction, ImageSize, NonNegative, Rate, Share, check_arguments, plain

Batch = tuple[Tensor, Tensor]


class TransferClassifier(HeadModule):
    """A head on a frozen backbone; only the head is trained and saved in checkpoints.

    Subclasses may override ``configure_head``, ``configure_loss`` and ``configure_metrics``.

    Args:
        class_names: class names by label.
        backbone: torchvision classification model (resnet18, efficientnet_b0, vit_b_16, …), or timm/NAME.
        weights: auto (ImageNet's if available), bundled, imagenet, pretrained (timm), random, or a file.
        image_size: side of the backbone's square input, in pixels; None (usually best): as its weights were trained.
        fit: crop keeps the centre square of an image, pad and squash keep all of it; None: as its weights were trained.
        layers: features to use: last (before the classifier) or all (means of all stages, concatenated).
        mirror: with layers=all, average the features of the image and its mirror image.
        head: kind of head: linear, mlp, cosine or unit (linear on features of length 1).
        lr: peak learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        label_smoothing: label smoothing of the training loss.
        class_weights: weights of classes: none, balanced (inverse to the class frequency), or by name: {rare: 5}.
        warmup: fraction of the steps in which the learning rate warms up, before cosine decay.
        best_by: validation score that chooses the best head; with few images, all but the loss change in coarse steps.
        multilabel: whether an image may have several labels, or none.
        min_precision: precision to reach with the thresholds of several labels; None: maximise F1.

    Raises:
        UserError: an argument is invalid, or as for ``FrozenBackbone``.
    """

    def __init__(
        self,
        class_names: list[str],
        backbone: str = "resnet18",
        weights: str = "auto",
        image_size: ImageSize | None = None,
        fit: Fit | None = None,
        layers: Layers = "last",
        mirror: bool = True,
        head: str = "linear",
        lr: Rate = 0.003,
        weight_decay: NonNegative = 0.01,
        label_smoothing: Fraction = 0.1,
        class_weights: Literal["none", "balanced"] | dict[str, Rate] = "none",
        warmup: Fraction = 0.04,
        best_by: Literal["val/loss", "val/balanced_acc", "val/f1", "val/map"] = "val/loss",
        multilabel: bool = False,
        min_precision: Share | None = None,
    ) -> None:
        super().__init__()
        check_arguments(TransferClassifier, vars())
        self.save_hyperparameters(logger=False)
        self.backbone = FrozenBackbone(backbone, weights, image_size, fit, layers, mirror)
        self.hparams.update(plain(dict(self.hparams)) | {"weights": self.backbone.weights})
        self.class_names = list(class_names)
        check_classes(class_names, class_weights)
        self.task = make_task(len(class_names), multilabel, best_by, min_precision)
        self.head = self.configure_head()
        self.val_metrics, self.test_metrics = self.configure_metrics("val/"), self.configure_metrics("test/")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.logits = Logits()
        self.loss_weights: Tensor | None = None
        self.example_input_array = torch.zeros(1, 3, *[self.backbone.preprocessing.crop_size] * 2, dtype=torch.uint8)
        self.remember_backbone()

    def configure_head(self) -> nn.Module:
        """Returns the head, which maps features [B, D] to logits [B, num_classes]."""
        return make_head(self.hparams["head"], self.backbone.num_features, len(self.class_names))

    def configure_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the training loss: logits [B, num_classes], labels [B] (or [B, num_classes] of 0 and 1) -> []."""
        return self.task.training_loss(self.hparams["label_smoothing"], self.loss_weights)

    def configure_metrics(self, prefix: str) -> MetricCollection:
        """Returns the metrics of probabilities [B, num_classes] and labels [B]; all are logged and in the result."""
        return MetricCollection(dict(self.task.metrics()), prefix=prefix)

    def configure_optimizers(self) -> Any:
        """Returns AdamW with linear warmup and cosine decay of the learning rate, per step."""
        lr, decay = self.hparams["lr"], self.hparams["weight_decay"]
        optimizer = torch.optim.AdamW(self.parameter_groups(), lr, weight_decay=decay)
        steps = self.trainer.estimated_stepping_batches
        warmup_steps = 0 if math.isinf(steps) else round(steps * self.hparams["warmup"])
        rate = partial(warmup_cosine, warmup_steps=warmup_steps, steps=steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups of the optimizer: those of the head only."""
        return [{"params": list(self.head.parameters())}]

    @property
    def logged(self) -> list[str]:
        """The names of the values logged in each epoch, which callbacks can monitor."""
        whole = [f"val/{name}" for name in self.task.whole]
        return ["train/loss", "train/grad_norm", "val/loss", *whole, *map(str, self.val_metrics)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, H, W] uint8, or cached features [B, D] -> logits [B, num_classes]."""
        logits: Tensor = self.head(self.features(inputs))
        return logits

    def features(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, H, W] uint8, or cached features [B, D] -> features [B, D]."""
        features: Tensor = inputs if inputs.ndim == 2 else self.backbone(inputs)
        return features

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.hparams["class_weights"] != "none":
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            self.weigh_classes(data.counts("train"), len(data.items_in("train")))
        self.loss = self.configure_loss()

    def weigh_classes(self, counts: Tensor, images: int) -> None:
        """Sets the class weights of the loss, from the training images per class [num_classes] and their total."""
        balanced = self.task.balanced(counts.to(self.device), images)
        self.loss_weights = class_weights(self.hparams["class_weights"], self.class_names, balanced)

    def training_step(self, batch: Batch) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        if not loss.isfinite():
            epoch = self.current_epoch
            raise UserError(f"the loss is not finite in epoch {epoch}: lower --model.lr; best.ckpt is intact")
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        return self._evaluate(batch, "val", self.val_metrics, self.val_loss)

    def on_validation_epoch_end(self) -> None:
        """Fits the calibration and the decision, which later checkpoints contain; logs the scores of all logits."""
        logits, labels = self.logits.compute()
        self.logits.reset()  # first, since it holds all batches beside them
        self.task.calibrate(logits, labels)
        self.log_dict(self.task.scores("val", logits, labels), logger=self._logger_of_curves())

    def test_step(self, batch: Batch) -> dict[str, Tensor]:
        return self._evaluate(batch, "test", self.test_metrics, self.test_loss)

    def on_test_epoch_end(self) -> None:
        """Logs the scores of all logits, calibrated probabilities and decisions."""
        logits, labels = self.logits.compute()
        self.logits.reset()
        self.log_dict(self.task.scores("test", logits, labels))

    def _evaluate(self, batch: Batch, split: str, scores: MetricCollection, loss: MeanMetric) -> dict[str, Tensor]:
        """Updates and logs the metrics of the split; returns features and logits for callbacks."""
        features = self.features(batch[0])
        logits = self.head(features).float()
        self.logits.update(logits, batch[1])
        loss.update(self.task.losses(logits, batch[1]))
        scores.update(self.task.activation(logits), batch[1])
        self.log(f"{split}/loss", loss, on_epoch=True, logger=self._logger_of_curves())
        self.log_dict(scores, on_epoch=True, logger=self._logger_of_curves())
        return {"features": features, "logits": logits}

    def _logger_of_curves(self) -> bool | None:
        """None: the default. False for a validation after the fit, which would add a duplicate point to the curve."""
        return False if self.trainer.state.fn == TrainerFn.VALIDATING else None
