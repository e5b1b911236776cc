"""Checkpoints of a head: what of the module they hold, whom they fit, and how they are loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import Self

from headstart import __version__
from headstart.decoding import Picture, as_rgb
from headstart.errors import UserError
from headstart.images import preprocess
from headstart.model.backbone import FrozenBackbone, check_frozen, combined, tensor_digests
from headstart.model.metrics import defined
from headstart.model.sealed import read_sealed
from headstart.ranges import arguments_of, plain
from headstart.terminal import say, told

FIRST_EDITION = (
    "caf123c9de10807f929b849a9b4f292b02712456f4c027e8660a46977aed2d56"  # digest of the former bundled weights
)
LAYOUT = 2  # 2: with the temperature


class HeadModule(LightningModule):
    """What a head and its frozen backbone keep, check and load; ``TransferClassifier`` adds how the head learns."""

    class_names: list[str]
    backbone: FrozenBackbone
    head: nn.Module
    temperature: float  # the logits are divided by it for calibrated probabilities
    learning: Sequence[str] = ()  # the tensors of the backbone that may change in a fit

    def remember_backbone(self) -> None:
        """Notes what must not change."""
        self.strict_loading = False  # what is frozen is not in a checkpoint
        self.digests = self.backbone.digests()  # when it was made or loaded
        self.weights_digest = combined(self.digests)  # of the named weights, before any fine-tuning
        self.trained_on: list[str] = []  # the sha256 of each image, where no run's folder tells it
        self.finetuned: list[str] = []  # the tensors that are no longer those of the named weights

    @property
    def frozen(self) -> FrozenBackbone:
        """What maps an image to the same numbers in every epoch, which are cached: the whole backbone."""
        return self.backbone

    def setup(self, stage: str) -> None:
        """Refuses data whose labels mean other classes."""
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", self.class_names)
        if list(names) != self.class_names:
            raise UserError(f"class_names: the module's are {told(self.class_names)}, the data's {told(list(names))}")

    def on_fit_start(self) -> None:
        check_frozen(self.backbone.digests(), self.digests, but=self.learning)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not norm.isfinite() and self.trainer.precision != "16-mixed":  # whose scaler leaves such a step out
            raise UserError(f"the gradients are not finite in epoch {self.current_epoch}: lower --model.lr")
        self.log("train/grad_norm", norm, on_step=False, on_epoch=True, sync_dist=True)

    def on_fit_end(self) -> None:
        self.check_frozen()

    def check_frozen(self) -> None:
        """``RuntimeError`` where a tensor that does not learn is not what it was when it was made or loaded."""
        check_frozen(tensor_digests(self.backbone), self.digests, but=self.learning)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the head and what was fine-tuned, and says what its features came from."""
        learnt = {f"backbone.{name}" for name in self.finetuned}
        state = checkpoint["state_dict"].items()
        checkpoint["state_dict"] = {name: value for name, value in state if name.startswith("head.") or name in learnt}
        scores = {name: value for name, value in self.trainer.callback_metrics.items() if name.startswith("val/")}
        checkpoint["headstart"] = {
            "layout": LAYOUT,
            "version": __version__,
            "class_names": self.class_names,
            "backbone": self.backbone.name,
            "weights": self.backbone.weights,
            "digest": self.weights_digest,
            "temperature": self.temperature,
            "scores": defined(scores),
            "trained_on": self.trained_on,
            "preprocessing": plain(asdict(self.backbone.preprocessing)),
        }

    def on_train_start(self) -> None:
        """A resumed fit of more epochs has another schedule, in which the learning rate can leap."""
        for schedule in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if not isinstance(schedule, LambdaLR):
                continue
            before = schedule.get_last_lr()[0]
            now = schedule.base_lrs[0] * schedule.lr_lambdas[0](schedule.last_epoch)
            if not math.isclose(before, now, abs_tol=1e-12):
                say(
                    f"--trainer.max_epochs={self.trainer.max_epochs}: the learning rate goes from {before:.3g} to "
                    f"{now:.3g}, since it falls over all epochs anew; a new run, without --ckpt_path, has no such leap"
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a head of other classes or another backbone, and fine-tuned layers in a fit of the head."""
        if finetuned_in(checkpoint):  # the data's features are from before
            raise UserError("--ckpt_path: its backbone was fine-tuned; fine-tuning resumes it, evaluate scores it")
        self.take(checkpoint)

    def take(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes what is not a tensor; a checkpoint of another head, other classes or another backbone is refused."""
        made, tuned = checkpoint["headstart"], finetuned_in(checkpoint)
        own_names, theirs = self.class_names, made["class_names"]
        if own_names != theirs:
            raise UserError(
                f"checkpoint: its classes are {len(theirs)} ({told(theirs, own_names)}), the data's "
                f"{len(own_names)} ({told(own_names, theirs)})"
            )
        learnt = {f"backbone.{name}" for name in tuned}
        found = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items() if name not in learnt}
        if found != (own := {f"head.{name}": tuple(value.shape) for name, value in self.head.state_dict().items()}):
            raise UserError(f"checkpoint: its head has different parameters, {found}, from this one's, {own}")
        if made["digest"] == FIRST_EDITION and self.backbone.weights == "bundled":
            raise UserError(
                "checkpoint: its head belongs to the first edition of the bundled weights, which another one replaced; "
                "train it again, or use headstart 0.1.0"
            )
        if made["digest"] != self.weights_digest:
            raise UserError(
                f"checkpoint: its head belongs to the backbone {made['backbone']}, {made['weights']} "
                f"({made['digest'][:12]}), not to {self.backbone.name}, {self.backbone.weights} "
                f"({self.weights_digest[:12]}); give the weights it was trained on"
            )
        self.take_bits(checkpoint)
        self.temperature = float(made["temperature"])
        self.finetuned = sorted({*self.finetuned, *tuned})

    def take_bits(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the scale of images of more than 8 bits, which training chose; before features are computed."""
        bits = checkpoint["headstart"]["preprocessing"].get("bits") or 16
        now = self.backbone.preprocessing
        if now.bits not in (None, bits):
            raise UserError(
                f"checkpoint: its images of more than 8 bits were scaled from {bits} bits, the data's from {now.bits}; "
                "resume it on the images that it was trained on"
            )
        now.bits = bits

    def start_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the head, the temperature and what was fine-tuned from a checkpoint's content, as ``take``."""
        self.take(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=False)
        self.digests = self.backbone.digests()

    @classmethod
    def from_content(cls, checkpoint: Mapping[str, Any], **kwargs: Any) -> Self:
        """The module that a checkpoint's content describes."""
        known = arguments_of(cls)  # a fine-tuned one has more hyper-parameters
        made = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
        module = cls(**made | kwargs)
        module.start_from(checkpoint)
        return module

    @classmethod  # the keys that Lightning's has beside these make no sense here
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any
    ) -> Self:
        """As Lightning's, from a local file; no code in it is executed. ``kwargs`` replace its hyper-parameters.

        Raises:
            UserError: the file is missing, damaged or no checkpoint of a head; or its backbone is not here any more.
        """
        return cls.from_content(read_checkpoint(Path(checkpoint_path)), **kwargs).to(map_location)

    @torch.no_grad()
    def predict(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Calibrated class probabilities of one image -> [num_classes], or of several -> [B, num_classes].

        An image is a path, a PIL image, or an array [H, W, 3] of uint8; all are decoded as ``headstart predict`` does.
        """
        if isinstance(images, Picture) or not isinstance(images, Sequence):
            return self.predict([images])[0]
        if not images:
            raise UserError("predict: no images")
        preprocessing = self.backbone.preprocessing
        pixels = torch.stack([preprocess(as_rgb(image, preprocessing), preprocessing) for image in images])
        self.eval()
        logits: Tensor = self(pixels.to(self.device))
        return (logits / self.temperature).softmax(dim=1).cpu()


def finetuned_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """The names of the backbone's tensors that a checkpoint holds, since they were fine-tuned."""
    return [name.removeprefix("backbone.") for name in checkpoint["state_dict"] if name.startswith("backbone.")]


def read_checkpoint(path: Path, logs: Path = Path("logs")) -> dict[str, Any]:
    """The content of a checkpoint of a head, as ``read_sealed``."""
    checkpoint = read_sealed(path, logs)
    made = checkpoint.get("headstart")
    made = made if isinstance(made, Mapping) else {}
    if made.get("layout") != LAYOUT:
        raise UserError(
            f"--ckpt_path={path}: holds no head of layout {LAYOUT} (this is headstart {__version__}) but "
            f"{made.get('layout', 'something else')} (headstart {made.get('version', 'unknown')}); train it again"
        )
    if lacking := [name for name in ("hyper_parameters", "epoch", "global_step") if name not in checkpoint]:
        raise UserError(f"--ckpt_path={path}: lacks {', '.join(lacking)}, so nothing can go on from it; train it again")
    temperature, tensors = made.get("temperature"), checkpoint["state_dict"].values()
    sound = isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0
    if not sound or not all(isinstance(tensor, Tensor) and tensor.isfinite().all() for tensor in tensors):
        raise UserError(f"--ckpt_path={path}: its head or temperature is not finite; train it again, with a lower lr")
    return checkpoint
