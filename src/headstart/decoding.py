"""From the content of a file to an RGB image, whatever its format, depth, orientation and transparency."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from headstart.errors import UserError
from headstart.files import may_pass, read_regular
from headstart.images import Preprocessing
from headstart.terminal import say_once

# Part of the cache's key: raise it when the same bytes would give other pixels.
DECODER_VERSION = 2  # 2: float TIFFs, images of more than 8 bits by the data set's own scale
MIN_SIDE = 8
MAX_PIXELS = 89_478_485  # PIL's own limit against decompression bombs

# What PIL may open: formats that start no program (EPS starts Ghostscript) and read no other file.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "MSP", "PCX", "PNG", "PPM", "QOI"),
    *("SGI", "TIFF", "WEBP", "XBM", "XPM", "TGA"),  # TGA last: its files do not say what they are
)

Picture = str | Path | Image.Image | np.ndarray  # what ``as_rgb`` takes


class UnreadableImage(UserError):
    """An image that is left out; the message is the reason, in a few words."""


@cache
def _formats() -> tuple[str, ...]:
    """Those that this PIL was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def image_suffixes() -> frozenset[str]:
    """The suffixes of files that are taken for images."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


def decode(data: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the content of an image file in full, to RGB, as ``to_rgb``.

    An animation gives its first frame. A JPEG is decoded at a reduced scale where that leaves ``resize_size`` pixels.

    Raises:
        UnreadableImage: it is no image, damaged, too small, or of more than ``max_pixels`` pixels.
    """
    with _reasons(max_pixels):
        image = _opened(data, max_pixels)
        if getattr(image, "is_animated", False):
            say_once("data: of animations the first frame is taken")
        size = preprocessing.resize_size
        image.draft(None, (size, size))  # None keeps the mode
        return to_rgb(image, preprocessing)


def as_rgb(picture: Picture, preprocessing: Preprocessing) -> Image.Image:
    """A file, a PIL image or an array [H, W, 3] of uint8 as RGB, with the pixels that its file gives in training.

    Raises:
        UserError: it is none of these, or its file cannot be read.
    """
    if isinstance(picture, str | Path):
        try:
            return decode(read_regular(Path(picture)), preprocessing)
        except (OSError, UnreadableImage) as error:
            raise UserError(f"{picture}: {getattr(error, 'strerror', None) or error}") from error
    if isinstance(picture, Image.Image):
        return decode_opened(picture, preprocessing)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        return Image.fromarray(picture)
    found = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise UserError(f"an image is a path, a PIL image or a uint8 array [H, W, 3], not {found}")


def decode_opened(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """A PIL image to RGB: what ``decode`` makes of its file, where it was not loaded from there yet."""
    with _reasons():
        if not (isinstance(image, JpegImageFile) and image.tile and image.fp and not image.tell()):
            return to_rgb(image, preprocessing)
        place = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()  # opened again, since the reduced scale would stay with the caller's image
        image.fp.seek(place)
        return decode(data, preprocessing)


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """The image in a file's content, of which no more than the header is read."""
    Image.MAX_IMAGE_PIXELS = max_pixels  # PIL's own guard, at opening
    if not data:
        raise UnreadableImage("empty file")
    image = Image.open(io.BytesIO(data), formats=_formats())
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than --data.max_pixels={max_pixels}")
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(f"{width} x {height} pixels, smaller than {MIN_SIDE} a side")
    return image


@contextmanager
def _reasons(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Whatever PIL raises as ``UnreadableImage``, unless it is no property of the image."""
    try:
        yield
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"more pixels than --data.max_pixels={max_pixels}") from error
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, struct.error and more
        if may_pass(error):
            raise
        raise UnreadableImage(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def peak(data: bytes) -> int:
    """The largest value in the content of an image file of more than 8 bits; 0 for any other, or where it is damaged.

    So the scale of a data set is known before anything is computed.
    """
    with suppress(UnreadableImage), _reasons():
        return peak_of(_opened(data, MAX_PIXELS))
    return 0


def peak_of(image: Image.Image) -> int:
    """As ``peak``, of a PIL image; ``UnreadableImage`` where it is damaged."""
    with _reasons():
        return max(0, int(np.asarray(image).max())) if image.mode.startswith("I") else 0


def bits_of(largest: int) -> int:
    """The bits of a data set with that largest value: 8, 10, 12, and so on; 16 where it has no such images."""
    bits = largest.bit_length()
    return max(8, bits + bits % 2) if largest else 16


def content_digest(image: Image.Image) -> bytes:
    """sha256 of a PIL image: of the pixels that are decoded, whatever the palette, transparency and orientation."""
    with _reasons():
        upright = ImageOps.exif_transpose(image)
        seen = upright if upright.mode[0] in "IF" else to_rgb(upright, Preprocessing())  # their scale is not known yet
        return hashlib.sha256(f"{seen.mode} {seen.size} ".encode() + seen.tobytes()).digest()


def to_rgb(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Any mode and orientation to RGB: EXIF's orientation is applied, and transparency laid on white.

    Values of more than 8 bits, up to ``white``, are scaled to 8 bits, and so are floating-point values in [0, 1].
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # which PIL would clip to white
        image = _scaled(np.asarray(image, dtype=np.int64), preprocessing.white)
    elif image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):
            found = f"from {low:g} to {high:g}" if np.isfinite(values).all() else "that are not finite"
            raise UnreadableImage(f"floating-point values {found}; scale them to [0, 1]")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _scaled(values: np.ndarray, white: int) -> Image.Image:
    if values.max() > white:
        say_once(f"data: values above {white}, the largest that the training data may have, become white")
    return Image.fromarray((values.clip(0, white) * 255 // white).astype(np.uint8))
