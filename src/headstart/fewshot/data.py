"""The data module of episodes: classes, not images, are split, and batches are tasks."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from headstart.data import folders
from headstart.data.module import ImageFiles, trained_epochs
from headstart.data.splits import SPLITS, Item, Split
from headstart.errors import UserError
from headstart.features.cache import FeaturePrecision, cache_folder
from headstart.fewshot.episodes import EpisodeLoader, EpisodeOrder, EpisodeSampler, Shape
from headstart.fewshot.sources import SourceName, classes_of, split_classes
from headstart.images import MAX_PIXELS
from headstart.ranges import Count, Fraction, Positive, Share
from headstart.terminal import say


class EpisodeData(ImageFiles):
    """Episodes of the cached features of a source's classes; batches are ``Episode``s.

    Validation and test episodes are the same in every epoch and for every method; those of training are new in each.

    Args:
        source: glyphs (characters, drawn here), folder (of class folders), or omniglot (its zip files or folders).
        root: of folder and omniglot; of omniglot also several, separated by commas.
        n_way: classes a task.
        k_shot: examples a class.
        n_query: images to classify a class.
        episodes: of the test.
        val_episodes: of each validation.
        train_episodes: of each epoch.
        batch_size: episodes a step.
        val_fraction: share of the classes for validation.
        test_fraction: share of the classes for the test; 1: all, where nothing is trained.
        split_seed: another seed, another split of the classes.
        episode_seed: another seed, other episodes.
        num_workers: threads that decode images; None: one a processor core, at most 8.
        cache_dir: where features are kept; None: $HEADSTART_CACHE, else the user's cache folder.
        feature_precision: arithmetic of the features; auto: bf16 where the device computes it fast, else fp32.
        max_pixels: images of more pixels are left out.

    Raises:
        UserError: the source is not there, or of another layout.
    """

    def __init__(
        self,
        source: SourceName = "glyphs",
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
        split_seed: Count = 0,
        episode_seed: Count = 0,
        num_workers: Count | None = None,
        cache_dir: str | None = None,
        feature_precision: FeaturePrecision = "auto",
        max_pixels: Positive = MAX_PIXELS,
    ) -> None:
        self.source: SourceName = source
        self.classes = classes_of(source, root, cache_folder(cache_dir))
        self.root = self.classes.root
        self.shape = Shape(n_way, k_shot, n_query)
        self.episodes, self.val_episodes, self.train_episodes = episodes, val_episodes, train_episodes
        self.episode_seed = episode_seed
        everything = test_fraction >= 1
        self.parts = split_classes(self.classes, 0.0 if everything else val_fraction, test_fraction, split_seed)
        super().__init__(
            class_names=self.classes.names,
            batch_size=batch_size,
            num_workers=num_workers,
            cache_dir=cache_dir,
            feature_precision=feature_precision,
            split_seed=split_seed,
            max_pixels=max_pixels,
        )
        self._features = torch.empty(0)

    def listed(self) -> list[Item]:
        found = folders.images_of_classes([self.root / name for name in self.class_names])
        return [
            Item(path.relative_to(self.root).as_posix(), label) for label, paths in enumerate(found) for path in paths
        ]

    def setup(self, stage: str) -> None:
        """The backbone is in no module here: ``load`` comes first."""
        if self._loaded is None:
            raise UserError("EpisodeData: call load(backbone, device) first")

    @property
    def width(self) -> int:
        """Of the features."""
        return self._features.shape[1]

    def rows_of(self, split: Split, images: int) -> list[list[int]]:
        """The rows of the split's classes that have so many images; an image's row is its place in ``items``."""
        rows: dict[int, list[int]] = {}
        for row, item in enumerate(self.items):
            if item.split == split:
                rows.setdefault(item.label, []).append(row)
        return [of_class for of_class in rows.values() if len(of_class) >= images]

    def sampler(self, split: Split, shape: Shape | None = None) -> EpisodeSampler:
        """Draws the split's episodes.

        Args:
            split: whose classes they are of.
            shape: of the tasks; None: the data's own.

        Raises:
            UserError: too few classes have images enough.
        """
        shape = shape or self.shape
        rows = self.rows_of(split, shape.k_shot + shape.n_query)
        return EpisodeSampler(self._features, rows, shape, split, self.episode_seed)

    def all_support(self) -> list[Tensor]:
        """The features of each class's images, [K, D] each."""
        by_class: list[list[int]] = [[] for _ in self.class_names]
        for row, item in enumerate(self.items):
            by_class[item.label].append(row)
        return [self._features[rows] for rows in by_class]

    def train_dataloader(self) -> Any:
        def start() -> int:
            return trained_epochs(self._attached()) * self.train_episodes

        return EpisodeLoader(self.sampler("train"), EpisodeOrder(self.train_episodes, self.batch_size, start))

    def val_dataloader(self) -> Any:
        return EpisodeLoader(self.sampler("val"), EpisodeOrder(self.val_episodes, self.batch_size))

    def test_dataloader(self) -> Any:
        return EpisodeLoader(self.sampler("test"), EpisodeOrder(self.episodes, self.batch_size))

    def _split(self, items: Sequence[Item]) -> list[Item]:
        """By class; an image whose content is in two splits would be known before, so that is refused."""
        place = {name: split for split in SPLITS for name in self.parts[split]}
        split = [replace(item, split=place[self.class_names[item.label]]) for item in items]
        seen: dict[bytes, str | None] = {}
        for item in split:
            if seen.setdefault(item.digest, item.split) != item.split:
                raise UserError(f"{self.root / item.path}: the same image is in a class of another split; remove one")
        return split

    def _arrange(self) -> None:
        self._features = self.features_of(self.items).gather(torch.arange(len(self.items))).to(self._device)

    def _say_counts(self) -> None:
        table = Table("split", "groups", "classes", "images", title=f"{self.source}: {self.root.name}")
        group = dict(zip(self.classes.names, self.classes.groups, strict=True))
        images = Counter(item.split for item in self.items)
        for split in SPLITS:
            names = self.parts[split]
            table.add_row(split, str(len({group[name] for name in names})), str(len(names)), str(images[split]))
        say(table)
