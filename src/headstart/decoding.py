"""Decodes image files of any format, depth, orientation and transparency to RGB."""

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

# Part of the cache key: increase it when the same bytes decode to different pixels.
DECODER_VERSION = 2  # 2: float TIFFs, images of more than 8 bits scaled per data set
MIN_SIDE = 8
MAX_PIXELS = 89_478_485  # PIL's default limit against decompression bombs

# Formats that PIL may open: they start no program (EPS starts Ghostscript) and read no other file.
FORMATS = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "MSP", "PCX", "PNG", "PPM", "QOI"),
    *("HEIF", "SGI", "TIFF", "WEBP", "XBM", "XPM", "TGA"),  # TGA last: its files have no signature
)

Measured = tuple[int, float]
Picture = str | Path | Image.Image | np.ndarray  # accepted by ``as_rgb``


class UnreadableImage(UserError):
    """An image is skipped; the message is a short reason."""


@cache
def _formats() -> tuple[str, ...]:
    """The formats that the installed PIL supports, with what the extra ``heif`` adds."""
    Image.init()
    heif_version()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def heif_version() -> str | None:
    """The version of what reads HEIC files for PIL, which is made ready; None: it is not installed."""
    try:
        import pi_heif
    except ImportError:
        return None
    pi_heif.register_heif_opener()
    return str(pi_heif.__version__)


@cache
def image_suffixes() -> frozenset[str]:
    """The file suffixes that are treated as images."""
    formats = _formats()  # first, since it may register more
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def decode(data: bytes, preprocessing: Preprocessing, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes the content of an image file to RGB, as ``to_rgb``.

    Of an animation, the first frame. A JPEG is decoded at a reduced scale that keeps at least ``resize_size`` pixels.

    Raises:
        UnreadableImage: not an image, damaged, too small, or more than ``max_pixels`` pixels.
    """
    with _reasons(max_pixels):
        image = _opened(data, max_pixels)
        if getattr(image, "is_animated", False):
            say_once("data: only the first frame of animations is used")
        size = preprocessing.resize_size
        image.draft(None, (size, size))  # None keeps the mode
        return to_rgb(image, preprocessing)


def as_rgb(picture: Picture, preprocessing: Preprocessing) -> Image.Image:
    """Converts a path, a PIL image or an array [H, W, 3] of uint8 to RGB, with the same pixels as in training.

    Raises:
        UserError: another type, or the file cannot be read.
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
    raise UserError(f"an image must be a path, a PIL image or a uint8 array [H, W, 3], not {found}")


def decode_opened(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Converts a PIL image to RGB; one that is not loaded yet is decoded from its file, as by ``decode``."""
    with _reasons():
        if not (isinstance(image, JpegImageFile) and image.tile and image.fp and not image.tell()):
            return to_rgb(image, preprocessing)
        place = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()  # reopened: the reduced scale would change the caller's image
        image.fp.seek(place)
        return decode(data, preprocessing)


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    """Opens an image from a file's content; reads only the header."""
    if Image.MAX_IMAGE_PIXELS is not None:  # PIL's own limit holds for the whole process, so it is only ever raised
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)
    if not data:
        raise UnreadableImage("empty file")
    image = Image.open(io.BytesIO(data), formats=_formats())
    width, height = image.size
    if width * height > max_pixels:
        raise UnreadableImage(f"{width} x {height} pixels, more than --data.max_pixels={max_pixels}")
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(f"{width} x {height} pixels, smaller than {MIN_SIDE} per side")
    return image


@contextmanager
def _reasons(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Converts any exception of PIL to ``UnreadableImage``, except transient errors."""
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


def measured(data: bytes) -> Measured:
    """As ``measured_of``, given the content of an image file; (0, 1.0) if it is damaged.

    It gives the scale and the shape of a data set before anything is computed.
    """
    with suppress(UnreadableImage), _reasons():
        return measured_of(_opened(data, MAX_PIXELS))
    return 0, 1.0


def measured_of(image: Image.Image) -> Measured:
    """The largest value if the image has more than 8 bits, else 0; and its longer side divided by its shorter one."""
    with _reasons():
        largest = max(0, int(np.asarray(image).max())) if image.mode.startswith("I") else 0
        return largest, max(image.size) / min(image.size)


def bits_of(largest: int) -> int:
    """The bit depth of a data set with this largest value: 8, 10, 12, …; 16 without images of more than 8 bits."""
    bits = largest.bit_length()
    return max(8, bits + bits % 2) if largest else 16


def content_digest(image: Image.Image) -> bytes:
    """sha256 of the decoded pixels of a PIL image, after palette, transparency and orientation."""
    with _reasons():
        upright = ImageOps.exif_transpose(image)
        seen = upright if upright.mode[0] in "IF" else to_rgb(upright, Preprocessing())  # not scaled yet
        return hashlib.sha256(f"{seen.mode} {seen.size} ".encode() + seen.tobytes()).digest()


def to_rgb(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Converts any mode to RGB; applies the EXIF orientation and composites transparency on white.

    Values of more than 8 bits are scaled from [0, ``white``] to 8 bits, floating-point values from [0, 1].
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
        say_once(f"data: values above {white}, the maximum of the training data's scale, become white")
    return Image.fromarray((values.clip(0, white) * 255 // white).astype(np.uint8))
