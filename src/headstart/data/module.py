"""The data module: splits, features or pixels, batches."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor

from headstart.data import splits
from headstart.data.loaders import BatchOrder, FeatureLoader, ImageDataset, ImageLoader, trained_epochs
from headstart.data.sources import Source, open_source
from headstart.data.splits import SPLITS, Item, Repeat, Split
from headstart.data.store import FeatureStore
from headstart.decoding import MAX_PIXELS
from headstart.device import device_of
from headstart.errors import UserError
from headstart.features.arithmetic import FeaturePrecision
from headstart.features.matrix import FeatureMatrix, Labelled
from headstart.images import Augment, Views
from headstart.model.backbone import FrozenBackbone
from headstart.ranges import Count, Fraction, OpenFraction, Positive, Seed, check_arguments
from headstart.terminal import say


class ImageData(LightningDataModule):
    """Images of a source, split by content.

    ``setup`` gets the preprocessing from the frozen backbone of the trainer's module. Batches are (features [B, D],
    labels [B]) with ``cache``, else (images [B, 3, H, W] uint8, labels [B]).

    Args:
        source: where the images come from.
        batch_size: number of images per step, over all devices.
        num_workers: number of threads or processes that decode images; None: one per CPU core, at most 8.
        augment: training augmentation: none, light (crops, flips) or strong (smaller crops, colours, rotations).
        cache: compute the features of each image once and store them; false: decode the images in every epoch.
        views: number of cached views per training image: the image itself, and views - 1 augmented ones.
        view_seed: random seed of the augmented views.
        flip: mirror half of the augmented views, and use mirror images in layers=all; false if left and right matter.
        cache_dir: where to store features; None: $HEADSTART_CACHE, else the user's cache folder.
        feature_precision: precision of cached features; auto: the faster of bf16 and fp32; int8: by onnxruntime.
        val_fraction: fraction of the images used for validation.
        test_fraction: fraction of the images used for testing; 0: no test.
        split_seed: random seed of the split into train, val and test.
        order_seed: random seed of the order of training images; None: the value of seed_everything.
        splits: splits.csv of an earlier run whose split to reuse; None: split by content and seed.
        strict: stop if an image is in two splits or has two labels, instead of warning.
        limit: maximum number of training images per class; None: all.
        max_pixels: maximum number of pixels of an image; larger images are left out.

    Attributes:
        items: the images, each with its split, after loading.

    Raises:
        UserError: an option is out of range, or options contradict each other.
    """

    def __init__(
        self,
        source: Source,
        batch_size: Positive = 32,
        num_workers: Count | None = None,
        augment: Augment = "none",
        cache: bool = True,
        views: Positive = 1,
        view_seed: Count = 0,
        flip: bool = True,
        cache_dir: str | None = None,
        feature_precision: FeaturePrecision = "auto",
        val_fraction: OpenFraction = 0.15,
        test_fraction: Fraction = 0.15,
        split_seed: Count = 0,
        order_seed: Seed | None = None,
        splits: str | None = None,
        strict: bool = False,
        limit: Positive | None = None,
        max_pixels: Positive = MAX_PIXELS,
    ) -> None:
        super().__init__()
        check_arguments(ImageData, vars())
        self.store = FeatureStore(source, num_workers, cache_dir, feature_precision, max_pixels, cache)
        self.source, self.class_names = source, source.class_names
        self.num_workers = self.store.workers if num_workers is None else num_workers
        self.batch_size, self.augment, self.views = batch_size, Views(augment, view_seed, flip), views
        self.val_fraction = 0.0 if source.has_val else val_fraction
        self.test_fraction = 0.0 if source.has_test else test_fraction
        self.split_seed, self.splits_file = split_seed, Path(splits).expanduser() if splits else None
        self.order_seed, self.strict, self.limit = order_seed, strict, limit
        self.repeat: Repeat | None = None  # selects exactly the images of a run, each in its split
        self.items: list[Item] = []
        self._features: dict[Split, list[FeatureMatrix]] = {}
        self._check_options(val_fraction, test_fraction)

    def setup(self, stage: str) -> None:
        """Loads the data for the module's backbone, on the trainer's device; called by Lightning."""
        trainer = self._attached()
        # `seed_everything` stores its seed in the environment, for processes that start later.
        seed = os.environ.get("PL_GLOBAL_SEED", "0") if self.order_seed is None else self.order_seed
        self._seed = int(seed)
        if self.batch_size % trainer.world_size:
            raise UserError(
                f"--data.batch_size={self.batch_size} is over all devices: give a multiple of {trainer.world_size}"
            )
        module: Any = trainer.lightning_module
        # Fine-tuned modules are frozen in part; a custom module may define only `backbone`.
        frozen = getattr(module, "frozen", module.backbone) if self.store.cache else module.backbone
        self.load(frozen, trainer.strategy.root_device)
        if stage == "fit":
            splits.check_training(self.items, self.class_names)

    def load(self, backbone: FrozenBackbone, device: torch.device) -> None:
        """Scans and splits the images, and computes or reads their features; repeated only for another backbone."""
        before = self.store.items
        if not self.store.load(backbone, device) and self.items:
            return
        if not self.items or self.store.items != before:
            self._split_all()
        if self.store.cache:
            self._features = {split: [self.store.matrix(self.items_in(split)).to(device)] for split in SPLITS}
            for number in range(1, self.views):
                matrix = self.store.matrix(self.items_in("train"), self.augment, number)
                self._features["train"].append(matrix.to(device))

    def items_in(self, split: Split) -> list[Item]:
        """The images of a split, in the order of evaluation."""
        return [item for item in self.items if item.split == split]

    def labels(self, split: Split) -> Tensor:
        """The class index of each image of a split -> [N]; with several labels, 0 or 1 for each -> [N, num_classes]."""
        return self.source.labels_of(self.items_in(split))

    def counts(self, split: Split) -> Tensor:
        """Images per class in a split -> [num_classes]."""
        return splits.counts_of(self.labels(split), len(self.class_names))

    @property
    def multilabel(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.source.multilabel

    def labelled(self, split: Split) -> Labelled:
        """The cached features of a split's images, one matrix per view, with their labels."""
        return Labelled(self._features[split], self.labels(split))

    def numpy(self, split: Split, model: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Without a Trainer: cached features [N, D], labels [N] and paths of a split, for a model or its backbone."""
        if not self.store.cache:
            raise UserError("data.numpy: needs the cached features; leave out cache=False")
        self.load(getattr(model, "backbone", model), device_of("auto"))
        paths = [item.path for item in self.items_in(split)]
        return self.labelled(split).views[0].whole().cpu().numpy(), self.labels(split).numpy(), paths

    def train_dataloader(self) -> Any:
        return self._loader("train")

    def val_dataloader(self) -> Any:
        return self._loader("val")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def _attached(self) -> Trainer:
        if self.trainer is None:
            raise UserError(
                "the data module takes its preprocessing from the model: pass both to a Trainer, as in docs/python.md"
            )
        return self.trainer

    def _check_options(self, val_fraction: float, test_fraction: float) -> None:
        policy, cache = self.augment.policy, self.store.cache
        if cache and policy != "none" and self.views == 1:
            raise UserError(
                f"--data.augment={policy}: cached images have one view by default; add "
                "--data.views=8, or augment in every epoch with --data.cache=false"
            )
        if self.views > 1 and (policy == "none" or not cache):
            raise UserError(
                f"--data.views={self.views}: needs the cache and augmentation, such as --data.augment=light"
            )
        if val_fraction + test_fraction >= 1:
            raise UserError("--data.val_fraction and --data.test_fraction leave no images to train on; lower them")

    def _split_all(self) -> None:
        """Splits the readable images, and says how many there are."""
        self.store.check_skips()
        self.items = self._split(self.store.items)
        say(splits.counts_table(self.items, self.class_names))
        trained = self.counts("train")
        if trained.max() > 10 * trained.min().clamp(min=1):
            say("data: the classes are imbalanced; watch the balanced accuracy, try --model.class_weights=balanced")

    def _split(self, items: list[Item]) -> list[Item]:
        if self.repeat:
            return self.repeat(items, self.class_names)
        if self.splits_file:
            items = splits.frozen(items, self.splits_file)
        assigned = splits.assign(items, self.class_names, self.val_fraction, self.test_fraction, self.split_seed)
        splits.check_copies(assigned, self.strict)
        return splits.limited(assigned, self.limit) if self.limit else assigned

    def _loader(self, split: Split) -> Any:
        items, trainer, training = self.items_in(split), self._attached(), split == "train"
        if not items:
            return []
        epoch = partial(trained_epochs, trainer)
        seed = self._seed if training else None
        order = BatchOrder(len(items), self.batch_size, seed, epoch, trainer.global_rank, trainer.world_size)
        if self.store.cache:
            return FeatureLoader(self.labelled(split), order)
        preprocessing, views = self.store.backbone.preprocessing, self.augment if training else Views()
        # Not `store.read`, which would send the backbone to each worker process.
        read = partial(self.source.read, preprocessing=preprocessing, max_pixels=self.store.max_pixels)
        return ImageLoader(
            ImageDataset(items, self.labels(split), read, preprocessing, views),
            batch_sampler=order,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.store.device.type == "cuda",
            # The default generator is global, so that a resumed run would differ.
            generator=torch.Generator().manual_seed(0),
        )


class ImageFolderData(ImageData):
    """A folder of class folders, split by content, or with folders ``train``, ``val`` and optionally ``test``.

    Without a ``val`` folder, ``train`` is split; without a ``test`` folder there is no test. A CSV file lists images in
    the columns path (relative to the file), label, and optionally split and group; a group is never split.

    Args:
        root: folder of class folders, or the name of a dataset.
        csv: CSV file that lists images, instead of root; columns: path, label, and optionally split, group, domain.
        source: kind of data at root: folder, domains (folders of class folders), csv, torchvision, hf, …; None: folder.
        group: regular expression for an image's path; its first capture group is the image's group, such as a video.
        multilabel: whether red|round in the CSV file is two labels; None: yes; true: also several rows, or no label.
        kwargs: as ``ImageData``.

    Raises:
        UserError: the folder or the file has another layout; the message says what is missing.
    """

    def __init__(
        self,
        root: str | None = None,
        csv: str | None = None,
        source: str | None = None,
        group: str | None = None,
        multilabel: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(open_source(root, csv, source, group, multilabel), **kwargs)
