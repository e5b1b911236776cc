"""The frozen backbone: a network without its classifier, and the freeze."""

import copy
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headstart.images import Preprocessing
from headstart.model.weights import load_weights, network


class FrozenBackbone(nn.Module):
    """A classification network whose last ``nn.Linear`` is the identity, frozen in fact.

    No parameter takes a gradient, and the module stays in eval mode whatever ``train()`` is asked, since BatchNorm's
    running statistics would drift in train mode even without gradients (pytorch#86590). ``tensor_digests`` proves it.

    Args:
        name: a torchvision classification model, such as ``resnet18``.
        weights: ``bundled``, ``imagenet``, ``random``, or the path of a state dict (``.pth``, ``.safetensors``).
        image_size: side of the square that the backbone sees, in pixels; None: what the weights were made for.

    Attributes:
        num_features: the width D of the features.

    Raises:
        UserError: the model is unknown or has no ``nn.Linear``; its weights are missing, damaged or another model's.
    """

    def __init__(self, name: str = "resnet18", weights: str = "bundled", image_size: int | None = None) -> None:
        made = network(name)
        preprocessing = load_weights(made, name, weights)
        if image_size is not None:
            preprocessing = preprocessing.resized(image_size)
        self.adopt(name, weights, made.net, made.num_features, preprocessing)
        self.family, self.classifier_path = made.family, made.classifier

    def adopt(self, name: str, weights: str, net: nn.Module, num_features: int, preprocessing: Preprocessing) -> None:
        """Takes a ready network, and freezes it."""
        super().__init__()
        self.name, self.weights, self.net = name, weights, net
        self.num_features, self.preprocessing = num_features, preprocessing
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
        """A copy for inference alone: BatchNorm folded into the convolutions, channels last, in ``dtype``."""
        fast = copy.deepcopy(self)
        fast.net = _fold_batch_norm(fast.net).to(dtype).to(memory_format=torch.channels_last)
        return fast.to(device)


def tensor_digests(module: nn.Module) -> dict[str, str]:
    """sha256 of each parameter and buffer of any module, by name."""
    return {name: _digest(tensor) for name, tensor in _tensors(module)}


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
