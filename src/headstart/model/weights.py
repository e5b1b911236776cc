"""Where backbones come from: families of networks, named weights, their download, and the checks of their files."""

import hashlib
import io
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

from headstart.errors import UserError
from headstart.files import in_either_form, read_regular
from headstart.images import Preprocessing

BUNDLED = Path(__file__).parents[1] / "weights" / "resnet18-bundled.safetensors"
NAMED_WEIGHTS = ("bundled", "imagenet", "random")
# File name -> sha256. torchvision's names hold the first 8 digits only; those known in full are checked in full.
SHA256 = {
    "resnet18-bundled.safetensors": "267a705afd498731895666d4e18a8ce895ca20954ace7223e820396e7af5d9f6",
    "resnet18-f37072fd.pth": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
}


class Family(Protocol):
    """Networks of one kind, which end in an ``nn.Linear`` that classifies; it is cut off.

    The simplest family gives names and networks; its weights are random, or a file.
    """

    def names(self) -> list[str]:
        """The names of its networks."""
        ...

    def build(self, name: str) -> nn.Module:
        """The network of that name, at random weights."""
        ...

    def official(self, name: str) -> tuple[str, Preprocessing] | None:
        """The address of the weights that ``imagenet`` names, and their preprocessing; None: there are none."""
        ...


class Torchvision:
    """The classification models of torchvision."""

    def names(self) -> list[str]:
        return list(models.list_models(module=models))

    def build(self, name: str) -> nn.Module:
        # These two scale their input anew when torchvision gives them ImageNet weights.
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


FAMILIES: tuple[Family, ...] = (Torchvision(),)


@dataclass(frozen=True)
class Network:
    """A network that gives features."""

    family: Family
    net: nn.Module  # without its classifier
    num_features: int  # the width of its features
    classifier: str  # the path of the layer that was cut off


def network(name: str) -> Network:
    """The network of that name, at the weights that ``random`` means; one without a linear classifier is an error."""
    family = next((family for family in FAMILIES if name in family.names()), None)
    if family is None:
        known = ", ".join(known for family in FAMILIES for known in family.names())
        raise UserError(f"--model.backbone={name}: no such torchvision classification model; known: {known}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = family.build(name)
    linears = [(path, module) for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise UserError(f"--model.backbone={name}: has no linear classifier to replace; resnet18 has one")
    path, linear = linears[-1]
    net.set_submodule(path, nn.Identity())
    return Network(family, net, linear.in_features, path)


def load_weights(made: Network, name: str, weights: str) -> Preprocessing:
    """Loads weights (bundled, imagenet, random, or a path) into a network -> the preprocessing that belongs to them."""
    if weights == "bundled":
        if name != "resnet18":
            raise UserError(
                f"--model.weights=bundled: the bundled weights are for resnet18 only, not for {name}; "
                "use --model.weights=imagenet or a path"
            )
        _fill(made.net, safetensors.torch.load(_checked_bytes(BUNDLED)), BUNDLED)
        return Preprocessing(resize_size=146, crop_size=128)
    official = made.family.official(name)
    if weights == "imagenet":
        if official is None:
            raise UserError(f"--model.weights=imagenet: there are none for {name}; use random or a path")
        path = _download(official[0])
        _fill(made.net, _tensors(path, _checked_bytes(path)), path)
    elif weights != "random":
        path = in_either_form(Path(weights).expanduser())
        if not path.is_file() or path.suffix not in READERS:
            raise UserError(
                f"--model.weights={path}: not a .pth or .safetensors file; give one, or bundled, imagenet or random"
            )
        try:
            data = read_regular(path)
        except OSError as error:
            raise UserError(f"--model.weights={path}: cannot be read ({error.strerror})") from error
        _fill(made.net, _tensors(path, data), path)
    return official[1] if official else Preprocessing()


def resolved(weights: str) -> str:
    """The name of weights, or the absolute path of a file of them."""
    return weights if weights in NAMED_WEIGHTS else str(Path(weights).expanduser().resolve())


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
    """The file's content, whose sha256 was compared: what is checked is what is loaded."""
    data = read_regular(path)
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


def _fill(net: nn.Module, state: dict[str, Tensor], path: Path) -> None:
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
