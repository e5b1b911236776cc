"""The fine-tuning module: the backbone's last layers are trained with the head; the rest stays frozen."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from headstart.errors import UserError
from headstart.finetune.cut import Front, cut, learning_names
from headstart.model.backbone import FrozenBackbone
from headstart.model.classifier import TransferClassifier
from headstart.ranges import Fraction, Rate, Share


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: its path up to the first part that ends in a digit, such as layer4.1."""
    parts = name.split(".")
    stage = next((place for place, part in enumerate(parts) if part[-1].isdigit()), len(parts) - 2)
    within = stage + 1 < len(parts) and parts[stage + 1].isdigit()
    return ".".join(parts[: stage + 1 + within])


class FineTunedClassifier(TransferClassifier):
    """A classifier whose backbone's last layers are trained with the head.

    Batches are images, or the cached output of the frozen front. The checkpoint holds all trained tensors, so it works
    with every command.

    Args:
        class_names: class names, by label.
        unfreeze: first layer of the backbone to train, such as layer4; all: every layer.
        lr: peak learning rate of the backbone's last layer.
        head_lr: peak learning rate of the head.
        layer_decay: ratio of each layer's learning rate to that of the next layer; 1: the same rate for all.
        batch_norm: mode of the trained BatchNorm layers: eval keeps the running statistics, train updates them.
        warmup: fraction of the steps in which the learning rate warms up, before cosine decay.
        kwargs: arguments of ``TransferClassifier``; the backbone is the one that the head was trained on.
    """

    def __init__(
        self,
        class_names: list[str],
        unfreeze: str = "layer4",
        lr: Rate = 0.0003,
        head_lr: Rate = 0.001,
        layer_decay: Share = 1.0,
        batch_norm: Literal["eval", "train"] = "eval",
        warmup: Fraction = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(class_names, lr=lr, warmup=warmup, **kwargs)
        if self.backbone.layers == "all":
            raise UserError(
                "--model.layers=all: fine-tuning is for the last layer's features; train with --model.layers=last"
            )
        self.learning = [f"net.{name}" for name in learning_names(self.backbone.net, unfreeze)]
        self.finetuned = sorted(self.learning)
        # In a list, so as not to register a submodule: both halves consist of the backbone's layers.
        self._halves = [cut(self.backbone, unfreeze)]
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(name in self.learning)

    @property
    def front(self) -> Front | None:
        """The frozen layers, if their output can be cached."""
        return self._halves[0][0] if self._halves[0] else None

    @property
    def frozen(self) -> FrozenBackbone:
        """The layers before the trained ones, which map an image to the same numbers in every epoch."""
        if self.front is None:
            raise UserError("--data.cache=false is needed: no frozen layers whose output could be cached")
        return self.front

    def features(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, H, W] uint8, or the front's output [B, D] -> features [B, num_features]."""
        if inputs.ndim != 2:
            features: Tensor = self.backbone(inputs)
            return features
        assert self._halves[0]
        front, back = self._halves[0]
        maps = inputs.view(-1, *front.shape)
        if maps.ndim == 4:
            maps = maps.contiguous(memory_format=torch.channels_last)
        computed: Tensor = back(maps)
        return computed.float()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.take(checkpoint)

    def on_train_epoch_start(self) -> None:
        """Sets the mode layer by layer, since the backbone itself always stays in eval mode."""
        if self.hparams["batch_norm"] == "train":
            for name, module in self.backbone.named_modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in self.learning:
                    module.train()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head, then each trained layer from last to first, with decaying learning rates."""
        layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.backbone.named_parameters():
            if name in self.learning:
                layers.setdefault(layer_of(name.removeprefix("net.")), []).append(parameter)
        backbone = [
            {"params": parameters, "lr": self.hparams["lr"] * self.hparams["layer_decay"] ** depth}
            for depth, parameters in enumerate(reversed(layers.values()))
        ]
        return [{"params": list(self.head.parameters()), "lr": self.hparams["head_lr"]}, *backbone]
