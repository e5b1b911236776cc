"""The module that is trained: a frozen backbone and a linear head."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pytorch_lightning import LightningModule
from pytorch_lightning.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MulticlassF1Score,
)
from typing_extensions import Self

from headstart import __version__
from headstart.errors import UserError
from headstart.images import preprocess, to_rgb
from headstart.model.backbone import NAMED_WEIGHTS, FrozenBackbone, check_frozen, combined, tensor_digests
from headstart.model.calibration import Temperature
from headstart.model.checkpoints import read_sealed
from headstart.ranges import Fraction, ImageSize, NonNegative, Rate

CHECKPOINT_LAYOUT = 2  # 2: with the temperature


def metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Accuracy, balanced accuracy, macro F1, AUROC (one against the rest) and calibration error, all in [0, 1]."""
    return MetricCollection(
        {
            "acc": MulticlassAccuracy(num_classes, average="micro"),
            "balanced_acc": MulticlassAccuracy(num_classes, average="macro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
            "auroc": MulticlassAUROC(num_classes),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        },
        prefix=f"{prefix}/",
    )


class TransferClassifier(LightningModule):
    """A linear head on a frozen backbone; only the head learns, and only the head is in the checkpoint.

    Args:
        class_names: by label.
        backbone: a torchvision classification model, such as resnet18, resnet50, efficientnet_b0 or vit_b_16.
        weights: bundled, imagenet, random, or the path of a state dict (.pth, .safetensors).
        image_size: side of the square that the backbone sees, in pixels; None: what its weights were made for.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        label_smoothing: of the training loss.
        class_weights: balanced weighs each class in the training loss by the inverse of its frequency.
        warmup: share of the steps in which the learning rate rises, before it falls as a cosine.

    Raises:
        UserError: see ``FrozenBackbone``.
    """

    def __init__(
        self,
        class_names: list[str],
        backbone: str = "resnet18",
        weights: str = "bundled",
        image_size: ImageSize | None = None,
        lr: Rate = 0.003,
        weight_decay: NonNegative = 0.01,
        label_smoothing: Fraction = 0.1,
        class_weights: Literal["none", "balanced"] = "none",
        warmup: Fraction = 0.04,
    ) -> None:
        super().__init__()
        weights = resolved(weights)
        # A checkpoint holds plain values alone; the command line's restricted numbers are classes of their own.
        lr, weight_decay, label_smoothing, warmup = map(float, (lr, weight_decay, label_smoothing, warmup))
        image_size = None if image_size is None else int(image_size)
        self.save_hyperparameters()
        self.class_names = list(class_names)
        self.backbone = FrozenBackbone(backbone, weights, image_size)
        self.head: nn.Module = nn.Linear(self.backbone.num_features, len(class_names))
        self.val_metrics = metrics(len(class_names), "val")
        self.test_metrics = metrics(len(class_names), "test")
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.scaled_calibration = MulticlassCalibrationError(len(class_names), n_bins=15)
        self.val_temperature = Temperature()
        self.temperature = 1.0
        self.loss_weights: Tensor | None = None
        self.example_input_array = torch.zeros(1, 3, *[self.backbone.preprocessing.crop_size] * 2, dtype=torch.uint8)
        self._digests = tensor_digests(self.backbone)
        self._weights_digest = combined(self._digests)
        # Tensors of the backbone that are not those of the named weights any more, since they were fine-tuned.
        self.tuned: list[str] = []

    @property
    def frozen(self) -> FrozenBackbone:
        """What maps an image to the same numbers in every epoch: the whole backbone."""
        return self.backbone

    @property
    def linear(self) -> nn.Linear:
        """The head, for what only a linear one can do.

        Raises:
            UserError: it is of another kind.
        """
        if not isinstance(self.head, nn.Linear):
            raise UserError(f"this needs a linear head, and the checkpoint's is a {type(self.head).__name__}")
        return self.head

    @property
    def logged(self) -> list[str]:
        """What is logged each epoch, which callbacks can watch."""
        return ["train/loss", "train/grad_norm", "val/loss", "val/temperature", *map(str, self.val_metrics)]

    def forward(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, H, W] uint8, or ready features [B, D] -> logits [B, num_classes]."""
        logits: Tensor = self.head(self.features(inputs))
        return logits

    def features(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, H, W] uint8, or ready features [B, D] -> features [B, D]."""
        if inputs.ndim == 2:
            return inputs
        features: Tensor = self.backbone(inputs)
        return features

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """One step on the head.

        Raises:
            UserError: the loss is no number any more.
        """
        inputs, labels = batch
        loss = functional.cross_entropy(
            self(inputs), labels, weight=self.loss_weights, label_smoothing=self.hparams["label_smoothing"]
        )
        if not loss.isfinite():
            raise UserError(
                f"the loss is not finite in epoch {self.current_epoch}: lower --model.lr; best.ckpt is from before"
            )
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(labels), sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        outputs = self._evaluate(batch, "val", self.val_metrics, self.val_loss)
        self.val_temperature.update(outputs["logits"], batch[1])
        return outputs

    def test_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        outputs = self._evaluate(batch, "test", self.test_metrics, self.test_loss)
        self.scaled_calibration.update((outputs["logits"] / self.temperature).softmax(dim=1), batch[1])
        self.log("test/calibration_error_scaled", self.scaled_calibration, on_epoch=True)
        return outputs

    def _evaluate(
        self, batch: tuple[Tensor, Tensor], split: str, scores: MetricCollection, loss: MeanMetric
    ) -> dict[str, Tensor]:
        """Updates and logs the split's metrics; gives the features and the logits to whoever shows them."""
        inputs, labels = batch
        features = self.features(inputs)
        logits = self.head(features).float()
        loss.update(functional.cross_entropy(logits, labels, reduction="none"))
        scores.update(logits.softmax(dim=1), labels)
        logger = self._logger_of_curves()
        self.log(f"{split}/loss", loss, on_epoch=True, logger=logger)
        self.log_dict(scores, on_epoch=True, logger=logger)
        return {"features": features, "logits": logits}

    def _logger_of_curves(self) -> bool | None:
        """None: as usual. A validation after the fit would add a double point to the curve."""
        return False if self.trainer.state.fn == TrainerFn.VALIDATING else None

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not norm.isfinite() and self.trainer.precision != "16-mixed":  # whose scaler leaves such a step out
            raise UserError(f"the gradients are not finite in epoch {self.current_epoch}: lower --model.lr")
        self.log("train/grad_norm", norm, on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        """AdamW; the learning rate rises linearly, then falls as half a cosine, step by step."""
        optimizer = torch.optim.AdamW(
            self.parameter_groups(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )
        steps = self.trainer.estimated_stepping_batches
        rising = 0 if math.isinf(steps) else round(steps * self.hparams["warmup"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(warmup_cosine, rising=rising, steps=steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer holds: the head alone."""
        return [{"params": list(self.head.parameters())}]

    def on_validation_epoch_end(self) -> None:
        """Fits the temperature; it is in each checkpoint that is saved after this."""
        self.temperature = float(self.val_temperature.compute())
        self.val_temperature.reset()
        self.log("val/temperature", self.temperature, logger=self._logger_of_curves())

    def on_fit_start(self) -> None:
        self.check_frozen()
        if self.hparams["class_weights"] == "balanced":
            counts = self.trainer.datamodule.counts("train").to(self.device)  # type: ignore[attr-defined]
            self.loss_weights = counts.sum() / (len(counts) * counts.clamp(min=1))

    def on_fit_end(self) -> None:
        self.check_frozen()

    def check_frozen(self) -> None:
        """Compares the backbone with what it was when it was made or loaded.

        Raises:
            RuntimeError: it changed.
        """
        check_frozen(self.backbone, self._digests)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the head and what was fine-tuned, and what its features came from."""
        tuned = {f"backbone.{name}" for name in self.tuned}
        checkpoint["state_dict"] = {
            name: tensor
            for name, tensor in checkpoint["state_dict"].items()
            if name.startswith("head.") or name in tuned
        }
        checkpoint["headstart"] = {
            "layout": CHECKPOINT_LAYOUT,
            "version": __version__,
            "class_names": self.class_names,
            "backbone": self.backbone.name,
            "weights": self.backbone.weights,
            "digest": self._weights_digest,
            "temperature": self.temperature,
            "scores": {
                name: float(value) for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")
            },
            "preprocessing": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self.backbone.preprocessing).items()
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a head that belongs to other classes or another backbone, and fine-tuned layers in a fit of the head.

        Raises:
            UserError: one line with both.
        """
        if tuned_in(checkpoint) and self._trainer is not None:  # the data's features are from before
            raise UserError(
                "--ckpt_path: its backbone was fine-tuned; headstart finetune goes on from it, evaluate scores it"
            )
        self._take(checkpoint)

    def _take(self, checkpoint: dict[str, Any]) -> None:
        made, found = checkpoint["headstart"], tuned_in(checkpoint)
        names = set(checkpoint["state_dict"]) - {f"backbone.{name}" for name in found}
        if names != {f"head.{name}" for name in self.head.state_dict()}:
            raise UserError(f"checkpoint: holds no head of this form but {', '.join(sorted(names)[:4])}")
        if made["class_names"] != self.class_names:
            raise UserError(
                f"checkpoint: its classes are {_short(made['class_names'])}, the data's {_short(self.class_names)}"
            )
        mine = self._weights_digest
        if made["digest"] != mine:
            raise UserError(
                f"checkpoint: its head belongs to the backbone {made['backbone']}, {made['weights']} "
                f"({made['digest'][:12]}), not to {self.backbone.name}, {self.backbone.weights} ({mine[:12]}); "
                "give the weights it was trained on"
            )
        self.temperature = float(made["temperature"])
        self.tuned = sorted({*self.tuned, *found})
        # What is frozen is not in the file; with its tensors in place Lightning's strict loading checks the rest.
        backbone = {f"backbone.{name}": tensor for name, tensor in self.backbone.state_dict().items()}
        checkpoint["state_dict"] = backbone | checkpoint["state_dict"]

    def start_from(self, checkpoint: dict[str, Any]) -> None:
        """Takes the head, the temperature and what was fine-tuned from the content of a checkpoint.

        Raises:
            UserError: it belongs to other classes or another backbone.
        """
        checkpoint = checkpoint | {"state_dict": dict(checkpoint["state_dict"])}
        self._take(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        self._digests = tensor_digests(self.backbone)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As Lightning's, from a local file; no code in the file is executed.

        Raises:
            UserError: the file is missing, damaged or no checkpoint of a head.
        """
        read_checkpoint(Path(checkpoint_path))
        module = super().load_from_checkpoint(checkpoint_path, *args, **kwargs | {"weights_only": True})
        module._digests = tensor_digests(module.backbone)
        return module

    @torch.no_grad()
    def predict(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Calibrated class probabilities of one PIL image -> [num_classes], or of several -> [B, num_classes]."""
        if isinstance(images, Image.Image):
            return self.predict([images])[0]
        pixels = torch.stack([preprocess(to_rgb(image), self.backbone.preprocessing) for image in images])
        self.eval()
        logits: Tensor = self(pixels.to(self.device))
        return (logits / self.temperature).softmax(dim=1).cpu()


def resolved(weights: str) -> str:
    """The name of weights, or the absolute path of a file of them."""
    return weights if weights in NAMED_WEIGHTS else str(Path(weights).expanduser().resolve())


def read_checkpoint(path: Path, logs: Path = Path("logs")) -> dict[str, Any]:
    """The content of a checkpoint of a head; no code in the file is executed.

    Args:
        path: of a local file.
        logs: where to look for others when there is none.

    Raises:
        UserError: the file is missing, damaged or no checkpoint of a head.
    """
    checkpoint = read_sealed(path, logs)
    made = checkpoint.get("headstart", {})
    if made.get("layout") != CHECKPOINT_LAYOUT:
        raise UserError(
            f"--ckpt_path={path}: holds no head of layout {CHECKPOINT_LAYOUT} (this is headstart {__version__}) but "
            f"{made.get('layout', 'something else')} (headstart {made.get('version', 'unknown')}); train it again"
        )
    return checkpoint


def tuned_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """The names of the backbone's tensors that a checkpoint holds, since they were fine-tuned."""
    return [name.removeprefix("backbone.") for name in checkpoint["state_dict"] if name.startswith("backbone.")]


def load_head(checkpoint: Path, logs: Path = Path("logs")) -> TransferClassifier:
    """The module of a checkpoint, in eval mode, on the processor.

    Args:
        checkpoint: its path.
        logs: where to look for others when there is none.

    Raises:
        UserError: it is missing, damaged, or its backbone is not here any more.
    """
    content = read_checkpoint(checkpoint, logs)
    known = inspect.signature(TransferClassifier).parameters  # a fine-tuned one has more
    module = TransferClassifier(**{name: value for name, value in content["hyper_parameters"].items() if name in known})
    module.start_from(content)
    return module.eval()


def warmup_cosine(step: int, rising: int, steps: float) -> float:
    """The learning rate as a share of its peak: a linear rise over ``rising`` steps, then half a cosine to 0.

    Without an end (``steps`` infinite) it stays at its peak.
    """
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _short(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})"
