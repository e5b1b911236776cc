"""From a folder of images, or a dataset, to splits and batches."""

import hashlib
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from pytorch_lightning import LightningDataModule, Trainer
from rich.table import Table
from torch import Tensor
from torch.utils.data import Dataset

from headstart.data import folders, splits
from headstart.data.loaders import EpochOrder, FeatureLoader, ImageDataset, ImageLoader
from headstart.data.splits import SPLITS, Item, Split
from headstart.data.table import ImageTable
from headstart.errors import UserError
from headstart.features.cache import (
    FeatureCache,
    FeatureMatrix,
    FeaturePrecision,
    NonFiniteFeatures,
    cache_folder,
    cache_key,
    feature_dtype,
)
from headstart.files import ContentIndex
from headstart.images import MAX_PIXELS, Augment, UnreadableImage, to_rgb
from headstart.model.backbone import FrozenBackbone, Preprocessing, combined, tensor_digests
from headstart.ranges import Count, Fraction, OpenFraction, Positive
from headstart.terminal import images_bar, say

# Skipping more images than this, and more than this share, is no accident of single files.
MAX_SKIPPED, MAX_SKIPPED_SHARE = 5, 0.05
TABLE_ROWS = 24


class ImageData(LightningDataModule):
    """What a folder and a dataset have in common: splits, features or pixels, batches.

    ``setup`` takes the preprocessing from the frozen backbone of the module that the trainer holds. With ``cache`` the
    batches are (features [B, D], labels [B]), else (images [B, 3, H, W] uint8, labels [B]).

    Args:
        class_names: by label.
        batch_size: images a step, over all devices.
        num_workers: threads or processes that decode images; None: one a processor core, at most 8.
        augment: how training images vary: none; light (crops and flips); strong (smaller crops, colours, rotations).
        cache: compute each image's features once and keep them; false decodes the images in every epoch.
        views: with the cache, how many views of a training image to keep: itself, and views - 1 augmented ones.
        view_seed: of the augmented views.
        cache_dir: where features are kept; None: $HEADSTART_CACHE, else the user's cache folder.
        feature_precision: arithmetic of cached features; auto: bf16 where the device computes it fast, else fp32.
        val_fraction: share of the images for validation.
        test_fraction: share of the images for the test; 0: no test.
        split_seed: another seed, another split.
        splits: a run's splits.csv, to split as that run did; None: by content and seed.
        strict: stop where the same image is in two splits, instead of saying so.
        limit: at most so many training images a class; None: all.
        max_pixels: images of more pixels are left out.

    Raises:
        UserError: the options contradict each other.
    """

    def __init__(
        self,
        class_names: list[str],
        batch_size: Positive = 32,
        num_workers: Count | None = None,
        augment: Augment = "none",
        cache: bool = True,
        views: Positive = 1,
        view_seed: Count = 0,
        cache_dir: str | None = None,
        feature_precision: FeaturePrecision = "auto",
        val_fraction: OpenFraction = 0.15,
        test_fraction: Fraction = 0.15,
        split_seed: Count = 0,
        splits: str | None = None,
        strict: bool = False,
        limit: Positive | None = None,
        max_pixels: Positive = MAX_PIXELS,
    ) -> None:
        super().__init__()
        self.class_names = class_names
        self.batch_size = batch_size
        self.num_workers = min(8, os.cpu_count() or 1) if num_workers is None else num_workers
        self.augment: Augment = augment
        self.cache, self.views, self.view_seed = cache, views, view_seed
        self.cache_dir = cache_folder(cache_dir)
        self.feature_precision: FeaturePrecision = feature_precision
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.splits_file = Path(splits).expanduser() if splits else None
        self.strict, self.limit, self.max_pixels = strict, limit, max_pixels
        self.items: list[Item] = []
        self.skipped: dict[str, str] = {}
        self.seconds = {"scan": 0.0, "features": 0.0}
        self._backbone: FrozenBackbone
        self._device: torch.device
        self._clean: FeatureCache
        self._loaded: tuple[str, Preprocessing] | None = None
        self._views: dict[Split, list[FeatureMatrix]] = {}
        self._check_options()

    @abstractmethod
    def scan(self) -> list[Item]:
        """Lists the images with the hash of their content; those that cannot be read go to ``skipped``."""

    @abstractmethod
    def reader(self, shorter_side: int) -> Callable[[Item], Image.Image]:
        """A function, for threads and processes, that decodes an image to RGB or raises ``UnreadableImage``."""

    def setup(self, stage: str) -> None:
        """Called by Lightning: loads for the module's backbone, on the trainer's device."""
        trainer = self._attached()
        if self.batch_size % trainer.world_size:
            raise UserError(
                f"--data.batch_size={self.batch_size} is over all devices: give a multiple of {trainer.world_size}"
            )
        module = trainer.lightning_module
        # Of a module that is fine-tuned a part alone is frozen; one of your own may have nothing but a backbone.
        frozen = getattr(module, "frozen", module.backbone) if self.cache else module.backbone
        self.load(cast(FrozenBackbone, frozen), trainer.strategy.root_device)

    def load(self, backbone: FrozenBackbone, device: torch.device) -> None:
        """Scans, splits, and computes or reads the features; again only for another backbone."""
        identity = combined(tensor_digests(backbone)), backbone.preprocessing
        if identity == self._loaded:
            return
        self._backbone, self._device, self.skipped = backbone, device, {}
        with self._timed("scan"):
            self.items = self.scan()
            if not self.cache:
                self._skip_unreadable(self.items)
        with self._timed("features"):
            if self.cache:
                self._clean = self._cache(view=False)
                failures = self._fill(self._clean, {item.digest: item for item in self.items}, view=0)
                self.skipped |= {item.path: failures[item.digest] for item in self.items if item.digest in failures}
        self._check_skips(self.items)
        self.items = self._split([item for item in self.items if item.path not in self.skipped])
        self._say_counts()
        with self._timed("features"):
            if self.cache:
                self._arrange()
        self._loaded = identity

    def counts(self, split: Split) -> Tensor:
        """Images a class in a split -> [num_classes]."""
        return torch.bincount(self.labels(split), minlength=len(self.class_names))

    def labels(self, split: Split) -> Tensor:
        """The class index of each image of a split -> [N]."""
        return torch.tensor([item.label for item in self.of(split)], dtype=torch.long)

    def of(self, split: Split) -> list[Item]:
        """The images of a split, in the order in which evaluation takes them."""
        return [item for item in self.items if item.split == split]

    def features(self, split: Split) -> FeatureMatrix:
        """The cached features of a split's images, unaugmented."""
        return self._views[split][0]

    def views_of(self, split: Split) -> list[FeatureMatrix]:
        """The cached features of a split's images, a matrix a view."""
        return self._views[split]

    def features_of(self, items: Sequence[Item]) -> FeatureMatrix:
        """The cached features of any of the images, unaugmented."""
        return self._clean.matrix([item.digest for item in items])

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def _attached(self) -> Trainer:
        if self.trainer is None:
            raise UserError(
                "the data takes its preprocessing from the model: give both to a Trainer, as the README does"
            )
        return self.trainer

    def _check_options(self) -> None:
        if self.cache and self.augment != "none" and self.views == 1:
            raise UserError(
                f"--data.augment={self.augment}: a cached image has one view; keep several with --data.views=8, "
                "or augment without limit with --data.cache=false"
            )
        if self.views > 1 and (self.augment == "none" or not self.cache):
            raise UserError(
                f"--data.views={self.views}: are augmented and cached; add --data.augment=light, and leave the cache on"
            )
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError("--data.val_fraction and --data.test_fraction leave nothing to train on; lower them")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started

    def _pixels(self, items: Sequence[Item], policy: Augment) -> ImageDataset:
        preprocessing = self._backbone.preprocessing
        return ImageDataset(items, self.reader(preprocessing.resize_size), preprocessing, policy, self.view_seed)

    def _skip_unreadable(self, items: Sequence[Item]) -> None:
        """Without a cache, whose extraction finds them, unreadable images are found by decoding all once."""
        pixels = self._pixels(items, "none")

        def reason(item: Item) -> str | None:
            try:
                pixels.view(item, 0)
            except UnreadableImage as error:
                return str(error)
            return None

        with ThreadPoolExecutor(max(1, self.num_workers)) as pool, images_bar("checking", len(items)) as advance:
            for item, why in zip(items, pool.map(reason, items), strict=True):
                advance(1)
                if why is not None:
                    self.skipped[item.path] = why

    def _check_skips(self, items: Sequence[Item]) -> None:
        """Says what is left out, and stops where that is too much to be an accident."""
        if not self.skipped:
            return
        first = "; ".join(f"{path}: {reason}" for path, reason in list(self.skipped.items())[:3])
        total = len({item.path for item in items} | set(self.skipped))
        if len(self.skipped) > max(MAX_SKIPPED, MAX_SKIPPED_SHARE * total):
            raise UserError(f"{len(self.skipped)} of {total} images cannot be read ({first}); mend or remove them")
        say(f"data: {len(self.skipped)} of {total} images are left out ({first}); all in skipped.csv")

    def _split(self, items: Sequence[Item]) -> list[Item]:
        if self.splits_file:
            items = splits.frozen(items, self.splits_file)
        present = {item.label for item in items}
        for label, name in enumerate(self.class_names):
            if label not in present:
                raise UserError(f"class {name!r}: no readable image; add some or remove its folder")
        assigned = splits.assign(items, self.class_names, self.val_fraction, self.test_fraction, self.split_seed)
        if shared := splits.shared_between_splits(assigned):
            found = f"{shared} images are in more than one split, byte for byte, which inflates scores; remove them"
            if self.strict:
                raise UserError(f"--data.strict: {found}")
            say(f"data: {found}")
        return splits.limited(assigned, self.limit) if self.limit else assigned

    def _say_counts(self) -> None:
        counts = {split: self.counts(split).tolist() for split in SPLITS if self.of(split)}
        table = Table("class", *counts, title=f"{len(self.items)} images")
        for label, name in list(enumerate(self.class_names))[:TABLE_ROWS]:
            table.add_row(name, *(str(count[label]) for count in counts.values()))
        if len(self.class_names) > TABLE_ROWS:
            table.add_row(f"… {len(self.class_names) - TABLE_ROWS} more", *("…" for _ in counts))
        table.add_section()
        table.add_row("all", *(str(sum(count)) for count in counts.values()))
        say(table)
        trained = counts.get("train", [0])
        if max(trained) > 10 * max(1, min(trained)):
            say("data: the classes are uneven; watch the balanced accuracy, try --model.class_weights=balanced")

    def _cache(self, view: bool) -> FeatureCache:
        key = cache_key(
            self._backbone,
            self._device,
            feature_dtype(self.feature_precision, self._device),
            self.max_pixels,
            {"policy": self.augment, "seed": self.view_seed} if view else {"policy": "none"},
        )
        return FeatureCache(self.cache_dir, key)

    def _fill(self, cache: FeatureCache, rows: Mapping[bytes, Item], view: int) -> dict[bytes, str]:
        """Computes what the cache lacks of one view of the images, by row -> why some have none."""
        pixels = self._pixels([], self.augment)

        def read(row: bytes) -> Tensor:
            return pixels.view(rows[row], view)

        try:
            return cache.fill(list(rows), read, self._backbone, self._device, self.num_workers)
        except NonFiniteFeatures as error:
            raise UserError(f"{rows[error.row].path}: its features are not finite; remove it") from error

    def _arrange(self) -> None:
        """One matrix a split, and one more a view for training."""
        for split in SPLITS:
            self._views[split] = [self.features_of(self.of(split)).to(self._device)]
        augmented = self._cache(view=True)
        for view in range(1, self.views):
            rows = {_view_row(item, view): item for item in self.of("train")}
            self._fill(augmented, rows, view)
            matrix = augmented.matrix([_view_row(item, view) for item in self.of("train")])
            self._views["train"].append(matrix.to(self._device))

    def _loader(self, split: Split) -> Any:
        items, trainer = self.of(split), self._attached()
        if not items:
            return []
        training = split == "train"
        # The order's seed is the run's, which `seed_everything` leaves in the environment.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if training else None
        order = EpochOrder(
            len(items), self.batch_size, seed, partial(trained_epochs, trainer), trainer.global_rank, trainer.world_size
        )
        if self.cache:
            return FeatureLoader(self._views[split], self.labels(split), order)
        return ImageLoader(
            self._pixels(items, self.augment if training else "none"),
            batch_sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self._device.type == "cuda",
            # Without a generator of its own each epoch draws from the global one, and a resumed run differs.
            generator=torch.Generator().manual_seed(0),
        )


def trained_epochs(trainer: Trainer) -> int:
    """How many epochs were trained; unlike ``current_epoch`` right when a resumed run makes its first batch."""
    processed: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return processed


def _view_row(item: Item, view: int) -> bytes:
    return hashlib.sha256(b"view %d " % view + item.digest).digest()


class ImageFiles(ImageData):
    """Images in files below a root.

    Attributes:
        root: the folder.
    """

    root: Path

    @abstractmethod
    def listed(self) -> list[Item]:
        """The image files, not yet read."""

    def scan(self) -> list[Item]:
        listed = self.listed()
        index = ContentIndex(self.root, self.cache_dir / "index" if self.cache else None)
        with images_bar("scan", len(listed)) as advance:
            digests, unreadable = index.digests([item.path for item in listed], advance)
        self.skipped |= unreadable
        return [replace(item, digest=digests[item.path]) for item in listed if item.path in digests]

    def reader(self, shorter_side: int) -> Callable[[Item], Image.Image]:
        return partial(folders.read, self.root, shorter_side=shorter_side, max_pixels=self.max_pixels)


class ImageFolderData(ImageFiles):
    """A folder of class folders, split by content; or one that holds ``train``, ``val`` and maybe ``test``, used so.

    Without a ``val`` folder, ``train`` is split; without a ``test`` folder there is no test. A CSV file lists images
    that lie in no such folders: columns path (relative to the file) and label, and maybe split and group;
    images of one group never sit in two splits.

    Args:
        root: a folder of class folders.
        csv: a file that lists images, instead of a folder: path, label, and maybe split and group.
        kwargs: as of ``ImageData``.

    Attributes:
        source: the folder, or the file.

    Raises:
        UserError: the folder is of neither form, or the file not of its; the message says what is missing.
    """

    def __init__(self, root: str | None = None, csv: str | None = None, **kwargs: Any) -> None:
        if (root is None) == (csv is None):
            raise UserError("give either --data.root, a folder of class folders, or --data.csv, a list of images")
        self.table = ImageTable.read(Path(csv).expanduser().resolve()) if csv else None
        if self.table:
            self.root, names = self.table.file.parent, self.table.class_names
            ready = {item.split for item in self.table.items}
        else:
            self.root = folders.existing(str(root))
            self.folders = folders.of_splits(self.root)
            names, ready = folders.class_names(self.folders), set(self.folders.values())
        self.source = self.table.file if self.table else self.root
        super().__init__(class_names=names, **kwargs)
        if "test" in ready:
            self.test_fraction = 0.0  # what `train` is split for is validation alone

    def listed(self) -> list[Item]:
        return list(self.table.items) if self.table else self._in_folders()

    def _in_folders(self) -> list[Item]:
        places = [
            (folder / name, label, split)
            for folder, split in self.folders.items()
            for label, name in enumerate(self.class_names)
        ]
        found = folders.images_of_classes([folder for folder, _, _ in places])
        return [
            Item(path.relative_to(self.root).as_posix(), label, split=split)
            for (_, label, split), paths in zip(places, found, strict=True)
            for path in paths
        ]


class DatasetData(ImageData):
    """Any datasets of (PIL image, label): of torchvision, or your own.

    Args:
        train: a map-style dataset of (image, label) pairs.
        val: likewise; None: images of ``train`` validate.
        test: likewise; None: images of ``train`` test.
        class_names: by label; None: the dataset's own ``classes``.
        kwargs: as of ``ImageData``.
    """

    def __init__(
        self,
        train: Dataset[Any],
        val: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        class_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        given: dict[str, tuple[Dataset[Any] | None, Split | None]] = {
            "train": (train, "train" if val and test else None),
            "val": (val, "val"),
            "test": (test, "test"),
        }
        self.datasets = {name: (dataset, split) for name, (dataset, split) in given.items() if dataset is not None}
        names = class_names or getattr(train, "classes", None)
        if names is None:
            raise UserError("DatasetData: give class_names, since the dataset has no `classes`")
        super().__init__(class_names=list(names), **kwargs)
        self.val_fraction = 0.0 if val else self.val_fraction
        self.test_fraction = 0.0 if test else self.test_fraction

    def scan(self) -> list[Item]:
        keys = [
            (name, index, split)
            for name, (dataset, split) in self.datasets.items()
            for index in range(len(dataset))  # type: ignore[arg-type]
        ]
        with images_bar("scan", len(keys)) as advance:
            return [self._item(*key, advance) for key in keys]

    def reader(self, shorter_side: int) -> Callable[[Item], Image.Image]:
        return partial(read_sample, {name: dataset for name, (dataset, _) in self.datasets.items()})

    def _item(self, name: str, index: int, split: Split | None, advance: Callable[[int], None]) -> Item:
        image, label = self.datasets[name][0][index]
        if not isinstance(image, Image.Image):
            raise UserError(
                f"DatasetData: {name}[{index}] gives a {type(image).__name__} and no PIL image; drop transforms"
            )
        advance(1)
        content = f"{image.mode} {image.size} ".encode() + image.tobytes()
        return Item(f"{name}/{index}", int(label), hashlib.sha256(content).digest(), split)


def read_sample(datasets: Mapping[str, Dataset[Any]], item: Item) -> Image.Image:
    """The image of a dataset's sample, as RGB."""
    name, index = item.path.split("/")
    return to_rgb(datasets[name][int(index)][0])
