"""Images that a ``Dataset`` gives, such as torchvision's, as a source and as a data module."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from headstart.data.module import ImageData
from headstart.data.sources import Source
from headstart.data.splits import Item, Split
from headstart.decoding import Measured, UnreadableImage, content_digest, decode_opened, measured_of
from headstart.errors import UserError
from headstart.files import patiently
from headstart.images import Preprocessing
from headstart.terminal import images_bar, listing


class DatasetSource(Source):
    """Datasets of (PIL image, label) pairs by name, each with its split; None: to be split.

    ``class_names`` defaults to the ``classes`` of the training dataset.
    """

    def __init__(
        self, datasets: dict[str, tuple[Dataset[Any], Split | None]], class_names: Sequence[str] | None
    ) -> None:
        self._datasets = datasets
        names = class_names or getattr(datasets["train"][0], "classes", None)
        if names is None:
            raise UserError("DatasetData: give class_names, since the dataset has no `classes`")
        self.class_names, self.path = list(names), Path("dataset")
        if len(set(self.class_names)) < len(self.class_names):
            raise UserError("DatasetData: class_names contains a name twice; give each class a different name")
        for name, (dataset, _) in datasets.items():
            own = list(getattr(dataset, "classes", self.class_names))
            if class_names is None and own != self.class_names:
                differ = f"{len(own)}: {listing(own)}", f"{len(self.class_names)}: {listing(self.class_names)}"
                raise UserError(
                    f"DatasetData: {name} has different classes ({differ[0]}) from train ({differ[1]}), "
                    "so its labels differ in meaning; use the same classes in both"
                )
        self.has_val, self.has_test = "val" in datasets, "test" in datasets

    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        samples = [
            (name, index, split)
            for name, (dataset, split) in self._datasets.items()
            for index in range(len(dataset))  # type: ignore[arg-type]
        ]
        items, unreadable, self.label_of, found = list[Item](), dict[str, str](), {}, list[Measured]()
        with images_bar("scan", len(samples)) as advance:
            for name, index, split in samples:
                image, label = self._sample(name, index)
                path = f"{name}/{index}"
                self.label_of[path] = label
                try:
                    found.append(measured_of(image))
                    items.append(Item(path, label, content_digest(image), split))
                except UnreadableImage as error:
                    unreadable[path] = str(error)
                advance(1)
        self.measured = found
        return items, unreadable

    def read(self, item: Item, preprocessing: Preprocessing, max_pixels: int) -> Image.Image:
        name, index = item.path.split("/")
        return patiently(Path(item.path), lambda: decode_opened(self._sample(name, int(index))[0], preprocessing))

    def _sample(self, name: str, index: int) -> tuple[Image.Image, int]:
        where, sample = f"DatasetData: {name}[{index}]", self._datasets[name][0][index]
        if not isinstance(sample, tuple | list) or len(sample) != 2:
            raise UserError(f"{where} is a {type(sample).__name__}, not (image, label); wrap the dataset")
        image, label = sample
        if not isinstance(image, Image.Image):
            raise UserError(f"{where} gives a {type(image).__name__}, not a PIL image; remove the transform")
        if not 0 <= label < len(self.class_names) or int(label) != label:
            raise UserError(
                f"{where} has the label {label}; labels must be 0 to {len(self.class_names) - 1}, as in class_names"
            )
        return image, int(label)


class DatasetData(ImageData):
    """Any map-style datasets of (PIL image, label) pairs, such as torchvision's.

    Images that are opened but not loaded, as by ``ImageFolder(root, loader=Image.open)``, are decoded from their files.

    Args:
        train: training dataset.
        val: validation dataset; None: split from ``train``.
        test: test dataset; None: split from ``train``.
        class_names: class names by label; None: the ``classes`` of ``train``.
        kwargs: as ``ImageData``.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        given: dict[str, tuple[Dataset[Any], Split | None]] = {"train": (train, "train" if val and test else None)}
        given |= {"val": (val, "val")} if val else {}
        given |= {"test": (test, "test")} if test else {}
        super().__init__(DatasetSource(given, class_names), **kwargs)
