"""From a decoded image to the pixels that a backbone sees: preprocessing and augmentation."""

import hashlib
import threading
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from headstart.terminal import say_once

Augment = Literal["none", "light", "strong"]

MAX_ASPECT = 20

_random = threading.Lock()


@dataclass
class Preprocessing:
    """What happens to an image before the backbone: resize the shorter side, crop the centre, normalise.

    ``bits`` is set once, when the training data or a checkpoint are seen, for all that share the object.
    """

    resize_size: int = 256  # the shorter side after resizing, in pixels
    crop_size: int = 224  # the side of the centre crop, in pixels
    interpolation: str = "bilinear"  # a name of torchvision's ``InterpolationMode``, antialiased
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # per channel, of values in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # likewise
    bits: int | None = None  # how many white has in images of more than 8 bits; None: not seen yet, as 16

    @property
    def white(self) -> int:
        """The value that becomes 255 in images of more than 8 bits."""
        return int(2 ** (self.bits or 16)) - 1

    def resized(self, image_size: int) -> "Preprocessing":
        """The same with another crop size, the resize in proportion."""
        return replace(self, crop_size=image_size, resize_size=round(image_size * self.resize_size / self.crop_size))


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Resizes the shorter side and crops the centre -> [3, H, W] uint8; the backbone itself normalises."""
    size, crop = preprocessing.resize_size, preprocessing.crop_size
    resized = functional.resize(_bounded(image), [size], InterpolationMode(preprocessing.interpolation))
    pixels: Tensor = functional.pil_to_tensor(functional.center_crop(resized, [crop, crop]))
    return pixels


def _bounded(image: Image.Image) -> Image.Image:
    """The centre of a very long image, so that resizing its shorter side cannot fill the memory."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) <= longest:
        return image
    say_once(f"data: images longer than {MAX_ASPECT} times their width are cut to their centre")
    centre: Image.Image = functional.center_crop(image, [min(height, longest), min(width, longest)])
    return centre


def augment(image: Image.Image, policy: Augment, preprocessing: Preprocessing, seed: int, flip: bool = True) -> Tensor:
    """A random view of the image -> [3, H, W] uint8; the same seed gives the same view."""
    transform = _policy(policy, preprocessing, flip)
    # torchvision draws from torch's global generator, which threads share.
    with _random, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pixels: Tensor = functional.pil_to_tensor(transform(_bounded(image)))
        return pixels


def _policy(policy: Augment, preprocessing: Preprocessing, flip: bool) -> v2.Transform:
    interpolation = InterpolationMode(preprocessing.interpolation)
    smallest = {"none": 1.0, "light": 0.6, "strong": 0.3}[policy]
    crop = v2.RandomResizedCrop(preprocessing.crop_size, scale=(smallest, 1.0), interpolation=interpolation)
    steps: list[v2.Transform] = [crop, v2.RandomHorizontalFlip()] if flip else [crop]
    if policy == "strong":
        steps.append(v2.TrivialAugmentWide(interpolation=interpolation))
    return v2.Compose(steps)


@dataclass(frozen=True)
class Views:
    """How training images vary; view 0 of an image is the image itself."""

    policy: Augment | Literal["mirrored"] = "none"
    seed: int = 0
    flip: bool = True  # whether half of the views are mirrored

    def view(self, image: Image.Image, digest: bytes, number: int, preprocessing: Preprocessing) -> Tensor:
        """The view of that number -> [3, H, W] uint8: a function of the content, whose sha256 is ``digest``."""
        if number == 0 or self.policy == "none":
            return preprocess(image, preprocessing)
        if self.policy == "mirrored":
            return preprocess(image, preprocessing).flip(-1)
        content = hashlib.sha256(b"%d %d " % (self.seed, number) + digest).digest()
        return augment(image, self.policy, preprocessing, int.from_bytes(content[:8], "big", signed=True), self.flip)
