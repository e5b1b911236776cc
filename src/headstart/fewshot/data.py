"""The data module of episodes: classes, not images, are split, and batches are tasks."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from rich.table import Table
from torch import Tensor

from headstart.data.loaders import trained_epochs
from headstart.data.splits import SPLITS, Item, Repeat, Split
from headstart.data.store import FeatureStore
from headstart.decoding import MAX_PIXELS
from headstart.errors import UserError
from headstart.features.arithmetic import FeaturePrecision
from headstart.features.hashes import cache_folder
from headstart.fewshot.episodes import EpisodeLoader, EpisodeSampler, TaskSize
from headstart.fewshot.sources import SourceName, classes_of, source_of, split_classes
from headstart.model.backbone import FrozenBackbone
from headstart.ranges import Count, Fraction, Positive, Share, check_arguments
from headstart.terminal import listing, say


class EpisodeData(LightningDataModule):
    """Few-shot episodes from a source's cached features; batches are ``Episode``s.

    Validation and test episodes are the same in every epoch and for every method; training episodes are always new.

    Args:
        source: glyphs (drawn characters), folder (of class folders), omniglot (its zip files or folders), or domains
            (a folder of domains of class folders); None: folder if a root is given, else glyphs.
        root: folder of classes or domains, or Omniglot's zip files or folders, separated by commas.
        n_way: classes per task.
        k_shot: support images per class.
        n_query: query images per class.
        episodes: number of test tasks.
        val_episodes: tasks per validation.
        train_episodes: tasks per epoch.
        batch_size: tasks per step.
        val_fraction: share of the classes for validation.
        test_fraction: share of the classes for the test; 1: all of them, if nothing is trained.
        test_domain: domain, alphabet or script whose classes are the test classes; None: use test_fraction.
        split_seed: seed of the split of the classes.
        episode_seed: seed of the episodes.
        num_workers: number of threads that decode images; None: one per CPU core, at most 8.
        cache_dir: where to store features; None: $HEADSTART_CACHE, else the user's cache folder.
        feature_precision: precision of the features; auto: the faster of bf16 and fp32; int8: by onnxruntime.
        max_pixels: maximum number of pixels of an image; larger images are left out.
    """

    def __init__(
        self,
        source: SourceName | None = None,
        root: str | None = None,
        n_way: Positive = 5,
        k_shot: Positive = 1,
        n_query: Positive = 15,
        episodes: Positive = 1000,
        val_episodes: Positive = 400,
        train_episodes: Positive = 1000,
        batch_size: Positive = 20,
        val_fraction: Fraction = 0.2,
        test_fraction: Share = 0.3,
        test_domain: str | None = None,
        split_seed: Count = 0,
        episode_seed: Count = 0,
        num_workers: Count | None = None,
        cache_dir: str | None = None,
        feature_precision: FeaturePrecision = "auto",
        max_pixels: Positive = MAX_PIXELS,
    ) -> None:
        super().__init__()
        check_arguments(EpisodeData, vars())
        source = source or source_of(root)
        self.classes = classes_of(source, root, cache_folder(cache_dir))
        self.store = FeatureStore(self.classes, num_workers, cache_dir, feature_precision, max_pixels)
        self.class_names, self.title = self.classes.class_names, f"{source}: {self.classes.root.name}"
        self.size, self.batch_size = TaskSize(n_way, k_shot, n_query), batch_size
        self.episodes, self.val_episodes, self.train_episodes = episodes, val_episodes, train_episodes
        self.episode_seed = episode_seed
        if test_domain:
            if test_domain not in (groups := sorted(set(self.classes.groups))):
                raise UserError(f"--data.test_domain={test_domain}: no such domain; choose from {listing(groups)}")
            pairs = zip(self.classes.class_names, self.classes.groups, strict=True)
            self.classes.split = {name: "test" for name, group in pairs if group == test_domain}
            if source == "domains":  # one of the others validates; less than its whole share: training comes first
                val_fraction = max(val_fraction, 0.9 / (len(groups) - 1))
        everything = test_fraction >= 1
        self.parts = split_classes(self.classes, 0.0 if everything else val_fraction, test_fraction, split_seed)
        self.items: list[Item] = []
        self.repeat: Repeat | None = None  # selects exactly the images of a run, in their splits
        self._features = torch.empty(0)

    def load(self, backbone: FrozenBackbone, device: torch.device) -> None:
        """Scans the images, splits the classes, and computes or reads the features."""
        self.store.load(backbone, device)
        self.store.check_skips()
        items = self.store.items
        self.items = self.repeat(items, self.class_names) if self.repeat else self._split(items)
        self._say_counts()
        self._features = self.store.matrix(self.items).whole().to(device)

    def setup(self, stage: str) -> None:
        """Requires ``load``, since the trained module has no backbone."""
        if not self.items:
            raise UserError("EpisodeData: call load(backbone, device) first")

    @property
    def width(self) -> int:
        """The number of features, D."""
        return self._features.shape[1]

    def items_in(self, split: Split) -> list[Item]:
        """The images of a split's classes."""
        return [item for item in self.items if item.split == split]

    def rows_of(self, split: Split, images: int) -> list[list[int]]:
        """Rows of each class of the split with at least ``images`` images; a row is a position in ``items``."""
        rows: dict[int, list[int]] = {}
        for row, item in enumerate(self.items):
            if item.split == split:
                rows.setdefault(item.label, []).append(row)
        return [of_class for of_class in rows.values() if len(of_class) >= images]

    def sampler(self, split: Split, size: TaskSize | None = None) -> EpisodeSampler:
        """Draws the split's episodes; ``size`` defaults to the data's."""
        size = size or self.size
        rows = self.rows_of(split, size.k_shot + size.n_query)
        return EpisodeSampler(self._features, rows, size, split, self.episode_seed)

    def all_support(self) -> list[Tensor]:
        """The features of each class's images, [K, D] each."""
        by_class: list[list[int]] = [[] for _ in self.class_names]
        for row, item in enumerate(self.items):
            by_class[item.label].append(row)
        return [self._features[rows] for rows in by_class]

    def train_dataloader(self) -> Any:
        def start() -> int:
            assert self.trainer
            return trained_epochs(self.trainer) * self.train_episodes

        return EpisodeLoader(self.sampler("train"), self.train_episodes, self.batch_size, start)

    def val_dataloader(self) -> Any:
        return EpisodeLoader(self.sampler("val"), self.val_episodes, self.batch_size)

    def test_dataloader(self) -> Any:
        return EpisodeLoader(self.sampler("test"), self.episodes, self.batch_size)

    def _split(self, items: list[Item]) -> list[Item]:
        """Splits by class, without copies within a class, which would leak from a task's support into its query.

        An image in two splits would leak from the training into the test, and is an error.
        """
        once = {(item.label, item.digest): item for item in reversed(items)}
        if len(once) < len(items):
            say(f"data: {len(items) - len(once)} image(s) are copies of others in their class, and are left out")
            items = [item for item in items if once[item.label, item.digest] is item]
        place = {name: split for split in SPLITS for name in self.parts[split]}
        split = [replace(item, split=place[self.class_names[item.label]]) for item in items]
        seen: dict[bytes, str | None] = {}
        for item in split:
            if seen.setdefault(item.digest, item.split) != item.split:
                path = self.classes.root / item.path
                raise UserError(f"{path}: the same image is in a class of another split; remove one")
        return split

    def _say_counts(self) -> None:
        table = Table("split", "groups", "classes", "images", title=self.title)
        group = dict(zip(self.class_names, self.classes.groups, strict=True))
        images = Counter(item.split for item in self.items)
        for split in SPLITS:
            names = self.parts[split]
            table.add_row(split, str(len({group[name] for name in names})), str(len(names)), str(images[split]))
        say(table)
