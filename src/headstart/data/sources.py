"""Sources of images: a folder of class folders, also in several domains, a list in a CSV file, a named dataset.

To add a kind of data, write a ``Source`` and a line in ``SOURCES``; every command then accepts it as ``--data.source``.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from headstart.data import folders
from headstart.data.splits import Item, Split, labels_of, refuse_torn_groups
from headstart.data.table import read_table
from headstart.decoding import measured
from headstart.errors import UserError
from headstart.features.hashes import ContentIndex, Measures
from headstart.images import Preprocessing
from headstart.terminal import images_bar, say, say_look_alikes


class Source(ABC):
    """Lists images with their classes, and reads them."""

    class_names: list[str]  # by label
    path: Path  # location of the data, which also names it
    options = ""  # which select it on the command line; set by ``open_source``
    has_val = False  # whether images without a split are never assigned to val
    has_test = False  # whether they are never assigned to test
    scanned: Sequence[Item] = ()  # all images, readable or not; set by ``scan``
    all_in: Split | None = None  # the split of all images; None: their own, or assigned
    multilabel = False  # whether an image may have several labels, or none
    measured: Measures = np.empty((0, 2))  # largest value and aspect ratio of each image; set by ``scan``

    @abstractmethod
    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        """The readable images, with content hashes, and the reason for each unreadable one, by path.

        ``remembered`` is a folder of stored hashes, reused for unchanged files; None: hash all files.
        """

    @abstractmethod
    def read(self, item: Item, preprocessing: Preprocessing, max_pixels: int) -> Image.Image:
        """Decodes an image to RGB, as ``decoding.decode``; raises ``UnreadableImage``."""

    def labels_of(self, items: Sequence[Item]) -> Tensor:
        """The labels of its images, as ``splits.labels_of``: [N], or [N, num_classes] if there may be several."""
        return labels_of(items, self.multilabel * len(self.class_names))


class FileSource(Source):
    """Images in files below a root."""

    root: Path
    group: re.Pattern[str] | None = None  # its first bracket in an image's path is the image's group

    @abstractmethod
    def listed(self) -> list[Item]:
        """The image files, without reading them; paths are relative to the root."""

    def in_folders(self, places: Mapping[Path, Callable[[str], Item]]) -> list[Item]:
        """The images below folders, each made by the folder's function from its path below the root."""
        found = folders.images_of_classes(list(places))
        start = len(os.path.join(self.root, ""))  # noqa: PTH118  # pathlib takes longer than the walk
        return [
            make(path[start:].replace(os.sep, "/"))
            for make, paths in zip(places.values(), found, strict=True)
            for path in paths
        ]

    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        listed = _grouped(self.listed(), self.group) if self.group else self.listed()
        with images_bar("scan", len(listed)) as advance:
            index = ContentIndex(self.root, remembered, measured)
            digests, unreadable = index.digests([item.path for item in listed], advance)
        self.measured = index.measured
        self.scanned = [item.with_digest(digest or b"") for item, digest in zip(listed, digests, strict=True)]
        return [item for item in self.scanned if item.digest], unreadable

    def read(self, item: Item, preprocessing: Preprocessing, max_pixels: int) -> Image.Image:
        return folders.read(self.root, item, preprocessing, max_pixels)


class FolderSource(FileSource):
    """A folder of class folders, or with folders ``train``, ``val`` and optionally ``test``."""

    def __init__(self, root: str) -> None:
        self.root = self.path = folders.existing(root)
        self._places = folders.of_splits(self.root)
        self.class_names = folders.class_names(self._places)
        self.has_test = "test" in self._places.values()

    def listed(self) -> list[Item]:
        places = {
            folder / name: partial(Item, label=label, split=split)
            for folder, split in self._places.items()
            for label, name in enumerate(self.class_names)
        }
        return self.in_folders(places)


class DomainSource(FileSource):
    """A folder of domains, such as photo and sketch, each a folder of class folders; a domain may lack classes."""

    def __init__(self, root: str) -> None:
        self.root = self.path = folders.existing(root)
        self._classes = {name: folders.subfolders(self.root / name) for name in folders.subfolders(self.root)}
        self.class_names = sorted({name for classes in self._classes.values() for name in classes})
        if len(self._classes) < 2 or len(self.class_names) < 2:
            raise UserError(
                f"--data.root={root}: {len(self._classes)} domain(s) with {len(self.class_names)} class(es), but 2 of "
                "each are needed; give a folder of domains, as in photo/cat/1.jpg and sketch/cat/1.jpg"
            )

    def listed(self) -> list[Item]:
        places = {
            self.root / domain / name: partial(Item, label=self.class_names.index(name), domain=domain)
            for domain, classes in self._classes.items()
            for name in classes
        }
        return self.in_folders(places)


class ListedSource(FileSource):
    """A given list of images, by their paths below the root."""

    def __init__(self, root: Path, class_names: list[str], items: list[Item], path: Path | None = None) -> None:
        self.root, self.path, self.class_names, self._items = root, path or root, class_names, items
        self.has_test = any(item.split == "test" for item in items)

    def renumber(self, class_names: Sequence[str]) -> None:
        """Numbers several labels as a head does that knows them all; the images need not have every one."""
        places = [class_names.index(name) for name in self.class_names]
        numbered = [tuple(sorted(places[label] for label in item.labels)) for item in self._items]
        self._items = [replace(item, tags=tags) for item, tags in zip(self._items, numbered, strict=True)]
        self.class_names = list(class_names)

    def listed(self) -> list[Item]:
        return list(self._items)


class TableSource(ListedSource):
    """A CSV file that lists images: path (relative to the file), label, and optionally split, group and domain."""

    def __init__(self, file: str, multilabel: bool | None = None) -> None:
        path = Path(file).expanduser().resolve()
        class_names, items = read_table(path, multilabel)
        super().__init__(path.parent, class_names, items, path)
        self.multilabel = items[0].tags is not None


def _grouped(items: list[Item], pattern: re.Pattern[str]) -> list[Item]:
    """Gives each image without a group the one that its path names, in the pattern's first bracket."""
    found = {item.path: match[1] or "" for item in items if (match := pattern.search(item.path))}
    items = [replace(item, group=item.group or found.get(item.path, "")) for item in items]
    alone = sum(not item.group for item in items)
    if alone == len(items):
        raise UserError(f"--data.group={pattern.pattern}: matches no path, such as {items[0].path if items else ''}")
    refuse_torn_groups(items, f"--data.group={pattern.pattern}")
    groups = len({item.group for item in items if item.group})
    say(f"data: {groups} groups of images by their paths" + (f"; {alone} images are in none" if alone else ""))
    return items


def _pattern(group: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise UserError(f"--data.group={group}: is not a valid regular expression ({error})") from error
    if not pattern.groups:
        raise UserError(f"--data.group={group}: put what names the group in brackets, as in '(\\d+)_'")
    return pattern


def _named(module: str) -> Callable[[str], Any]:
    """Opens data with the function ``source`` of a module that imports this one."""
    return lambda root: import_module(f"headstart.data.{module}").source(root)


# By value of --data.source; called with --data.root, a list of images also with --data.multilabel if it is given.
SOURCES: dict[str, Callable[..., Source]] = {
    "folder": FolderSource,
    "csv": TableSource,
    "domains": DomainSource,
    "torchvision": _named("torchvision"),
    "hf": _named("huggingface"),
}


def open_source(
    root: str | None = None,
    csv: str | None = None,
    source: str | None = None,
    group: str | None = None,
    multilabel: bool | None = None,
) -> Source:
    """The source given by the options; ``csv`` is short for source=csv with that root."""
    if (root is None) == (csv is None):
        raise UserError("give either --data.root, a folder of class folders, or --data.csv, a list of images")
    if csv is not None and source not in (None, "csv"):
        raise UserError(f"--data.csv={csv}: conflicts with --data.source={source}; give it as --data.root")
    kind = source or ("folder" if csv is None else "csv")
    if kind not in SOURCES:
        raise UserError(f"--data.source={kind}: no such kind of data; choose from {', '.join(SOURCES)}")
    place = str(root if csv is None else csv)
    if multilabel is not None and kind != "csv":
        raise UserError(f"--data.multilabel={str(multilabel).lower()}: is for a list of images, --data.csv")
    found = SOURCES[kind](place) if multilabel is None else SOURCES[kind](place, multilabel=multilabel)
    chosen = "" if kind in ("folder", "csv") else f" --data.source={kind}"
    chosen += "" if multilabel is None else f" --data.multilabel={str(multilabel).lower()}"
    found.options = f"--data.{'csv' if kind == 'csv' else 'root'}={found.path}{chosen}"
    if group is not None:
        if not isinstance(found, FileSource):
            raise UserError(f"--data.group={group}: is for paths of files, which --data.source={kind} does not have")
        found.group = _pattern(group)
    say_look_alikes(found.class_names)
    return found


WHERE = ("root", "csv", "source", "multilabel")  # the options that choose images, without those that only split them


def chosen_source(options: Any) -> Source:
    """The source that the ``WHERE`` among a command's options, or a run's, give."""
    return open_source(**{name: options.get(name) for name in WHERE})
