"""Families of backbones: which networks there are, how to build one, and which weights it comes with."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import models

from headstart.errors import UserError
from headstart.images import Preprocessing
from headstart.model.weights import (
    NAMED_WEIGHTS,
    bundled_state,
    fill,
    imagenet_or_bundled,
    official_state,
    state_in,
)


@dataclass(frozen=True)
class Network:
    """A network that gives features, and what belongs to its weights."""

    net: nn.Module  # without its classifier
    classifier: str | None  # the path of the linear layer that was cut off; None: there is not just one
    preprocessing: Preprocessing
    licence: str | None = None  # of the weights, where it is known
    versions: Mapping[str, str] = field(default_factory=dict)  # of libraries on which the features depend


class Family:
    """Networks of one kind, which end in an ``nn.Linear`` that classifies; it is cut off.

    The simplest family gives names and networks; its weights are random, or a file.
    """

    def names(self) -> list[str]:
        """The names of its networks."""
        raise NotImplementedError

    def build(self, name: str) -> nn.Module:
        """The network of that name, at random weights."""
        raise NotImplementedError

    def official(self, name: str) -> tuple[str, Preprocessing] | None:
        """The address of the weights that ``imagenet`` names, and their preprocessing; None: there are none."""
        return None

    def owns(self, name: str) -> bool:
        """Whether the network is one of this family's."""
        return name in self.names()

    def resolved(self, name: str, weights: str) -> str:
        """What ``weights`` means here and now: a name that decides nothing, or the absolute path of a file."""
        if weights in ("auto", "pretrained"):
            return "imagenet"
        return weights if weights in NAMED_WEIGHTS else str(Path(weights).expanduser().resolve())

    def make(self, name: str, weights: str, image_size: int | None) -> Network:
        """The network without its classifier, with these resolved weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what `random` means
            net = self.build(name)
        linears = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise UserError(f"--model.backbone={name}: has no linear classifier to replace; resnet18 has one")
        classifier = linears[-1][0]
        net.set_submodule(classifier, nn.Identity())
        official = self.official(name)
        if weights == "imagenet":
            if official is None:
                raise UserError(f"--model.weights=imagenet: there are none for {name}; use random or a path")
            fill(net, official_state(official[0]), official[0])
        elif weights != "random":
            fill(net, state_in(weights), f"--model.weights={weights}")
        return Network(net, classifier, official[1] if official else Preprocessing())

    def whole(self, name: str, image_size: int, classifier: str, head: nn.Linear) -> nn.Module:
        """The network of that name with another classifier."""
        net = self.build(name)
        net.set_submodule(classifier, head)
        return net


class Torchvision(Family):
    """The classification models of torchvision, and the bundled resnet18."""

    def names(self) -> list[str]:
        return list(models.list_models(module=models))

    def build(self, name: str) -> nn.Module:
        # These two rescale their input when torchvision gives them ImageNet weights.
        options = {"init_weights": False, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
        net: nn.Module = models.get_model(name, weights=None, **options)
        return net

    def official(self, name: str) -> tuple[str, Preprocessing]:
        """torchvision's first ImageNet weights."""
        entries = models.get_model_weights(name)
        chosen: Any = getattr(entries, "IMAGENET1K_V1", entries.DEFAULT)
        transforms = chosen.transforms()
        return chosen.url, Preprocessing(
            resize_size=transforms.resize_size[0],
            crop_size=transforms.crop_size[0],
            interpolation=transforms.interpolation.value,
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
        )

    def resolved(self, name: str, weights: str) -> str:
        if weights == "bundled" and name != "resnet18":
            raise UserError(
                f"--model.weights=bundled: the bundled weights are for resnet18 only, not for {name}; "
                "use --model.weights=imagenet or a path"
            )
        if weights == "auto" and name == "resnet18":
            return imagenet_or_bundled(self.official(name)[0])
        return super().resolved(name, weights)

    def make(self, name: str, weights: str, image_size: int | None) -> Network:
        if weights != "bundled":
            return super().make(name, weights, image_size)
        made = super().make(name, "random", image_size)
        fill(made.net, bundled_state(), "the bundled weights")
        return Network(made.net, made.classifier, Preprocessing(resize_size=146, crop_size=128))


def unknown(name: str, known: list[str]) -> UserError:
    """The error for a backbone that no family has."""
    near = difflib.get_close_matches(name, known, n=3)
    nearest = f"; the nearest names are {', '.join(near)}" if near else ""
    return UserError(
        f"--model.backbone={name}: no such backbone{nearest}; give a classification model of torchvision, such as "
        "resnet18, or timm/NAME"
    )
