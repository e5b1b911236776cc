"""From an image to the pixels that a backbone sees: preprocessing and augmentation."""

import hashlib
import math
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
Fit = Literal["crop", "pad", "squash"]

MAX_ASPECT = 20

_random = threading.Lock()


@dataclass
class Preprocessing:
    """What happens to an image before the backbone: resize, crop or pad to a square, normalise.

    ``bits`` is set once, when the training data or a checkpoint is read, for all that share the object.
    """

    resize_size: int = 256  # pixels: crop: the shorter side after resizing; pad: the longer; squash: both
    crop_size: int = 224  # pixels: the side of the square that the backbone sees, cut from the centre
    interpolation: str = "bilinear"  # a name of torchvision's ``InterpolationMode``, antialiased
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # per channel, of values in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # likewise
    bits: int | None = None  # bits of white in images of more than 8 bits; None: not known yet, 16 is assumed
    fit: Fit = "crop"

    @property
    def white(self) -> int:
        """The value that becomes 255 in images of more than 8 bits."""
        return int(2 ** (self.bits or 16)) - 1

    def adapted(self, image_size: int | None, fit: Fit | None) -> "Preprocessing":
        """For another input size, the resize in proportion, and another fit; pad and squash show the whole image."""
        size = image_size or self.crop_size
        resize = round(size * self.resize_size / self.crop_size)
        if fit in (None, self.fit):
            return replace(self, crop_size=size, resize_size=resize)
        return replace(self, crop_size=size, resize_size=resize if fit == "crop" else size, fit=fit)


def preprocess(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """Resizes an image and cuts or pads it to a square -> [3, H, W] uint8; the backbone itself normalises."""
    pixels: Tensor = functional.pil_to_tensor(_square(image, preprocessing))
    return pixels


def _square(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    crop, size, fit = preprocessing.crop_size, preprocessing.resize_size, preprocessing.fit
    if fit == "crop":
        image, sides = _bounded(image), [size]  # the shorter side
    elif fit == "pad":
        scale = size / max(image.size)
        sides = [max(1, round(side * scale)) for side in reversed(image.size)]
    else:
        sides = [size, size]
    image = functional.resize(image, sides, InterpolationMode(preprocessing.interpolation))
    gaps = [max(0, crop - side) for side in image.size]
    if any(gaps):
        edges = [*(gap // 2 for gap in gaps), *(math.ceil(gap / 2) for gap in gaps)]
        image = functional.pad(image, edges, [round(255 * value) for value in preprocessing.mean])
    square: Image.Image = functional.center_crop(image, [crop, crop])
    return square


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
    # Crops of a part; where the whole image is to be seen, of what the backbone sees of it.
    whole = _bounded(image) if preprocessing.fit == "crop" else _square(image, preprocessing)
    # torchvision draws from torch's global generator, which threads share.
    with _random, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pixels: Tensor = functional.pil_to_tensor(transform(whole))
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
