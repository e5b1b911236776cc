"""Episodes: few-shot tasks, each a pure function of the seed, the split and its number."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from headstart.data.splits import SPLITS, Split
from headstart.errors import UserError

Keys = npt.NDArray[np.uint64]


class Episode(NamedTuple):
    """A batch of B tasks: tell N classes apart from K examples each."""

    support: Tensor  # the examples, [B, N, K, D]
    query: Tensor  # the images to classify, [B, N, Q, D]; slot n is of the class of slot n of the support

    @property
    def labels(self) -> Tensor:
        """The slot of each query image, [N * Q], the same in each task."""
        _, n_way, n_query, _ = self.query.shape
        return torch.arange(n_way, device=self.query.device).repeat_interleave(n_query)


@dataclass(frozen=True)
class TaskSize:
    """The size of a task."""

    n_way: int  # classes
    k_shot: int  # examples per class
    n_query: int  # images to classify per class


class EpisodeSampler:
    """Draws tasks from the features [R, D] of all images; ``classes`` has the rows of each class of the split.

    Classes, their random order (slots), and their images come from a hash of (seed, split, number of the episode), so
    episode i does not depend on earlier ones, and all methods get the same episodes. Too few classes, or too few images
    in a class, are an error.
    """

    def __init__(
        self, features: Tensor, classes: Sequence[Sequence[int]], size: TaskSize, split: Split, seed: int
    ) -> None:
        self.size = size
        needed = size.k_shot + size.n_query
        if len(classes) < size.n_way:
            raise UserError(
                f"--n_way={size.n_way}: the {split} split has {len(classes)} classes with at least {needed} images "
                f"(k_shot + n_query); lower --n_way, --k_shot or --n_query, or change the split fractions"
            )
        if small := [len(rows) for rows in classes if len(rows) < needed]:
            raise UserError(f"--n_query={size.n_query}: a class has {min(small)} images, and {needed} are needed")
        self._features, self.device = features, features.device
        self._sizes = np.array([len(rows) for rows in classes])
        padded = [list(rows) + [0] * (int(self._sizes.max()) - len(rows)) for rows in classes]
        self._rows = torch.tensor(padded)
        self._key = np.array([seed, SPLITS.index(split)], dtype=np.uint64)

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Feature rows of the episodes with these numbers, [B, N, K + Q]."""
        size = self.size
        base = _mixed(_mixed(_mixed(np.array(list(numbers), dtype=np.uint64)) ^ self._key[0]) ^ self._key[1])
        by_class = _mixed(base[:, None] + np.arange(1, len(self._sizes) + 1).astype(np.uint64))
        classes = by_class.argsort(axis=1, kind="stable")[:, : size.n_way]
        own: Keys = np.take_along_axis(by_class, classes, axis=1)
        by_image = _mixed(own[..., None] ^ np.arange(1, self._rows.shape[1] + 1).astype(np.uint64))
        by_image[np.arange(self._rows.shape[1]) >= self._sizes[classes][..., None]] = np.iinfo(np.uint64).max
        images = by_image.argsort(axis=2, kind="stable")[..., : size.k_shot + size.n_query]
        return self._rows[torch.from_numpy(classes)[..., None], torch.from_numpy(images)]

    def batch(self, numbers: Sequence[int]) -> Episode:
        """The episodes with these numbers."""
        drawn = self._features[self.rows(numbers)]
        return Episode(drawn[:, :, : self.size.k_shot], drawn[:, :, self.size.k_shot :])


class EpisodeLoader:
    """Batches of episodes; ``start`` returns the number of the first one when iteration starts."""

    def __init__(self, sampler: EpisodeSampler, episodes: int, batch_size: int, start: Callable[[], int] = int) -> None:
        self._sampler, self._episodes, self._batch_size, self._start = sampler, episodes, batch_size, start

    def __iter__(self) -> Iterator[Episode]:
        first = self._start()
        end = first + self._episodes
        for number in range(first, end, self._batch_size):
            yield self._sampler.batch(range(number, min(number + self._batch_size, end)))

    def __len__(self) -> int:
        return -(-self._episodes // self._batch_size)


def _mixed(keys: Keys) -> Keys:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014): uniform, whatever its input."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
