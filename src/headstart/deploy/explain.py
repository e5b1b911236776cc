"""Maps of where the head looks: exact for average-pooled features, otherwise by gradients."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from headstart.errors import UserError
from headstart.model.backbone import FrozenBackbone
from headstart.model.classifier import TransferClassifier

AT_ONCE = 8  # images whose gradients are computed together; those of 32 can take gigabytes


class ClassActivation:
    """Class activation maps of the images in a backbone's last batch; ``weight`` is the linear head's, [C, D].

    The features are the mean over places of ``find``'s tensor, and the head is linear, so each logit is the mean of
    <weight, tensor>, plus the bias: that product is the exact map.
    Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016.
    """

    method = "exact class activation"

    def __init__(self, layer: nn.Module, place: int, weight: Tensor, prefix: int | None) -> None:
        self._weight, self._prefix = weight, prefix
        layer.register_forward_hook(lambda _, *ends: self._keep(_ends(*ends)[place]))

    @classmethod
    def find(cls, backbone: FrozenBackbone, weight: Tensor, prefix: int | None) -> "ClassActivation | None":
        """Follows the last tensor whose spatial mean is the features; None if there is none."""
        side = backbone.preprocessing.crop_size
        images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, device=backbone.mean.device)
        with torch.no_grad():
            seen, features = _tensors(backbone.net, lambda: backbone(images))
        for (layer, place), tensor in reversed(seen.items()):
            if _close(_as_map(tensor, prefix), features):
                return cls(layer, place, weight, prefix)
        return None

    def __call__(self, labels: Tensor) -> Tensor:
        """Maps [B, h, w] of one class per image, for the first B images of the last batch."""
        maps = _as_map(self._kept[: len(labels)].float().cpu(), self._prefix)
        assert maps is not None
        return torch.einsum("bchw,bc->bhw", maps, self._weight[labels])

    def _keep(self, tensor: Tensor) -> None:
        self._kept = tensor.detach()


class GradientActivation:
    """Maps of the images in a backbone's last batch, for any features and head: gradient times activation, by captum.

    Of the last layer whose output has places on which the features depend. Those of a vision transformer that is read
    at its class token depend on the other tokens only up to the last attention.

    Args:
        module: computes the gradients, in float32.
        fast: its copy that computes the features.
    """

    method = "gradient x activation"

    def __init__(self, module: TransferClassifier, fast: FrozenBackbone, prefix: int | None) -> None:
        try:
            from captum.attr import LayerGradientXActivation
        except ImportError as error:
            needs = "its features are no mean over places, so --explain needs captum"
            raise UserError(f"--explain: {fast.name}: {needs}: pip install -e '.[explain]'") from error
        self._backbone, head = copy.deepcopy((module.backbone, module.head))
        self._backbone, head, self._prefix = self._backbone.to(fast.mean.device), head.to(fast.mean.device), prefix
        net = self._backbone.net
        self._attribution = LayerGradientXActivation(lambda images: head(net(images).float()), self._layer())
        fast.register_forward_pre_hook(lambda _, inputs: self._keep(inputs[0]))

    @torch.enable_grad()
    def __call__(self, labels: Tensor) -> Tensor:
        """Maps [B, h, w] of one class per image, for the first B images of the last batch."""
        maps = list[Tensor]()
        for first in range(0, len(labels), AT_ONCE):
            targets = labels[first : first + AT_ONCE].to(self._images.device)
            images = self._images[first : first + len(targets)]
            values = self._attribution.attribute(self._normalised(images), target=targets)
            found = _as_map(values.detach().float().cpu(), self._prefix)
            assert found is not None
            maps.append(found.sum(dim=1))
        return torch.cat(maps)

    @torch.enable_grad()
    def _layer(self) -> nn.Module:
        """The last layer of which an output has places with a gradient."""
        side = self._backbone.preprocessing.crop_size
        images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, device=self._backbone.mean.device)
        seen, features = _tensors(self._backbone.net, lambda: self._backbone.net(self._normalised(images)))
        outputs = [(layer, tensor) for (layer, place), tensor in seen.items() if place == 1 and tensor.requires_grad]
        last: tuple[int, int] | None = None  # its dimensions and channels, so that attention weights are passed by
        for layer, tensor in reversed(outputs):
            if (shown := _as_map(tensor, self._prefix)) is None or last not in (None, (tensor.ndim, shown.shape[1])):
                continue
            last = tensor.ndim, shown.shape[1]
            (gradient,) = torch.autograd.grad(features.amax(), tensor, retain_graph=True, allow_unused=True)
            found = None if gradient is None else _as_map(gradient, self._prefix)
            if found is not None and found.any():
                return layer
        raise UserError(f"--explain: no layer of {self._backbone.name} has a spatial map that its features depend on")

    def _normalised(self, images: Tensor) -> Tensor:
        return ((images.float() - self._backbone.mean) / self._backbone.std).requires_grad_()

    def _keep(self, images: Tensor) -> None:
        self._images = images


def explainer(module: TransferClassifier, fast: FrozenBackbone) -> ClassActivation | GradientActivation:
    """What maps the images that ``fast``, a copy of the module's backbone, computed last."""
    backbone, head = module.backbone, module.head
    if backbone.layers == "all":
        raise UserError(
            "--explain: the features are those of all stages, which have no common map; train with --model.layers=last"
        )
    prefix = getattr(backbone.net, "num_prefix_tokens", None)
    exact = ClassActivation.find(fast, head.weight.detach(), prefix) if isinstance(head, nn.Linear) else None
    return exact or GradientActivation(module, fast, prefix)


def _tensors(net: nn.Module, run: Callable[[], Tensor]) -> tuple[dict[tuple[nn.Module, int], Tensor], Tensor]:
    """What went into (0) and came out of (1) each module when it last ran, in that order; and the result."""
    seen: dict[tuple[nn.Module, int], Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for place, tensor in enumerate(_ends(inputs, output)):
            seen.pop((module, place), None)
            if isinstance(tensor, Tensor):
                seen[module, place] = tensor

    handles = [module.register_forward_hook(note) for module in net.modules()]
    try:
        return seen, run()
    finally:
        for handle in handles:
            handle.remove()


def _ends(inputs: tuple[Any, ...], output: Any) -> tuple[Any, Any]:
    return inputs[0] if inputs else None, output


def _as_map(tensor: Tensor, prefix: int | None) -> Tensor | None:
    """[B, C, h, h] of a map with channels first or last, or of tokens after the prefix; None where it has no places.

    Where the number of prefix tokens is not known, the grid is the largest that fits.
    """
    if tensor.ndim == 3:
        count = tensor.shape[1]
        first = count - math.isqrt(count) ** 2 if prefix is None else prefix
        tokens = tensor[:, first:].transpose(1, 2)
        side = math.isqrt(tokens.shape[2])
        tensor = tokens.reshape(*tokens.shape[:2], side, side) if side**2 == tokens.shape[2] else tokens
    elif tensor.ndim == 4 and tensor.shape[1] == tensor.shape[2] != tensor.shape[3]:
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor if tensor.ndim == 4 and tensor.shape[2] == tensor.shape[3] > 1 else None


def _close(found: Tensor | None, features: Tensor) -> bool:
    """Whether the features are the map's mean over places, within bf16's precision."""
    if found is None or found.shape[:2] != features.shape:
        return False
    return bool((found.float().mean(dim=(2, 3)) - features).abs().max() <= 0.01 * features.abs().max())


def overlay(pixels: Tensor, heat: Tensor) -> Image.Image:
    """Blends a picture [3, H, W] uint8 with its map [h, w]; yellow is evidence for the class, dark blue is not."""
    positive = heat.clamp(min=0) / heat.max().clamp(min=1e-12)
    sized = functional.resize(positive[None], list(pixels.shape[1:]), antialias=True)[0]
    colour = torch.from_numpy(colormaps["cividis"](sized.numpy())[..., :3]).permute(2, 0, 1)
    mixed = 0.5 * pixels / 255 + 0.5 * colour
    picture: Image.Image = functional.to_pil_image((mixed * 255).round().to(torch.uint8))
    return picture
