"""The frozen backbone: a network without its classifier, and the freeze."""

import copy
import hashlib
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headstart.errors import UserError
from headstart.images import Fit, Preprocessing
from headstart.model.families import Family, Torchvision, unknown
from headstart.model.stages import Stages
from headstart.model.timm import Timm

FAMILIES: tuple[Family, ...] = (Torchvision(), Timm())
Layers = Literal["last", "all"]
# What commands call the arguments of ``FrozenBackbone``, in their order.
BACKBONE_OPTIONS = ("backbone", "weights", "image_size", "fit", "layers")


class FrozenBackbone(nn.Module):
    """A classification network whose last ``nn.Linear`` is the identity, frozen in fact.

    No parameter takes a gradient, and the module stays in eval mode whatever ``train()`` is asked, since BatchNorm's
    running statistics would drift in train mode even without gradients (pytorch#86590). ``tensor_digests`` proves it.

    Args:
        name: a classification model of torchvision, such as ``resnet18``, or ``timm/NAME``.
        weights: ``auto``, ``bundled``, ``imagenet`` (``pretrained`` for timm), ``random``, or the path of a state dict.
        image_size: side of the square that the backbone sees, in pixels; None: what the weights were made for.
        fit: how an image becomes that square; None: as the weights were made.
        layers: ``last``: the features before the classifier; ``all``: the means of all stages, joined (``Stages``).
        mirror: with ``layers=all``, average the features over the image and its mirror image.

    Attributes:
        num_features: the width D of the features.

    Raises:
        UserError: the network is unknown or takes no such images; its weights are missing, damaged or another's.
    """

    def __init__(
        self,
        name: str = "resnet18",
        weights: str = "auto",
        image_size: int | None = None,
        fit: Fit | None = None,
        layers: Layers = "last",
        mirror: bool = True,
    ) -> None:
        family = family_of(name)
        weights = family.resolved(name, weights)
        made = family.make(name, weights, image_size)
        preprocessing, net = made.preprocessing.adapted(image_size, fit), made.net.eval()
        if layers == "all":
            net = Stages(net, name, preprocessing.crop_size, mirror)
        self.adopt(name, weights, net, preprocessing, made.versions)
        self.family, self.layers, self.licence = family, layers, made.licence
        self.classifier_path = made.classifier if layers == "last" else None

    def adopt(
        self, name: str, weights: str, net: nn.Module, preprocessing: Preprocessing, versions: Mapping[str, str]
    ) -> None:
        """Takes a ready network, and freezes it; ``versions`` are of libraries on which its features depend."""
        super().__init__()
        self.name, self.weights, self.net = name, weights, net
        self.num_features, self.preprocessing = _width(net, preprocessing.crop_size, name), preprocessing
        self.versions = versions
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(preprocessing.mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(preprocessing.std).view(3, 1, 1) * 255)
        self._hashed: dict[str, tuple[Any, str]] = {}
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBackbone":
        """Stays in eval mode, whatever is asked."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] uint8, resized and cropped as ``preprocessing`` says -> features [B, num_features]."""
        dtype = next(self.net.parameters()).dtype
        normalised = images.to(torch.float32, copy=True).sub_(self.mean).div_(self.std)
        features: Tensor = self.net(normalised.to(dtype, memory_format=torch.channels_last))
        return features.float()

    def digests(self) -> dict[str, str]:
        """sha256 of each parameter and buffer; hashed again only where a tensor may have changed, by its version.

        A change through ``.data`` has no version, so the end of a fit and extraction ask ``tensor_digests``.
        """
        for name, tensor in _tensors(self):
            version = None if tensor.is_inference() else tensor._version
            stamp = tensor.data_ptr(), version, tensor.dtype, tensor.shape
            if version is None or self._hashed.get(name, (None, ""))[0] != stamp:
                self._hashed[name] = stamp, _digest(tensor)
        return {name: self._hashed[name][1] for name, _ in _tensors(self)}

    def digest(self) -> str:
        """sha256 over every parameter and buffer: equal digests, equal features."""
        return combined(self.digests())

    def for_extraction(self, dtype: torch.dtype, device: torch.device) -> "FrozenBackbone":
        """A copy for inference only: BatchNorm folded into the convolutions, channels last, in ``dtype``."""
        fast = copy.deepcopy(self).eval()  # torchvision's extractor of stages is copied in train mode
        fast.net = _fold_batch_norm(fast.net).to(dtype)
        for tensor in (*fast.net.parameters(), *fast.net.buffers()):
            if tensor.ndim == 4:  # `Module.to` fails at five, which torch.fx makes of some constants
                tensor.data = tensor.contiguous(memory_format=torch.channels_last)
        return fast.to(device)


def family_of(name: str) -> Family:
    """The family that has a network of that name."""
    found = next((family for family in FAMILIES if family.owns(name)), None)
    if found is None:
        raise unknown(name, Torchvision().names())
    return found


def tensor_digests(module: nn.Module) -> dict[str, str]:
    """sha256 of each parameter and buffer of any module, by name."""
    return {name: _digest(tensor) for name, tensor in _tensors(module)}


@torch.no_grad()
def _width(net: nn.Module, side: int, name: str) -> int:
    """How wide its features are: what it gives for one image, since not every network says it."""
    try:
        _, width = net.eval()(torch.zeros(1, 3, side, side)).shape
    except Exception as error:  # networks raise many kinds at a size that they cannot take
        reason = " ".join(str(error).split())
        raise UserError(f"--model.image_size={side}: {name} cannot take such images ({reason})") from error
    return int(width)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _digest(tensor: Tensor) -> str:
    content = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content.update(tensor_bytes(tensor))
    return content.hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's numbers as a buffer, to be hashed."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def combined(digests: Mapping[str, str]) -> str:
    """One sha256 over the digests of a module's tensors."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def check_frozen(now: Mapping[str, str], before: Mapping[str, str], but: Collection[str] = ()) -> None:
    """Compares the digests of tensors with earlier ones; ``RuntimeError`` where one changed that is not in ``but``."""
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name) and name not in but]
    if changed:
        raise RuntimeError(
            f"the frozen backbone changed: {', '.join(changed[:3])}{' …' if len(changed) > 3 else ''} "
            f"({len(changed)} of {len(now)} tensors); its features and the head no longer belong together"
        )


def _fold_batch_norm(net: nn.Module) -> nn.Module:
    """Folds each BatchNorm into the convolution before it, where torch.fx can follow the network."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(net, inplace=True)
    except Exception:  # fx's tracer raises many kinds at data-dependent Python; unfolded is only slower
        return net
