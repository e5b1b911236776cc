"""Weight files: where they are, how they are downloaded, checked and loaded into a network."""

import hashlib
import io
import os
import socket
import time
import urllib.error
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from filelock import FileLock
from torch import Tensor, nn

from headstart.errors import UserError
from headstart.files import in_either_form, read_regular
from headstart.terminal import say, say_once

BUNDLED = Path(__file__).parents[1] / "weights" / "resnet18-bundled.safetensors"
NAMED_WEIGHTS = ("auto", "bundled", "imagenet", "pretrained", "random")
# File name -> sha256. torchvision's names hold the first 8 digits only; those known in full are checked in full.
SHA256 = {
    "resnet18-bundled.safetensors": "ec50a98378cf78fd086c17ea03b045a2f18510884500fc6f86bb0ff5f7291a30",
    "resnet18-f37072fd.pth": "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
}
_CHECKOUT = Path(__file__).parents[3] / "data/clipart"
DEMO = _CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).parents[1] / "clipart"  # where setup.py copies it
SECONDS_TO_CONNECT = 5  # torch's own downloader waits for ever
SECONDS_OF_FAILURE = 3600  # for so long `auto` does not try again


class Unreachable(UserError):
    """Weights that are neither here nor can be downloaded."""


def for_data(backbone: str, weights: str, root: str | None) -> str:
    """The weights for a folder of images: for the demo, ``auto`` of a resnet18 means the bundled ones."""
    of_demo = root is None or Path(root).expanduser().resolve() == DEMO
    return "bundled" if (backbone, weights) == ("resnet18", "auto") and of_demo else weights


def imagenet_or_bundled(url: str) -> str:
    """The name that ``auto`` becomes for a resnet18: ImageNet's weights if they can be had, else the bundled ones."""
    path = downloaded_path(url)
    try:
        if not path.exists() and _failed_lately(path):
            raise Unreachable("the last attempt to download them failed within the hour")
        download(url)
    except Unreachable as error:
        say_once(
            f"weights:  the bundled ones, since ImageNet's are not available ({error}); on photographs ImageNet's "
            f"are better: try --model.weights=imagenet, or put the file into {path.parent}"
        )
        return "bundled"
    say_once(f"weights:  ImageNet's, from {path}; --model.weights=bundled takes the bundled ones")
    return "imagenet"


def offline() -> bool:
    """Whether the environment forbids the network: HEADSTART_OFFLINE=1 or HF_HUB_OFFLINE=1."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("HEADSTART_OFFLINE", "HF_HUB_OFFLINE"))


def downloaded_path(url: str) -> Path:
    """Where torch keeps the file of this address."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def download(url: str) -> Path:
    """The file in torch's own folder of downloaded weights; downloaded, by torch's own code, if it is not there.

    One process downloads for all that want the file.

    Raises:
        Unreachable: it is not there, and cannot be downloaded.
    """
    path = downloaded_path(url)
    if path.exists():
        return path
    if offline():
        raise Unreachable(f"{path.name} is not in {path.parent}, and the environment forbids the network")
    before = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):
            if not path.exists():
                say(f"weights:  downloading {url}")
                socket.setdefaulttimeout(SECONDS_TO_CONNECT)
                torch.hub.download_url_to_file(url, str(path), hash_prefix=_hash_prefix(path))
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        with suppress(OSError):
            _failure(path).touch()
        reason = getattr(error, "reason", None) or error
        raise Unreachable(f"{path.name} could not be downloaded: {reason}") from error
    finally:
        socket.setdefaulttimeout(before)
    _failure(path).unlink(missing_ok=True)
    return path


def _failure(path: Path) -> Path:
    """An empty file, whose modification time is the time of the last failed download."""
    return path.with_name(f"{path.name}.failed")


def _failed_lately(path: Path) -> bool:
    try:
        return time.time() - _failure(path).stat().st_mtime < SECONDS_OF_FAILURE
    except OSError:
        return False


def official_state(url: str) -> dict[str, Tensor]:
    """The tensors of a published file, checked against the hash in its name."""
    try:
        path = download(url)
    except Unreachable as error:
        path = downloaded_path(url)
        sha256 = SHA256.get(path.name, f"{_hash_prefix(path)}…")
        raise Unreachable(
            f"--model.weights=imagenet: {error}; put the file into {path.parent} yourself (sha256 {sha256}), or use "
            "--model.weights=bundled (resnet18 only), random or a path"
        ) from error
    return tensors_of(path, checked_bytes(path))


def bundled_state() -> dict[str, Tensor]:
    """The tensors of the bundled resnet18."""
    return safetensors.torch.load(checked_bytes(BUNDLED))


def state_in(weights: str) -> dict[str, Tensor]:
    """The tensors of a user's file."""
    path = in_either_form(Path(weights).expanduser())
    if not path.is_file() or path.suffix not in READERS:
        raise UserError(
            f"--model.weights={path}: not a .pth or .safetensors file; give one, or {', '.join(NAMED_WEIGHTS)}"
        )
    try:
        data = read_regular(path)
    except OSError as error:
        raise UserError(f"--model.weights={path}: cannot be read ({error.strerror})") from error
    return tensors_of(path, data)


def checked_bytes(path: Path) -> bytes:
    """The file's content, after its sha256 was checked: the bytes checked are the bytes loaded."""
    data = read_regular(path)
    expected = SHA256.get(path.name, _hash_prefix(path))
    if not hashlib.sha256(data).hexdigest().startswith(expected):
        raise UserError(f"{path}: is damaged or not the file it should be (sha256 differs); delete it and try again")
    return data


def _hash_prefix(path: Path) -> str:
    """The digits of the sha256 that torchvision writes into its file names."""
    return path.stem.rsplit("-", 1)[-1]


def _plain(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


READERS: dict[str, Callable[[bytes], Any]] = {
    ".safetensors": safetensors.torch.load,
    ".pth": _plain,
    ".pt": _plain,
    ".bin": _plain,
}


def tensors_of(path: Path, data: bytes) -> dict[str, Tensor]:
    """The state dict in a file's content; nothing in it is executed."""
    try:
        state = READERS[path.suffix](data)
    except Exception as error:  # whatever the file holds: zip, pickle and safetensors raise a dozen kinds
        raise UserError(
            f"--model.weights={path}: cannot be read as plain tensors; it is damaged, or not a state dict"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--model.weights={path}: is not a state dict (names to tensors); save model.state_dict()")
    return state


def fill(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Fills the whole net from a state dict, with or without the classifier's two tensors.

    Raises:
        UserError: the tensors are another architecture's; ``source`` is where they are from.
    """
    wanted = net.state_dict()
    # Files from before torch 0.4.1 lack these counters, which eval mode never reads.
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    state = counters | state
    missing = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    extra = [key for key in state if key not in wanted]
    if missing or len(extra) > 2:
        raise UserError(
            f"{source}: holds another architecture: {len(missing)} tensors missing or of another shape "
            f"({', '.join(missing[:2])}), {len(extra)} unknown ({', '.join(extra[:2])}); name its --model.backbone"
        )
    net.load_state_dict({key: state[key].to(value.dtype) for key, value in wanted.items()})
