"""Checkpoints of a head: their content, compatibility checks, and loading."""

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
from headstart.model.known import Known
from headstart.model.metrics import defined
from headstart.model.sealed import read_sealed
from headstart.model.task import Task
from headstart.ranges import arguments_of, plain
from headstart.terminal import listing, say

# Digest of the former bundled weights.
FIRST_EDITION = "caf123c9de10807f929b849a9b4f292b02712456f4c027e8660a46977aed2d56"
LAYOUT = 2  # 2: adds the temperature
# What a checkpoint holds, by its place; a file from elsewhere may hold anything there.
CONTENT: dict[str, type | tuple[type, ...]] = {
    "epoch": int,
    "global_step": int,
    "state_dict": dict,
    "hyper_parameters": dict,
    **dict.fromkeys(("headstart.class_names", "hyper_parameters.class_names"), list),
    **dict.fromkeys(("headstart.digest", "headstart.backbone", "headstart.weights"), str),
    "headstart.preprocessing": dict,
    "headstart.preprocessing.bits": (int, type(None)),
    "headstart.known": (dict, type(None)),
    **dict.fromkeys(("hyper_parameters.backbone", "hyper_parameters.weights"), str),
    "hyper_parameters.head": (str, type(None)),
    "hyper_parameters.image_size": (int, type(None)),
    "hyper_parameters.multilabel": (bool, type(None)),
}


class HeadModule(LightningModule):
    """A head and its frozen backbone, saved, checked and loaded; ``TransferClassifier`` adds the training."""

    class_names: list[str]
    backbone: FrozenBackbone
    head: nn.Module
    task: Task  # one label per image or several, with what validation fits
    arithmetic: str | None = None  # of the features that the head was trained on; None: unknown, or without a cache
    learning: Sequence[str] = ()  # backbone tensors that may change in a fit

    def remember_backbone(self) -> None:
        """Records the digests of the weights that must not change."""
        self.strict_loading = False  # checkpoints do not contain frozen weights
        self.digests = self.backbone.digests()  # at construction, or when loaded
        self.weights_digest = combined(self.digests)  # of the original weights, before any fine-tuning
        self.trained_on: list[str] = []  # sha256 of each image, unless in the run's folder
        self.finetuned: list[str] = []  # tensors that differ from the original weights
        self.known_content: dict[str, Tensor] | None = None  # set by loading a checkpoint that has it
        self.origin = ""  # what made the head, if not an epoch

    @property
    def frozen(self) -> FrozenBackbone:
        """The part that maps an image to the same features in every epoch, for the cache: the whole backbone."""
        return self.backbone

    @property
    def known(self) -> Known | None:
        """Maps features to how familiar they are, in float64, as fitted when the training ended; None: it was not."""
        return Known(**self.known_content).double() if self.known_content else None

    def setup(self, stage: str) -> None:
        """Refuses data with other classes."""
        data = getattr(self.trainer, "datamodule", None)
        names = getattr(data, "class_names", self.class_names)
        if list(names) != self.class_names:
            raise UserError(f"class_names: {listing(self.class_names)} (model), {listing(list(names))} (data)")
        several = self.hparams.get("multilabel", False)
        if getattr(data, "multilabel", several) != several:
            raise UserError("multilabel: differs between model and data; give the model multilabel=data.multilabel")

    def on_fit_start(self) -> None:
        check_frozen(self.backbone.digests(), self.digests, but=self.learning)
        store = getattr(getattr(self.trainer, "datamodule", None), "store", None)
        self.arithmetic = getattr(store, "arithmetic", None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if not norm.isfinite() and self.trainer.precision != "16-mixed":  # its scaler skips such steps
            raise UserError(f"the gradients are not finite in epoch {self.current_epoch}: lower --model.lr")
        self.log("train/grad_norm", norm, on_step=False, on_epoch=True, sync_dist=True)

    def on_fit_end(self) -> None:
        self.check_frozen()

    def check_frozen(self) -> None:
        """Raises ``RuntimeError`` if a frozen tensor changed since it was created or loaded."""
        check_frozen(tensor_digests(self.backbone), self.digests, but=self.learning)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves only the head and fine-tuned tensors, and records the origin of the features."""
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
            "head": self.origin or f"epoch {self.current_epoch}",
            "scores": defined(scores),
            "trained_on": self.trained_on,
            "arithmetic": self.arithmetic,
            "preprocessing": plain(asdict(self.backbone.preprocessing)),
            **self.task.state(bool(scores)),
        }

    def on_train_start(self) -> None:
        """Warns of a jump of the learning rate, when a fit is resumed with more epochs."""
        for schedule in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            if not isinstance(schedule, LambdaLR):
                continue
            before = schedule.get_last_lr()[0]
            now = schedule.base_lrs[0] * schedule.lr_lambdas[0](schedule.last_epoch)
            if not math.isclose(before, now, abs_tol=1e-12):
                say(
                    f"--trainer.max_epochs={self.trainer.max_epochs}: the learning rate jumps from {before:.3g} to "
                    f"{now:.3g}, since it depends on all epochs; a new run, without --ckpt_path, has no such jump"
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses another head, other classes, another backbone, and fine-tuned layers in a fit of the head only."""
        if finetuned_in(checkpoint):  # the cached features are of the original backbone
            raise UserError("--ckpt_path: its backbone was fine-tuned; use finetune to resume, evaluate to score")
        self.take(checkpoint)

    def take(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes all but the tensors; ``UserError`` for another head, other classes or another backbone."""
        made, tuned = checkpoint["headstart"], finetuned_in(checkpoint)
        own_names, theirs = self.class_names, made["class_names"]
        if own_names != theirs:
            raise UserError(
                f"checkpoint: has {len(theirs)} classes ({listing(theirs, own_names)}), but the data has "
                f"{len(own_names)} ({listing(own_names, theirs)})"
            )
        several, own = "thresholds" in made, bool(self.hparams.get("multilabel"))
        if several != own:
            kinds = {False: "one label per image", True: "several labels per image"}
            raise UserError(f"checkpoint: is of a head for {kinds[several]}, but the data has {kinds[own]}")
        learnt = {f"backbone.{name}" for name in tuned}
        found = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items() if name not in learnt}
        if found != (now := {f"head.{name}": tuple(value.shape) for name, value in self.head.state_dict().items()}):
            raise UserError(f"checkpoint: its head has parameters {found}, but this one has {now}")
        if made["digest"] == FIRST_EDITION and self.backbone.weights == "bundled":
            raise UserError(
                "checkpoint: its head belongs to the first edition of the bundled weights, since replaced; "
                "train it again, or use headstart 0.1.0"
            )
        if made["digest"] != self.weights_digest:
            raise UserError(
                f"checkpoint: its head belongs to the backbone {made['backbone']}, {made['weights']} "
                f"({made['digest'][:12]}), not to {self.backbone.name}, {self.backbone.weights} "
                f"({self.weights_digest[:12]}); use the weights it was trained on"
            )
        self.take_bits(checkpoint)
        self.task.take(made)
        self.arithmetic = made.get("arithmetic")
        self.known_content = made.get("known")
        self.finetuned = sorted({*self.finetuned, *tuned})

    def take_bits(self, checkpoint: Mapping[str, Any]) -> None:
        """Takes the scale of images of more than 8 bits, chosen in training, before features are computed."""
        bits = checkpoint["headstart"]["preprocessing"].get("bits") or 16
        now = self.backbone.preprocessing
        if now.bits not in (None, bits):
            raise UserError(
                f"checkpoint: its images of more than 8 bits were scaled from {bits} bits, the data from {now.bits}; "
                "resume it on the images it was trained on"
            )
        now.bits = bits

    def start_from(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the head, the temperature and fine-tuned tensors from a checkpoint's content; raises as ``take``."""
        self.take(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=False)
        self.digests = self.backbone.digests()

    @classmethod
    def from_content(cls, checkpoint: Mapping[str, Any], **kwargs: Any) -> Self:
        """Creates the module from a checkpoint's content."""
        known = arguments_of(cls)  # a fine-tuned one has more hyper-parameters
        made = {name: value for name, value in checkpoint["hyper_parameters"].items() if name in known}
        module = cls(**made | kwargs)
        module.start_from(checkpoint)
        return module

    @classmethod  # Lightning's other arguments do not apply here
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: Any, map_location: Any = None, **kwargs: Any
    ) -> Self:
        """As in Lightning, from a local file, without executing code. ``kwargs`` override hyper-parameters.

        Raises:
            UserError: the file is missing, damaged or not a checkpoint of a head; or its backbone is missing.
        """
        return cls.from_content(read_checkpoint(Path(checkpoint_path)), **kwargs).to(map_location)

    @torch.no_grad()
    def predict(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Calibrated class probabilities of one image -> [num_classes], or of several -> [B, num_classes].

        An image is a path, a PIL image, or an array [H, W, 3] of uint8; all are decoded as by `headstart predict`.
        """
        if isinstance(images, Picture) or not isinstance(images, Sequence):
            return self.predict([images])[0]
        if not images:
            raise UserError("predict: no images")
        preprocessing = self.backbone.preprocessing
        pixels = torch.stack([preprocess(as_rgb(image, preprocessing), preprocessing) for image in images])
        self.eval()
        logits: Tensor = self(pixels.to(self.device))
        return self.task.probabilities(logits).cpu()


def finetuned_in(checkpoint: Mapping[str, Any]) -> list[str]:
    """The names of the fine-tuned backbone tensors in a checkpoint."""
    return [name.removeprefix("backbone.") for name in checkpoint["state_dict"] if name.startswith("backbone.")]


def read_checkpoint(path: Path, logs: Path = Path("logs")) -> dict[str, Any]:
    """Reads a checkpoint of a head, as ``read_sealed``; ``UserError`` if it is not a valid one."""
    checkpoint = read_sealed(path, logs)
    made = checkpoint.get("headstart")
    made = made if isinstance(made, Mapping) else {}
    layout = made.get("layout", "unknown")
    if not isinstance(layout, int) or layout != LAYOUT:
        raise UserError(
            f"--ckpt_path={path}: not a headstart checkpoint of layout {LAYOUT} (this is headstart {__version__}); its "
            f"layout is {layout} (headstart {made.get('version', 'unknown')}); train it again"
        )
    wrong = [place for place, kind in CONTENT.items() if not isinstance(_at(place, checkpoint), kind)]
    both = [] if wrong else [made["class_names"], checkpoint["hyper_parameters"]["class_names"]]
    if not both or not all(names and all(isinstance(name, str) for name in names) for names in both):
        raise UserError(f"--ckpt_path={path}: lacks {', '.join(wrong[:1]) or 'class names'}; train it again")
    temperature, tensors = made.get("temperature"), checkpoint["state_dict"].values()
    sound = isinstance(temperature, int | float) and math.isfinite(temperature) and temperature > 0
    if not sound or not all(isinstance(tensor, Tensor) and tensor.isfinite().all() for tensor in tensors):
        raise UserError(f"--ckpt_path={path}: its head or temperature is not finite; train it again, with a lower lr")
    return checkpoint


def _at(place: str, content: Any) -> Any:
    """The entry at a dotted place; None if there is none."""
    for name in place.split("."):
        content = content.get(name) if isinstance(content, Mapping) else None
    return content
