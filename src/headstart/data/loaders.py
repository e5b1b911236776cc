"""From splits to batches: the order of an epoch, images decoded as they are needed, features sliced from a matrix."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from headstart.data.splits import Item
from headstart.features.cache import FeatureMatrix
from headstart.images import Augment, augment, preprocess, view_seed
from headstart.model.backbone import Preprocessing

# Rows are gathered for so many batches at once, so that a batch itself is a slice.
BATCHES_A_BLOCK = 64


class EpochOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (index, epoch), whose order is a function of the seed and the epoch alone.

    So a resumed run sees the batches that the uninterrupted run would have seen, and every rank knows the others'.
    In training, ranks get equally many samples, for which fewer samples than there are ranks are left out of an epoch;
    in evaluation each sample comes exactly once.

    Args:
        size: the number of samples.
        batch_size: samples a batch, over all ranks.
        seed: of the shuffling; None: in order, for evaluation.
        epoch: tells the epoch, when a loader asks for its first batch.
        rank: of this process.
        world_size: the number of processes.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int | None,
        epoch: Callable[[], int] = int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed, self._epoch = size, batch_size, seed, epoch
        self.rank, self.world_size = rank, world_size

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._epoch()

    def batches(self) -> list[Tensor]:
        """The indices of this rank's batches in the current epoch."""
        if self.seed is None:
            order = torch.arange(self.size)
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.size, generator=generator)
            order = order[: self.size - self.size % self.world_size]
        shares = (batch[self.rank :: self.world_size] for batch in torch.split(order, self.batch_size))
        return [share for share in shares if len(share)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self.batches():
            yield [(index, epoch) for index in batch.tolist()]

    def __len__(self) -> int:
        return len(self.batches()) if self.seed is None else -(-(self.size // self.world_size) // self._share)

    @property
    def _share(self) -> int:
        return self.batch_size // self.world_size


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images decoded when they are asked for, by (index, epoch); another epoch, another augmented view.

    Args:
        items: the images.
        read: decodes one to RGB; may raise ``UnreadableImage``.
        preprocessing: the backbone's.
        policy: of augmentation.
        seed: of augmentation.
    """

    def __init__(
        self,
        items: Sequence[Item],
        read: Callable[[Item], Image],
        preprocessing: Preprocessing,
        policy: Augment = "none",
        seed: int = 0,
    ) -> None:
        self.items, self.read, self.preprocessing = items, read, preprocessing
        self.policy: Augment = policy
        self.seed = seed

    def view(self, item: Item, view: int) -> Tensor:
        """[3, H, W] uint8 of an image: itself for view 0, else the augmented view of that number."""
        image = self.read(item)
        if view == 0:
            return preprocess(image, self.preprocessing)
        return augment(image, self.policy, self.preprocessing, view_seed(self.seed, item.digest, view))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, epoch = key
        item = self.items[index]
        return self.view(item, 0 if self.policy == "none" else epoch + 1), item.label

    def __len__(self) -> int:
        return len(self.items)


class ImageLoader(DataLoader[tuple[Tensor, int]]):
    """A ``DataLoader`` whose workers start when the first batch is asked for.

    Lightning makes the iterator before it restores a resumed run's epoch, and workers fetch ahead: the first resumed
    epoch would see the order of epoch 0 (pytorch-lightning#21938).
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()


class FeatureLoader:
    """Batches of (features [B, D], labels [B]), sliced from the matrix: no worker, no collation.

    Args:
        features: one matrix a view, of the same samples; an epoch takes the view of its number modulo their count.
        labels: the class index of each sample.
        order: of the samples.
    """

    def __init__(self, features: Sequence[FeatureMatrix], labels: Tensor, order: EpochOrder) -> None:
        self.features, self.labels = features, labels
        self.batch_sampler = order

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        view = self.features[self.batch_sampler.epoch % len(self.features)]
        batches = self.batch_sampler.batches()
        for start in range(0, len(batches), BATCHES_A_BLOCK):
            block = batches[start : start + BATCHES_A_BLOCK]
            rows = torch.cat(block)
            sizes = [len(batch) for batch in block]
            yield from zip(torch.split(view.gather(rows), sizes), torch.split(self.labels[rows], sizes), strict=True)

    def __len__(self) -> int:
        return len(self.batch_sampler)
