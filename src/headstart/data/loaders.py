"""Batches of a split: the order of an epoch, images decoded on demand, features sliced from a matrix."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from PIL.Image import Image
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from headstart.data.splits import Item
from headstart.errors import UserError
from headstart.features.matrix import Labelled
from headstart.images import Preprocessing, Views

# Number of rows that are gathered at once; each batch is a slice of them.
ROWS_A_BLOCK = 16_384


class BatchOrder(Sampler[list[tuple[int, int]]]):
    """Batches of (index, epoch), in an order that depends only on the seed and the epoch.

    A resumed run sees the same batches as an uninterrupted one. In training, all ranks get the same number of samples,
    so up to world_size - 1 samples are left out of an epoch; in evaluation, with seed None, each sample occurs exactly
    once, in order.

    ``batch_size`` counts the samples of all ranks; ``epoch`` is called when a loader starts.
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
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, epoch
        self.rank, self.world_size = rank, world_size

    def batches(self) -> list[Tensor]:
        """The indices of the batches of this rank in the current epoch."""
        if self.seed is None:
            order = torch.arange(self.size)
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
            order = torch.randperm(self.size, generator=generator)
            order = order[: self.size - self.size % self.world_size]
        shares = (batch[self.rank :: self.world_size] for batch in torch.split(order, self.batch_size))
        return [share for share in shares if len(share)]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch()
        for batch in self.batches():
            yield [(index, epoch) for index in batch.tolist()]

    def __len__(self) -> int:
        if self.seed is None:
            return len(self.batches())
        return -(-(self.size // self.world_size) // (self.batch_size // self.world_size))


class ImageDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images decoded on demand, by (index, epoch); each epoch has its own augmented view."""

    def __init__(
        self,
        items: Sequence[Item],
        labels: Tensor,
        read: Callable[[Item], Image],
        preprocessing: Preprocessing,
        views: Views,
    ) -> None:
        self.items, self.labels, self.read, self.preprocessing, self.views = items, labels, read, preprocessing, views

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        index, epoch = key
        item = self.items[index]
        return self.views.view(self.read(item), item.digest, epoch + 1, self.preprocessing), self.labels[index]

    def __len__(self) -> int:
        return len(self.items)


class ImageLoader(DataLoader[tuple[Tensor, Tensor]]):
    """A ``DataLoader`` whose workers start when the first batch is requested.

    Lightning creates the iterator before it restores the epoch of a resumed run, and workers prefetch: the first
    resumed epoch would have the order of epoch 0 (pytorch-lightning#21938).
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:  # torch prepends the traceback of the worker process
            raise UserError(re.sub(r"\ACaught .*\n[\w.]+: ", "", str(error), flags=re.DOTALL).strip()) from error


class FeatureLoader:
    """Batches of (features [B, D], labels [B]), sliced from the matrix: no worker, no collation.

    Epoch e uses view e modulo the number of views.
    """

    def __init__(self, labelled: Labelled, order: BatchOrder) -> None:
        self.views, self.labels = labelled.views, labelled.labels
        self.batch_sampler = order

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        view = self.views[self.batch_sampler.epoch() % len(self.views)]
        batches = self.batch_sampler.batches()
        step = max(1, ROWS_A_BLOCK // self.batch_sampler.batch_size)
        for start in range(0, len(batches), step):
            block = batches[start : start + step]
            rows = torch.cat(block)
            sizes = [len(batch) for batch in block]
            yield from zip(torch.split(view.gather(rows), sizes), torch.split(self.labels[rows], sizes), strict=True)

    def __len__(self) -> int:
        return len(self.batch_sampler)


def trained_epochs(trainer: Trainer) -> int:
    """The number of completed epochs, correct also when a resumed run loads its first batch, unlike ``current_epoch``.

    Always 0 with ``overfit_batches``, since each epoch repeats the same batches.
    """
    processed: int = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return 0 if trainer.overfit_batches else processed  # type: ignore[attr-defined]
