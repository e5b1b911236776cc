"""The frozen backbone: a torchvision model without its classifier, its weights, its preprocessing, its freeze."""

import copy
import hashlib
import io
import urllib.error
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from headstart.errors import UserError

BUNDLED = Path(__file__).parents[1] / "weights" / "resnet18-bundled.safetensors"
NAMED_WEIGHTS = ("bundled", "imagenet", "random")
# File name -> sha256. torchvision's names carry the first 8 digits only; those known in full are checked in full.
SHA256 = {
    "resnet18-bundled.safetensors": "267a705afd498731895666d4e18a8ce895ca20954ace7223e820396e7af5d9f6",
    "resnet18-f37072fd.pth": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
}
NUM_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the backbone: resize the shorter side, crop the centre, normalise.

    Attributes:
        resize_size: the shorter side after resizing, in pixels.
        crop_size: the side of the centre crop, in pixels.
        interpolation: a name of torchvision's ``InterpolationMode``, antialiased.
        mean: per channel, of values in [0, 1].
        std: per channel, of values in [0, 1].
    """

    resize_size: int = 256
    crop_size: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def resized(self, image_size: int) -> "Preprocessing":
        """The same with another crop size, the resize in proportion."""
        values = asdict(self)
        values["resize_size"] = round(image_size * self.resize_size / self.crop_size)
        return Preprocessing(**(values | {"crop_size": image_size}))


class FrozenBackbone(nn.Module):
    """A torchvision classification model whose last ``nn.Linear`` is the identity, frozen in fact.

    No parameter takes a gradient, and the module stays in eval mode whatever ``train()`` is asked, since BatchNorm's
    running statistics would drift in train mode even without gradients (pytorch#86590). ``tensor_digests`` proves it.

    Args:
        name: a torchvision classification model, such as ``resnet18``.
        weights: ``bundled``, ``imagenet``, ``random``, or the path of a state dict (``.pth``, ``.safetensors``).
        image_size: side of the square that the backbone sees, in pixels; None: what the weights were made for.

    Raises:
        UserError: the model is unknown or has no ``nn.Linear``; its weights are missing, damaged or another model's.
    """

    def __init__(self, name: str = "resnet18", weights: str = "bundled", image_size: int | None = None) -> None:
        super().__init__()
        self.name, self.weights = name, weights
        self.net, self.num_features, self.classifier_path = _headless(name)
        self.preprocessing = _load(self.net, name, weights)
        if image_size is not None:
            self.preprocessing = self.preprocessing.resized(image_size)
        mean, std = self.preprocessing.mean, self.preprocessing.std
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255)
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

    def digest(self) -> str:
        """sha256 over every parameter and buffer: equal digests, equal features."""
        return combined(tensor_digests(self))

    def for_extraction(self, dtype: torch.dtype, device: torch.device) -> "FrozenBackbone":
        """A copy for inference alone: BatchNorm folded into the convolutions, channels last, in ``dtype``."""
        fast = copy.deepcopy(self)
        fast.net = _fold_batch_norm(fast.net).to(dtype).to(memory_format=torch.channels_last)
        return fast.to(device)


def tensor_digests(module: nn.Module) -> dict[str, str]:
    """sha256 of each parameter and buffer of any module, by name."""
    digests = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        content = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor_bytes(tensor))
        digests[name] = content.hexdigest()
    return digests


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's numbers as a buffer, to be hashed."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def combined(digests: dict[str, str]) -> str:
    """One sha256 over the ``tensor_digests`` of a module."""
    return hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()


def check_frozen(module: nn.Module, before: dict[str, str], but: Collection[str] = ()) -> None:
    """Compares a module with its ``tensor_digests`` of an earlier moment.

    Args:
        module: that should not have changed.
        before: its digests then.
        but: names of tensors that may change.

    Raises:
        RuntimeError: another parameter or buffer changed; it names them.
    """
    now = tensor_digests(module)
    changed = [name for name in before | now if before.get(name) != now.get(name) and name not in but]
    if changed:
        raise RuntimeError(
            f"the frozen backbone changed: {', '.join(changed[:3])}{' …' if len(changed) > 3 else ''} "
            f"({len(changed)} of {len(now)} tensors); its features and the head no longer belong together"
        )


def torchvision_model(name: str) -> nn.Module:
    """torchvision's own model, at random weights."""
    # These two scale their input anew when torchvision gives them ImageNet weights.
    options = {"init_weights": False, "transform_input": True} if name in ("googlenet", "inception_v3") else {}
    net: nn.Module = models.get_model(name, weights=None, **options)
    return net


def _headless(name: str) -> tuple[nn.Module, int, str]:
    """The torchvision model with the identity for its last linear layer, the width of its features, and its name."""
    names = models.list_models(module=models)
    if name not in names:
        raise UserError(f"--model.backbone={name}: no such torchvision classification model; known: {', '.join(names)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what `random` means
        net = torchvision_model(name)
    linears = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linears or linears[-1][1].out_features != NUM_IMAGENET_CLASSES:
        raise UserError(f"--model.backbone={name}: has no linear classifier to replace; resnet18 has one")
    path, linear = linears[-1]
    net.set_submodule(path, nn.Identity())
    return net, linear.in_features, path


def _load(net: nn.Module, name: str, weights: str) -> Preprocessing:
    """Loads the named weights and gives the preprocessing that belongs to them."""
    if weights == "bundled":
        if name != "resnet18":
            raise UserError(
                f"--model.weights=bundled: are a resnet18's, not a {name}'s; use --model.weights=imagenet or a path"
            )
        _load_state(net, safetensors.torch.load(_checked_bytes(BUNDLED)), BUNDLED)
        return Preprocessing(resize_size=146, crop_size=128)
    official = _imagenet_weights(name)
    if weights == "imagenet":
        if official is None:
            raise UserError(f"--model.weights=imagenet: there are none for {name}; use random or a path")
        path = _download(official.url)
        _load_state(net, _tensors(path, _checked_bytes(path)), path)
    elif weights != "random":
        path = Path(weights).expanduser()
        if not path.is_file() or path.suffix not in READERS:
            raise UserError(
                f"--model.weights={path}: not a .pth or .safetensors file; give one, or bundled, imagenet or random"
            )
        _load_state(net, _tensors(path, path.read_bytes()), path)
    if official is None:
        return Preprocessing()
    transforms = official.transforms()
    return Preprocessing(
        resize_size=transforms.resize_size[0],
        crop_size=transforms.crop_size[0],
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _imagenet_weights(name: str) -> Any:
    """torchvision's first ImageNet weights: the entry that holds their address and transforms; None: it has none."""
    try:
        entries = models.get_model_weights(name)
    except ValueError:  # a model that is not torchvision's own
        return None
    return getattr(entries, "IMAGENET1K_V1", entries.DEFAULT)


def _download(url: str) -> Path:
    """The file in torch's own folder of downloaded weights; downloaded, by torch's own code, if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=_hash_prefix(path))
        except (OSError, urllib.error.URLError, RuntimeError) as error:
            sha256 = SHA256.get(path.name, f"{_hash_prefix(path)}…")
            raise UserError(
                f"--model.weights=imagenet: {path.name} could not be downloaded ({error}); put the file into "
                f"{path.parent} yourself (sha256 {sha256}), or use --model.weights=bundled"
            ) from error
    return path


def _hash_prefix(path: Path) -> str:
    """The digits of the sha256 that torchvision writes into its file names."""
    return path.stem.rsplit("-", 1)[-1]


def _checked_bytes(path: Path) -> bytes:
    """The file's content, of which the sha256 was compared: what is checked is what is loaded."""
    data = path.read_bytes()
    expected = SHA256.get(path.name, _hash_prefix(path))
    if not hashlib.sha256(data).hexdigest().startswith(expected):
        raise UserError(f"{path}: is damaged or not the file it should be (sha256 differs); delete it and try again")
    return data


def _plain(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


READERS: dict[str, Callable[[bytes], Any]] = {
    ".safetensors": safetensors.torch.load,
    ".pth": _plain,
    ".pt": _plain,
}


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The state dict in a file's content; nothing in it is executed."""
    try:
        state = READERS[path.suffix](data)
    except Exception as error:  # whatever the file holds: zip, pickle and safetensors raise a dozen kinds
        raise UserError(f"--model.weights={path}: cannot be read as plain tensors; save a state dict") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--model.weights={path}: is not a state dict (names to tensors); save model.state_dict()")
    return state


def _load_state(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Fills the whole net from a state dict, with or without the classifier's two tensors."""
    wanted = net.state_dict()
    # Files from before torch 0.4.1 lack these counters, which eval mode never reads.
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    state = counters | state
    missing = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    extra = [key for key in state if key not in wanted]
    if missing or len(extra) > 2:
        raise UserError(
            f"{path}: holds another architecture: {len(missing)} tensors missing or of another shape "
            f"({', '.join(missing[:2])}), {len(extra)} unknown ({', '.join(extra[:2])}); name its --model.backbone"
        )
    net.load_state_dict({key: state[key].to(value.dtype) for key, value in wanted.items()})


def _fold_batch_norm(net: nn.Module) -> nn.Module:
    """Folds each BatchNorm into the convolution before it, where torch.fx can follow the network."""
    from torch.fx.experimental.optimization import fuse

    try:
        return fuse(net, inplace=True)
    except Exception:  # fx's tracer raises many kinds at data-dependent Python; unfolded is only slower
        return net
