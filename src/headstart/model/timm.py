"""timm's networks as a family: https://github.com/huggingface/pytorch-image-models."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headstart.errors import UserError
from headstart.files import read_regular
from headstart.images import Fit, Preprocessing
from headstart.model.families import Family, Network, unknown
from headstart.model.weights import Unreachable, official_state, offline, state_in, tensors_of
from headstart.terminal import say_once

FITS: dict[str, Fit] = {"center": "crop", "border": "pad", "squash": "squash"}  # by timm's name
REFERENCE_SIZE = 224  # pixels; what a larger default input is compared with
# What timm's own loader looks for in a repository, the safer first.
FILES = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin")


class Timm(Family):
    """``timm/NAME``, or ``timm/NAME.TAG`` for certain weights; needs the extra ``timm``."""

    def owns(self, name: str) -> bool:
        return name.startswith("timm/")

    def names(self) -> list[str]:
        timm = _timm("timm/…")
        return [f"timm/{name}" for name in {*timm.list_models(), *timm.list_models(pretrained=True)}]

    def resolved(self, name: str, weights: str) -> str:
        """``pretrained`` becomes pretrained@REVISION, so that the same file can be fetched again."""
        if weights in ("bundled", "imagenet"):
            raise UserError(f"--model.weights={weights}: is not for {name}; use pretrained, random or a path")
        if weights in ("auto", "pretrained"):
            config = self._config(name)
            return f"pretrained@{_fetched(config, None).parent.name}" if config.get("hf_hub_id") else "pretrained"
        return weights if weights.startswith("pretrained@") else super().resolved(name, weights)

    def make(self, name: str, weights: str, image_size: int | None) -> Network:
        timm, config = _timm(name), self._config(name)
        with _reasons(name), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # what `random` means
            net: nn.Module = timm.create_model(_architecture(name), num_classes=0, **_sized(config, image_size))
        classifier = config.get("classifier")
        classifier = classifier if isinstance(classifier, str) else None  # some have two, or none
        if weights != "random":
            net = _filled(net, name, weights, image_size, config)
        preprocessing = _preprocessing(timm.data.resolve_model_data_config(net), name, image_size)
        if image_size is None and config["fixed_input_size"] and preprocessing.crop_size > REFERENCE_SIZE:
            times = (preprocessing.crop_size / REFERENCE_SIZE) ** 2
            say_once(
                f"weights:  {name} sees {preprocessing.crop_size} pixels, {times:.1f} times the work of "
                f"{REFERENCE_SIZE}; --model.image_size={REFERENCE_SIZE} works too"
            )
        return Network(net, classifier, preprocessing, config.get("license"), {"timm": timm.__version__})

    def whole(self, name: str, image_size: int, classifier: str, head: nn.Linear) -> nn.Module:
        options = _sized(self._config(name), image_size)
        net: nn.Module = _timm(name).create_model(_architecture(name), num_classes=head.out_features, **options)
        return net

    def _config(self, name: str) -> dict[str, Any]:
        """What timm knows of an entry: repository, licence, input; the default one where the name has no tag."""
        timm = _timm(name)
        architecture, _, tag = _architecture(name).partition(".")
        if not timm.is_model(architecture) or (tag and not timm.models.is_model_pretrained(_architecture(name))):
            raise unknown(name, self.names())
        config: dict[str, Any] = timm.get_pretrained_cfg(_architecture(name)).to_dict(remove_source=False)
        return config


def _timm(name: str) -> Any:
    """The library, imported when one of its networks is used."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"--model.backbone={name}: needs timm: pip install -e '.[timm]'") from error
    return timm


def _filled(net: nn.Module, name: str, weights: str, image_size: int | None, config: dict[str, Any]) -> Any:
    """The network with its weights: as they are where they fit, else as timm converts them."""
    state = _state(name, weights, config)
    own = {key: value.shape for key, value in net.state_dict().items()}
    features = {key: value for key, value in state.items() if not key.startswith(f"{config.get('classifier')}.")}
    if {key: value.shape for key, value in features.items()} == own:
        net.load_state_dict(features)
        return net
    try:
        net = _timm(name).create_model(
            _architecture(name),
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "custom_load": False, "source": ""},
            **_sized(config, image_size),
        )
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--model.weights={weights}: does not fit {name} ({reason}); name its --model.backbone"
        ) from error
    net.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator, union-attr]
    net.reset_classifier(0)  # type: ignore[operator]
    return net


def _architecture(name: str) -> str:
    return name.removeprefix("timm/")


def _sized(config: dict[str, Any], image_size: int | None) -> dict[str, int]:
    """How a network that is built for one size of input is built for another; the others take any."""
    return {"img_size": image_size} if image_size and config["fixed_input_size"] else {}


@contextmanager
def _reasons(name: str) -> Iterator[None]:
    """What timm raises at an input size that it cannot build, as one line."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"--model.backbone={name}: timm cannot build it ({' '.join(str(error).split())})") from error


def _preprocessing(config: dict[str, Any], name: str, image_size: int | None) -> Preprocessing:
    """timm's own, as its ``create_transform`` for evaluation."""
    channels, height, width = config["input_size"]
    if channels != 3 or height != width:
        raise UserError(f"--model.backbone={name}: takes {channels} x {height} x {width}; only 3 x N x N is supported")
    size, interpolation = image_size or height, config["interpolation"]
    return Preprocessing(
        resize_size=math.floor(size / config["crop_pct"]),
        crop_size=size,
        interpolation="bilinear" if interpolation == "random" else interpolation,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        fit=FITS[config["crop_mode"]],
    )


def _state(name: str, weights: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of resolved weights."""
    named, _, revision = weights.partition("@")
    if named != "pretrained":
        return state_in(weights)
    if config.get("custom_load"):
        raise UserError(f"--model.backbone={name}: its weights are in a form of their own; choose another entry")
    if config.get("hf_hub_id"):
        path = _fetched(config, revision)
        return tensors_of(path, read_regular(path.resolve()))
    if not config.get("url"):
        raise UserError(f"--model.weights=pretrained: there are none for {name}; use random or a path")
    return official_state(config["url"])


def _fetched(config: dict[str, Any], revision: str | None) -> Path:
    """The file of weights in the hub's own cache; downloaded by huggingface_hub if it is not there."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository: str = config["hf_hub_id"]
    for file in FILES:
        try:
            return Path(hf_hub_download(repository, file, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    reason = "the environment forbids the network"
    for file in () if offline() else FILES:
        try:
            path = Path(hf_hub_download(repository, file, revision=revision))
        except LocalEntryNotFoundError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:200]
            break
        except EntryNotFoundError:
            continue
        except Exception as error:  # the hub's, httpx's and the disk's
            reason = " ".join(str(error).split())[:200]
            break
        say_once(f"weights:  {repository}, licence {config.get('license') or 'not stated; see its page'}")
        return path
    wanted = f"{repository}@{revision}" if revision else repository
    raise Unreachable(
        f"--model.weights=pretrained: {FILES[0]} of {wanted} is not in {constants.HF_HUB_CACHE} and could not be "
        f"downloaded ({reason}); download it there with another computer's huggingface_hub, or use random or a path"
    )
