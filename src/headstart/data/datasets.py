"""Images from a ``Dataset``, such as torchvision's, as a source and as a data module."""

import hashlib
import json
import os
import random
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from headstart.data.module import ImageData
from headstart.data.sources import Source
from headstart.data.splits import Item, Split
from headstart.decoding import UnreadableImage, content_digest, decode, decode_opened, measured, measured_of
from headstart.errors import UserError
from headstart.features.hashes import index_file, read_checked, write_checked
from headstart.files import patiently, read_regular
from headstart.images import Preprocessing
from headstart.terminal import images_bar, listing, say

PROBED = 8  # rows that are hashed a second time in each run
COLUMNS = ("image", "label")

Entry = tuple[list[int], str, int, float]  # labels of a row, hash, largest value, aspect ratio


class DatasetSource(Source):
    """Map-style datasets of rows (image, label), or dicts with the two ``columns``, by their split.

    A label is a number or, for several labels, 0 or 1 for each class.

    An image is a PIL image, or the bytes of a file, also as Hugging Face's dict of ``bytes`` and ``path``. Bytes are
    identified by their sha256, like a file, and a PIL image by a hash of its decoded content. Hashes are stored between
    runs under a ``fingerprint``; a few random rows are hashed again in each run. ``class_names`` defaults to the
    ``classes`` of the training dataset; ``named`` begins the messages about the data.

    Raises:
        UserError: the datasets are streamed, lack class names, or number their classes otherwise.
    """

    def __init__(
        self,
        datasets: Mapping[Split, Dataset[Any]],
        class_names: Sequence[str] | None = None,
        columns: Sequence[str] = COLUMNS,
        fingerprint: str | None = None,
        named: str = "DatasetData",
    ) -> None:
        self._datasets, self._columns, self._fingerprint, self._named = datasets, tuple(columns), fingerprint, named
        for name, dataset in datasets.items():
            if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
                raise UserError(
                    f"{named}: {name} is streamed, but an image is split by its content and found again by its number; "
                    "load it without streaming"
                )
        names = class_names or getattr(datasets["train"], "classes", None)
        if names is None:
            raise UserError(f"{named}: give class_names, since the dataset has no `classes`")
        self.class_names, self.path = list(names), Path("dataset")
        if len(set(self.class_names)) < len(self.class_names):
            raise UserError(f"{named}: class_names contains a name twice; give each class a different name")
        for name, dataset in datasets.items():
            own = list(getattr(dataset, "classes", self.class_names))
            if class_names is None and own != self.class_names:
                differ = f"{len(own)}: {listing(own)}", f"{len(self.class_names)}: {listing(self.class_names)}"
                raise UserError(
                    f"{named}: {name} has different classes ({differ[0]}) from train ({differ[1]}), "
                    "so its labels differ in meaning; use the same classes in both"
                )
        self.has_val, self.has_test = "val" in datasets, "test" in datasets
        self._reasons: dict[str, str] = {}  # why images are unreadable, by path

    @cached_property
    def multilabel(self) -> bool:  # type: ignore[override]  # the label of the first row tells
        train = self._datasets["train"]
        row: Any = train[0] if len(train) else None  # type: ignore[arg-type]
        if isinstance(row, Mapping):
            row = tuple(map(row.get, self._columns))
        return isinstance(row, tuple | list) and len(row) == 2 and np.ndim(row[1]) == 1

    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        places: dict[str, Split | None] = {}
        for name, dataset in self._datasets.items():
            split = None if name == "train" and not (self.has_val and self.has_test) else name
            places |= {f"{name}/{index}": split for index in range(len(dataset))}  # type: ignore[arg-type]
        file = index_file(remembered, f"dataset {self._fingerprint}".encode()) if self._fingerprint else None
        known = self._still_true(_recall(file), places)
        entries = known | self._hashed([path for path in places if path not in known])
        self.scanned = [self._item(path, entries[path], split) for path, split in places.items()]
        readable = {path: entries[path] for path in places if path not in self._reasons}
        if readable != known:
            _remember(file, readable)
        self.measured = np.array([entry[2:] for entry in readable.values()], dtype=float).reshape(-1, 2)
        return [item for item in self.scanned if item.path in readable], dict(self._reasons)

    def _item(self, path: str, entry: Entry, split: Split | None) -> Item:
        labels, digest = entry[0], bytes.fromhex(entry[1])
        tags = tuple(labels) if self.multilabel else None
        return Item(path, -1 if self.multilabel else labels[0], digest, split, tags=tags)

    def read(self, item: Item, preprocessing: Preprocessing, max_pixels: int) -> Image.Image:
        def decoded() -> Image.Image:
            image = _content(self._row(item.path)[0])
            if isinstance(image, Image.Image):
                return decode_opened(image, preprocessing)
            if hashlib.sha256(image).digest() != item.digest:
                raise UserError(f"{self._named}: {item.path} changed under its fingerprint; give it another one")
            return decode(image, preprocessing, max_pixels)

        return patiently(Path(item.path), decoded)

    def _still_true(self, known: dict[str, Entry], places: Collection[str]) -> dict[str, Entry]:
        """What is remembered, unless a few random rows contradict it."""
        if all(path in places and self._entry(path) == known[path] for path in _few(known)):
            return known
        say("data: the dataset changed since its hashes were stored, so all its images are hashed again")
        return {}

    def _hashed(self, paths: list[str]) -> dict[str, Entry]:
        """The entries of rows, hashed in threads; refuses rows that differ on a second look."""
        if not self._fingerprint:
            say(f"data: {len(paths)} images are hashed in each run; DatasetData remembers them under a fingerprint=…")
        self._reasons = {}
        found: dict[str, Entry] = {}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, images_bar("scan", len(paths)) as advance:
            for path, entry in zip(paths, pool.map(self._entry, paths), strict=True):
                found[path] = entry
                advance(1)
        for path in _few(found):
            if self._entry(path) != found[path]:
                raise UserError(
                    f"{self._named}: {path} has different pixels when it is read again: remove the random transform, "
                    "and augment with --data.augment; or the dataset cannot be read in threads"
                )
        return found

    def _entry(self, path: str) -> Entry:
        """The labels, hash and shape of a row; without a hash if it is unreadable."""
        image, labels = self._row(path)
        try:
            image = patiently(Path(path), partial(_content, image))
            if isinstance(image, Image.Image):
                return labels, content_digest(image).hex(), *measured_of(image)
            return labels, hashlib.sha256(image).hexdigest(), *measured(image)
        except (UnreadableImage, FileNotFoundError) as error:
            self._reasons[path] = str(error)
            return labels, "", 0, 1.0

    def _row(self, path: str) -> tuple[Any, list[int]]:
        """The image and the labels of a row."""
        name, index = path.split("/")
        where, row = f"{self._named}: {name}[{index}]", self._datasets[name][int(index)]  # type: ignore[index]
        if isinstance(row, Mapping):
            if not row.keys() >= set(self._columns):
                raise UserError(f"{where} has the columns {listing(list(row))}; name two: columns=(image, label)")
            row = [row[column] for column in self._columns]
        if not isinstance(row, tuple | list) or len(row) != 2:
            raise UserError(f"{where} is a {type(row).__name__}, not (image, label); wrap the dataset")
        image, label = row
        if not isinstance(image, Image.Image | bytes | Mapping):
            raise UserError(f"{where} gives a {type(image).__name__}, not a PIL image; remove the transform")
        if self.multilabel:
            several = np.asarray(label)
            if several.shape != (len(self.class_names),) or not np.isin(several, (0, 1)).all():
                raise UserError(f"{where} has the labels {label}; give 0 or 1 for each of {len(self.class_names)}")
            return image, several.nonzero()[0].tolist()
        label = getattr(label, "item", lambda: label)()
        if not isinstance(label, int | float) or not 0 <= label < len(self.class_names) or int(label) != label:
            raise UserError(
                f"{where} has the label {label}; labels must be 0 to {len(self.class_names) - 1}, as in class_names"
            )
        return image, [int(label)]


def _recall(file: Path | None) -> dict[str, Entry]:
    """The hashes stored in a file, by path; empty if there are none, or the file is damaged."""
    if file is None:
        return {}
    try:
        known: dict[str, Entry] = {}
        for path, (labels, digest, peak, aspect) in json.loads(read_checked(file)).items():
            known[path] = labels, digest, int(peak), float(aspect)
        return {path: entry for path, entry in known.items() if len(bytes.fromhex(entry[1])) == 32}
    except (OSError, MemoryError, ValueError, TypeError, AttributeError):  # damaged, or another format
        return {}


def _remember(file: Path | None, found: dict[str, Entry]) -> None:
    """Stores hashes for ``_recall``."""
    if file is None:
        return
    with suppress(OSError):  # only speed is lost; an unwritable folder is reported with the features
        write_checked(file, json.dumps(found).encode())


def _few(paths: Collection[str]) -> list[str]:
    """A few of the paths, others in each run."""
    return random.SystemRandom().sample(list(paths), min(PROBED, len(paths)))


def _content(image: Any) -> Image.Image | bytes:
    """A PIL image or the bytes of a file, also where they are in Hugging Face's dict of ``bytes`` and ``path``."""
    if isinstance(image, Mapping):
        return read_regular(Path(image["path"])) if image.get("bytes") is None else bytes(image["bytes"])
    found: Image.Image | bytes = image
    return found


class DatasetData(ImageData):
    """Map-style datasets of (PIL image, label) pairs, such as torchvision's, or of dicts, such as Hugging Face's.

    Images that are opened but not loaded, as by ``ImageFolder(root, loader=Image.open)``, are decoded from their files;
    bytes are decoded like a file.

    Args:
        train: training dataset.
        val: validation dataset; None: split from ``train``.
        test: test dataset; None: split from ``train``.
        class_names: class names by label; None: the ``classes`` of ``train``.
        columns: keys of the image and the label in rows that are dicts.
        fingerprint: a string that changes with the images; their hashes are stored under it between runs.
        kwargs: as ``ImageData``.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        class_names: list[str] | None = None,
        columns: Sequence[str] = COLUMNS,
        fingerprint: str | None = None,
        **kwargs: Any,
    ) -> None:
        given: dict[Split, Dataset[Any] | None] = {"train": train, "val": val, "test": test}
        datasets = {split: dataset for split, dataset in given.items() if dataset is not None}
        super().__init__(DatasetSource(datasets, class_names, columns, fingerprint), **kwargs)
