"""Features of a stream of files, in constant memory."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from headstart.decoding import MAX_PIXELS, UnreadableImage, decode
from headstart.features.arithmetic import Arithmetic
from headstart.features.extract import Computed, Extractor
from headstart.features.hashes import cache_folder
from headstart.features.int8 import network_of
from headstart.files import Unavailable, patiently, read_regular
from headstart.images import preprocess
from headstart.model.backbone import FrozenBackbone


class FileStream:
    """Computes the features of files, in order, in batches of 32.

    They are bitwise identical to the cached ones: the same decoder, arithmetic and batch size.
    """

    def __init__(
        self,
        backbone: FrozenBackbone,
        device: torch.device,
        arithmetic: Arithmetic,
        workers: int = 2,
        max_pixels: int = MAX_PIXELS,
        cache_dir: Path | None = None,
    ) -> None:
        self._preprocessing, self._max_pixels = backbone.preprocessing, max_pixels
        self.network = network_of(backbone, arithmetic, device, cache_dir or cache_folder())
        self._extractor = Extractor(self.network, self._read, device, workers)

    def __call__(self, paths: Iterable[str]) -> Iterator[Computed]:
        """The features of files; a key is the path as bytes (``os.fsencode``)."""
        return self._extractor(os.fsencode(path) for path in paths)

    def image(self, path: str) -> Image.Image:
        """Decodes a file to RGB; raises ``UnreadableImage`` if it cannot be read."""
        file = Path(path)
        try:
            return patiently(file, lambda: decode(read_regular(file), self._preprocessing, self._max_pixels))
        except OSError as error:
            raise UnreadableImage(f"{error.strerror or error}".lower()) from error
        except Unavailable as error:  # reported in the file's row; nothing is cached
            raise UnreadableImage(str(error)) from error

    def pixels(self, path: str) -> Tensor:
        """The preprocessed pixels of a file, [3, H, W] uint8."""
        return preprocess(self.image(path), self._preprocessing)

    def _read(self, key: bytes) -> Tensor:
        return self.pixels(os.fsdecode(key))
