"""A heap: images of no class, with their features from the cache."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.data import folders
from headstart.data.module import ImageFolderData
from headstart.data.sources import FileSource
from headstart.data.splits import Item
from headstart.data.store import FeatureStore
from headstart.device import device_of
from headstart.errors import UserError
from headstart.files import read_csv
from headstart.model.backbone import BACKBONE_OPTIONS, FrozenBackbone
from headstart.model.classifier import TransferClassifier
from headstart.model.weights import for_data
from headstart.parser import OptionParser, add_accelerator, add_checkpoint, add_options
from headstart.terminal import say_all

STORE_OPTIONS = ("num_workers", "cache_dir", "feature_precision", "max_pixels")


class Heap(FileSource):
    """The images below a folder, or below several folders and files; then paths are as given."""

    def __init__(self, given: Sequence[str], option: str = "PATH") -> None:
        folder = folders.existing(given[0], option) if given[1:] == [] and not Path(given[0]).is_file() else None
        self.root = self.path = folder or Path.cwd()
        self.class_names, self._given = [], [folder] if folder else [Path(path) for path in given]

    def files(self) -> list[Path]:
        """The image files below the folders, and the files given; says what else is there."""
        others, found = Counter[str](), list[Path]()
        for path in self._given:
            found += folders.images(path, others) if path.is_dir() else [path]
        folders.say_left_out(others)
        return found

    def listed(self) -> list[Item]:
        return [Item(os.path.relpath(path, self.root) if path == self.root / path.name else str(path), 0) for path in self.files()]


def add_features(parser: OptionParser) -> None:
    """Adds the options of the backbone, and of the cache."""
    add_checkpoint(parser)
    add_options(parser, TransferClassifier, "model", BACKBONE_OPTIONS)
    add_options(parser, ImageFolderData, "data", STORE_OPTIONS)
    add_accelerator(parser)
