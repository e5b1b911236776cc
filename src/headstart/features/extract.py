"""Computes the features of images."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from headstart.decoding import UnreadableImage
from headstart.features.arithmetic import BATCH
from headstart.features.int8 import Int8Backbone
from headstart.features.matrix import Key, Shard
from headstart.model.backbone import FrozenBackbone

# Batches decoded ahead while an accelerator computes. On a CPU both need the same cores: each batch is decoded by all
# threads, then computed by all threads, which is faster than competing for the cores.
BATCHES_AHEAD = 3


class NonFiniteFeatures(Exception):
    """The backbone returned NaN or infinity for the image of ``key``; such features are never cached."""

    def __init__(self, key: Key) -> None:
        super().__init__(f"features that are not finite, row {key.hex()}")
        self.key = key


@dataclass(frozen=True)
class Computed:
    """The features of a batch."""

    keys: Sequence[Key]  # of all images in the batch
    rows: list[Key]  # the keys of the readable images
    features: Tensor  # their features, [rows, D] float32
    failures: dict[Key, str]  # why the other images could not be read, by key


class Extractor:
    """Decodes images in threads and computes features; an accelerator computes while the next batches are decoded.

    ``network``, of ``network_of``, is made before any thread starts: torch.fx, which folds it, replaces
    ``nn.Module.__call__`` for all threads while it traces. ``read`` maps a key to pixels [3, H, W] uint8, and may raise
    ``UnreadableImage``.
    """

    def __init__(
        self,
        network: FrozenBackbone | Int8Backbone,
        read: Callable[[Key], Tensor],
        device: torch.device,
        workers: int,
    ) -> None:
        self.network = network
        self._read, self._device, self._workers = read, device, max(1, workers)
        self._ahead = 0 if device.type == "cpu" else BATCHES_AHEAD
        self._batch: Tensor | None = None

    def __call__(self, keys: Iterable[Key]) -> Iterator[Computed]:
        """The features of images in batches of 32, in order; ``keys`` is consumed lazily."""
        stream = iter(keys)
        decoding: deque[tuple[list[Key], list[Future[Tensor]]]] = deque()
        with ThreadPoolExecutor(self._workers) as pool:
            while batch := list(itertools.islice(stream, BATCH)):
                decoding.append((batch, [pool.submit(self._read, key) for key in batch]))
                if len(decoding) > self._ahead:
                    yield self._finish(*decoding.popleft())
            while decoding:
                yield self._finish(*decoding.popleft())

    def shard(self, keys: Sequence[Key], advance: Callable[[int], None]) -> Shard:
        """The features of images as one shard; raises ``NonFiniteFeatures`` if any is not finite."""
        started, parts = time.perf_counter(), []
        for part in self(keys):
            finite = part.features.isfinite().all(dim=1)
            if not finite.all():
                raise NonFiniteFeatures(part.rows[int(finite.int().argmin())])
            parts.append(part)
            advance(len(part.keys))
        rows = [row for part in parts for row in part.rows]
        failures = {key: reason for part in parts for key, reason in part.failures.items()}
        return Shard(rows, torch.cat([part.features for part in parts]), failures, time.perf_counter() - started)

    def _finish(self, keys: Sequence[Key], pixels: Sequence[Future[Tensor]]) -> Computed:
        images: list[Tensor] = []
        readable: list[Key] = []
        failures: dict[Key, str] = {}
        for key, future in zip(keys, pixels, strict=True):
            try:
                images.append(future.result())
                readable.append(key)
            except UnreadableImage as error:
                failures[key] = str(error)
        features = self._features(images) if images else torch.empty(0, self.network.num_features)
        return Computed(keys, readable, features, failures)

    @torch.no_grad()
    def _features(self, images: Sequence[Tensor]) -> Tensor:
        """Up to ``BATCH`` images, each [3, H, W] uint8 -> features [B, D] float32 on the CPU."""
        if self._batch is None:
            self._batch = images[0].new_empty(BATCH, *images[0].shape)
        padded = [*images, *[images[0]] * (BATCH - len(images))]
        torch.stack(padded, out=self._batch)  # reuses memory: new pages cost more than the copy
        computed: Tensor = self.network(self._batch.to(self._device))
        return computed[: len(images)].cpu()
