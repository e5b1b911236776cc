"""Rows of features: as they lie in the cache's files, and as the matrix that heads are trained on."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

Key = bytes  # 32 bytes that name a row: the sha256 of an image's content, or of that and a view

# Up to this size a matrix is read whole, checksums compared; above, it is memory-mapped (`headstart cache verify`).
IN_MEMORY = 2**30


@dataclass(frozen=True)
class Shard:
    """A piece of the cache."""

    rows: list[Key]  # the keys of the rows
    features: Tensor  # [rows, D] float32
    failures: dict[Key, str] = field(default_factory=dict)  # why images of this shard could not be read, by key
    seconds: float = 0.0  # what computing it took

    def to_bytes(self) -> bytes:
        """The content of its file."""
        names = torch.frombuffer(bytearray(b"".join(self.rows)), dtype=torch.uint8) if self.rows else torch.empty(0)
        failures = json.dumps({row.hex(): reason for row, reason in self.failures.items()})
        metadata = {"failures": failures, "seconds": f"{self.seconds:.6f}"}
        tensors = {"features": self.features, "rows": names.to(torch.uint8).view(-1, 32)}
        return safetensors.torch.save(tensors, metadata)

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Memory-maps a shard; its features are read from the disk when they are used.

        Raises:
            ValueError: it is a file of another form.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            features, names = file.get_tensor("features"), file.get_tensor("rows").numpy()
        if metadata is None or features.ndim != 2 or names.shape != (len(features), 32) or names.dtype != "uint8":
            raise ValueError("not the features of named rows")
        failures = {bytes.fromhex(row): reason for row, reason in json.loads(metadata["failures"]).items()}
        return cls([name.tobytes() for name in names], features, failures, float(metadata["seconds"]))


class FeatureMatrix:
    """Rows of features in the order that was asked for; in memory if the shards are small, else mapped from them."""

    def __init__(self, shards: Sequence[Shard], rows: Sequence[Key]) -> None:
        place = {row: number for number, row in enumerate(row for shard in shards for row in shard.rows)}
        number = torch.tensor([place[row] for row in rows], dtype=torch.long)
        ends = torch.tensor([len(shard.rows) for shard in shards]).cumsum(0)
        self._parts = [shard.features for shard in shards]
        self._shard = torch.bucketize(number, ends, right=True)
        self._row = number - torch.cat([torch.zeros(1, dtype=torch.long), ends])[self._shard]
        self._whole: Tensor | None = None
        if sum(part.nbytes for part in self._parts) <= IN_MEMORY:
            self._whole = self._collect(torch.arange(len(rows)))
            self._parts = []

    @classmethod
    def of(cls, features: Tensor) -> "FeatureMatrix":
        """The rows of a tensor, [N, D]."""
        rows = [number.to_bytes(32, "big") for number in range(len(features))]
        return cls([Shard(rows, features)], rows)

    def __len__(self) -> int:
        return len(self._row)

    def to(self, device: torch.device) -> "FeatureMatrix":
        """Moves the features to a device, if they are in memory and take no more than a quarter of what is free."""
        if self._whole is not None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self._whole.nbytes <= free / 4:
                self._whole = self._whole.to(device)
        return self

    def take(self, index: Tensor) -> "FeatureMatrix":
        """The matrix of those rows alone."""
        taken = copy.copy(self)
        taken._shard, taken._row = self._shard[index], self._row[index]
        if self._whole is not None:
            taken._whole = self.gather(index)
        return taken

    def gather(self, index: Tensor) -> Tensor:
        """[B] row numbers -> features [B, D]."""
        if self._whole is not None:
            return self._whole[index.to(self._whole.device)]
        return self._collect(index)

    def whole(self) -> Tensor:
        """All rows, [N, D]."""
        return self.gather(torch.arange(len(self)))

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All rows in order, up to ``size`` at a time; slices, not copies, while they are in memory."""
        if self._whole is not None:
            yield from torch.split(self._whole, size)
        else:
            yield from map(self._collect, torch.split(torch.arange(len(self)), size))

    def _collect(self, index: Tensor) -> Tensor:
        features = torch.empty(len(index), self._parts[0].shape[1] if self._parts else 0)
        shard, row = self._shard[index], self._row[index]
        order = shard.argsort(stable=True)
        present, counts = torch.unique_consecutive(shard[order], return_counts=True)
        for number, places in zip(present.tolist(), torch.split(order, counts.tolist()), strict=True):
            features[places] = self._parts[number][row[places]]
        return features


@dataclass(frozen=True)
class Labelled:
    """Features of images with their labels."""

    views: Sequence[FeatureMatrix]  # one matrix per view of the same N images
    labels: Tensor  # the class indices, [N]

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> "Labelled":
        """From tensors, [N, D] and [N]."""
        return cls([FeatureMatrix.of(features)], labels)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Labelled":
        """Those images alone."""
        return Labelled([view.take(index) for view in self.views], self.labels[index])

    def blocks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features of the first view and labels, up to ``size`` at a time, on the features' device."""
        for block, truth in zip(self.views[0].blocks(size), torch.split(self.labels, size), strict=True):
            yield block, truth.to(block.device)

    def sample(self) -> Tensor:
        """The first row, [1, D], for its width and its device."""
        return self.views[0].gather(torch.arange(1))
