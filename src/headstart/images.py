"""From the bytes of a file to the pixels that a backbone sees: decoding, preprocessing, augmentation."""

import hashlib
import io
import threading
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from headstart.errors import UserError
from headstart.files import read_regular
from headstart.terminal import say_once

Augment = Literal["none", "light", "strong"]

# Part of the cache's key: raise it when the same bytes would give other pixels.
DECODER_VERSION = 1
MIN_SIDE = 8
MAX_ASPECT = 20
MAX_PIXELS = 89_478_485  # PIL's own limit against decompression bombs

# What PIL may open: formats that start no program (EPS starts Ghostscript) and read no other file.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "MSP", "PCX", "PNG", "PPM", "QOI"),
    *("SGI", "TIFF", "WEBP", "XBM", "XPM", "TGA"),  # TGA last: its files do not say what they are
)

Picture = str | Path | Image.Image | np.ndarray  # what ``as_rgb`` takes

_random = threading.Lock()


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before the backbone: resize the shorter side, crop the centre, normalise."""

    resize_size: int = 256  # the shorter side after resizing, in pixels
    crop_size: int = 224  # the side of the centre crop, in pixels
    interpolation: str = "bilinear"  # a name of torchvision's ``InterpolationMode``, antialiased
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # per channel, of values in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)  # likewise

    def resized(self, image_size: int) -> "Preprocessing":
        """The same with another crop size, the resize in proportion."""
        return replace(self, crop_size=image_size, resize_size=round(image_size * self.resize_size / self.crop_size))


class UnreadableImage(Exception):
    """An image that is left out; the message is the reason, in a few words."""


@cache
def _formats() -> tuple[str, ...]:
    """Those that this PIL was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def image_suffixes() -> frozenset[str]:
    """The suffixes of files that are taken for images."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


def decode(data: bytes, shorter_side: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes an image of any mode and orientation in full, to RGB.

    Transparency is laid on white, 16 bits are scaled to 8, the EXIF orientation is applied, and an animation gives
    its first frame. A JPEG is decoded at a reduced scale where that still leaves ``shorter_side`` pixels.

    Raises:
        UnreadableImage: it is no image, damaged, too small, or of more than ``max_pixels`` pixels.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels  # PIL's own guard, at opening
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        width, height = image.size
        if width * height > max_pixels:
            raise UnreadableImage(f"{width} x {height} pixels, more than --data.max_pixels={max_pixels}")
        if min(width, height) < MIN_SIDE:
            raise UnreadableImage(f"{width} x {height} pixels, smaller than {MIN_SIDE} a side")
        if getattr(image, "is_animated", False):
            say_once("data: of animations the first frame is taken")
        image.draft(None, (shorter_side, shorter_side))  # None keeps the mode
        image.load()
        return to_rgb(image)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("empty file" if not data else "not an image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"more pixels than --data.max_pixels={max_pixels}") from error
    except MemoryError as error:  # says nothing of the image
        raise UserError(f"{width} x {height} pixels: too little memory; lower --data.num_workers") from error
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, struct.error and more
        raise UnreadableImage(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def as_rgb(picture: Picture, shorter_side: int) -> Image.Image:
    """A file, a PIL image or an array [H, W, 3] of uint8 as RGB, with the pixels that its file gives in training.

    Raises:
        UserError: it is none of these, or its file cannot be read.
    """
    if isinstance(picture, str | Path):
        try:
            return decode(read_regular(Path(picture)), shorter_side)
        except (OSError, UnreadableImage) as error:
            raise UserError(f"{picture}: {getattr(error, 'strerror', None) or error}") from error
    if isinstance(picture, Image.Image):
        if isinstance(picture, JpegImageFile) and picture.tile and picture.fp:  # not decoded yet: at a reduced scale
            picture.fp.seek(0)
            twin = Image.open(picture.fp, formats=_formats())  # the given image stays as it is
            twin.draft(None, (shorter_side, shorter_side))
            return to_rgb(twin)
        return to_rgb(picture)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        return Image.fromarray(picture)
    found = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise UserError(f"an image is a path, a PIL image or a uint8 array [H, W, 3], not {found}")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode and orientation to upright RGB: 16 bits and floats scaled to 8 bits, transparency on white.

    Raises:
        UnreadableImage: floating-point values that are not in [0, 1].
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # NaN fails both
            raise UnreadableImage("floating-point values that are not in [0, 1]")
        say_once("data: floating-point images are scaled from [0, 1] to 8 bits")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip to white
        say_once("data: images of 16 bits are scaled down to 8")
        scaled = np.asarray(image, dtype=np.uint32) // 257
        image = Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


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

    policy: Augment = "none"
    seed: int = 0
    flip: bool = True  # whether left and right may be exchanged

    def view(self, image: Image.Image, digest: bytes, number: int, preprocessing: Preprocessing) -> Tensor:
        """The view of that number -> [3, H, W] uint8: a function of the content, whose sha256 is ``digest``."""
        if number == 0 or self.policy == "none":
            return preprocess(image, preprocessing)
        content = hashlib.sha256(b"%d %d " % (self.seed, number) + digest).digest()
        return augment(image, self.policy, preprocessing, int.from_bytes(content[:8], "big", signed=True), self.flip)
