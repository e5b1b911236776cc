"""Where images come from: a folder of class folders, a list in a CSV file, or a dataset.

Another kind of data is a ``Source`` and a line in ``SOURCES``; every verb then takes it as ``--data.source``.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from headstart.data import folders
from headstart.data.splits import Item, Split
from headstart.data.table import read_table
from headstart.errors import UserError
from headstart.features.hashes import ContentIndex
from headstart.images import to_rgb
from headstart.terminal import images_bar


class Source(ABC):
    """Which images there are, of which class, and how one is read.

    Attributes:
        class_names: by label.
        path: what the data is called by, and where it is.
        has_val: whether no image that it gives without a split should validate.
        has_test: whether none should test.
    """

    class_names: list[str]
    path: Path
    has_val = False
    has_test = False

    @abstractmethod
    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        """The images with the hash of their content, and the reason for each that cannot be read, by path.

        Args:
            remembered: a folder for the hashes of files that did not change; None: all are hashed.
        """

    @abstractmethod
    def read(self, item: Item, shorter_side: int, max_pixels: int) -> Image.Image:
        """Decodes an image to RGB.

        Raises:
            UnreadableImage: it cannot be used; the message is the reason.
        """


class FileSource(Source):
    """Images in files below a root.

    Attributes:
        root: the folder.
        label_of: the label of each image by its path, readable or not, once they are scanned.
    """

    root: Path
    label_of: dict[str, int]

    @abstractmethod
    def listed(self) -> list[Item]:
        """The image files, not yet read; paths are relative to the root."""

    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        """Hashes the files that changed."""
        listed = self.listed()
        self.label_of = {item.path: item.label for item in listed}
        with images_bar("scan", len(listed)) as advance:
            digests, unreadable = ContentIndex(self.root, remembered).digests([item.path for item in listed], advance)
        return [replace(item, digest=digests[item.path]) for item in listed if item.path in digests], unreadable

    def read(self, item: Item, shorter_side: int, max_pixels: int) -> Image.Image:
        """From the file, which must still be the one that was scanned."""
        return folders.read(self.root, item, shorter_side, max_pixels)


class FolderSource(FileSource):
    """A folder of class folders; or one that holds ``train``, ``val`` and maybe ``test``, used so.

    Args:
        root: the folder.

    Raises:
        UserError: it is neither; the message says what is missing.
    """

    def __init__(self, root: str) -> None:
        self.root = self.path = folders.existing(root)
        self._places = folders.of_splits(self.root)
        self.class_names = folders.class_names(self._places)
        self.has_test = "test" in self._places.values()

    def listed(self) -> list[Item]:
        """The images of each class in each split."""
        places = [
            (folder / name, label, split)
            for folder, split in self._places.items()
            for label, name in enumerate(self.class_names)
        ]
        found = folders.images_of_classes([folder for folder, _, _ in places])
        return [
            Item(path.relative_to(self.root).as_posix(), label, split=split)
            for (_, label, split), paths in zip(places, found, strict=True)
            for path in paths
        ]


class TableSource(FileSource):
    """A CSV file that lists images: path (relative to the file), label, and maybe split and group.

    Args:
        file: the file.

    Raises:
        UserError: it cannot be used; the message names the line.
    """

    def __init__(self, file: str) -> None:
        self.path = Path(file).expanduser().resolve()
        self.root = self.path.parent
        self.class_names, self._items = read_table(self.path)
        self.has_test = any(item.split == "test" for item in self._items)

    def listed(self) -> list[Item]:
        """The images of the list."""
        return list(self._items)


class DatasetSource(Source):
    """Datasets of (PIL image, label) pairs.

    Args:
        datasets: by name, with the split that each says; None: to be split.
        class_names: by label; None: the first dataset's own ``classes``.

    Raises:
        UserError: there are no class names.
    """

    def __init__(
        self, datasets: dict[str, tuple[Dataset[Any], Split | None]], class_names: Sequence[str] | None
    ) -> None:
        self._datasets = datasets
        names = class_names or getattr(datasets["train"][0], "classes", None)
        if names is None:
            raise UserError("DatasetData: give class_names, since the dataset has no `classes`")
        self.class_names, self.path = list(names), Path("dataset")
        self.has_val, self.has_test = "val" in datasets, "test" in datasets

    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        """Decodes all; an image's content is its pixels."""
        samples = [
            (name, index, split)
            for name, (dataset, split) in self._datasets.items()
            for index in range(len(dataset))  # type: ignore[arg-type]
        ]
        with images_bar("scan", len(samples)) as advance:
            return [self._item(*sample, advance) for sample in samples], {}

    def read(self, item: Item, shorter_side: int, max_pixels: int) -> Image.Image:
        """From the dataset."""
        name, index = item.path.split("/")
        return to_rgb(self._datasets[name][0][int(index)][0])

    def _item(self, name: str, index: int, split: Split | None, advance: Callable[[int], None]) -> Item:
        image, label = self._datasets[name][0][index]
        if not isinstance(image, Image.Image):
            raise UserError(
                f"DatasetData: {name}[{index}] gives a {type(image).__name__} and no PIL image; drop transforms"
            )
        advance(1)
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
        return Item(f"{name}/{index}", int(label), hashlib.sha256(content).digest(), split)


class TestSource(Source):
    """Another source, every image of which is for the test.

    Args:
        whole: that source.
    """

    __test__ = False  # it is not a test, whatever pytest thinks of its name

    def __init__(self, whole: Source) -> None:
        self.class_names, self.path, self._whole = whole.class_names, whole.path, whole

    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        """All for the test."""
        items, unreadable = self._whole.scan(remembered)
        return [replace(item, split="test") for item in items], unreadable

    def read(self, item: Item, shorter_side: int, max_pixels: int) -> Image.Image:
        """As the other source."""
        return self._whole.read(item, shorter_side, max_pixels)


# By the name that --data.source gives; what is called with --data.root.
SOURCES: dict[str, Callable[[str], Source]] = {
    "folder": FolderSource,
    "csv": TableSource,
}


def open_source(root: str | None, csv: str | None, source: str | None) -> Source:
    """The source that options name; ``csv`` is short for source=csv with that root.

    Raises:
        UserError: neither or both of root and csv are given, or there is no such source.
    """
    if (root is None) == (csv is None):
        raise UserError("give either --data.root, a folder of class folders, or --data.csv, a list of images")
    kind = source or ("folder" if csv is None else "csv")
    if kind not in SOURCES:
        raise UserError(f"--data.source={kind}: no such kind of data; there are {', '.join(SOURCES)}")
    return SOURCES[kind](str(root or csv))
