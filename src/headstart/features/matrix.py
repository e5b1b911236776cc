"""Rows of features: the shards of the cache, and the matrix that heads are trained on."""

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

Key = bytes  # 32 bytes that identify a row: the sha256 of an image's content, or of a view and the content

# Up to this size, in bytes, shards are verified and read into memory; larger ones are memory-mapped, not verified.
IN_MEMORY = 2**30


@dataclass(frozen=True)
class Shard:
    """A file of the cache."""

    rows: list[Key]  # the keys of the rows
    features: Tensor  # [rows, D] float32
    failures: dict[Key, str] = field(default_factory=dict)  # why images could not be read, by key
    seconds: float = 0.0  # time to compute it

    def to_bytes(self) -> bytes:
        """The content of the shard's file."""
        names = torch.frombuffer(bytearray(b"".join(self.rows)), dtype=torch.uint8) if self.rows else torch.empty(0)
        failures = json.dumps({row.hex(): reason for row, reason in self.failures.items()})
        metadata = {"failures": failures, "seconds": f"{self.seconds:.6f}"}
        tensors = {"features": self.features, "rows": names.to(torch.uint8).view(-1, 32)}
        return safetensors.torch.save(tensors, metadata)

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Memory-maps a shard; its features are read from disk on use.

        Raises:
            ValueError: the file has another format.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            features, names = file.get_tensor("features"), file.get_tensor("rows").numpy()
        if metadata is None or features.ndim != 2 or names.shape != (len(features), 32) or names.dtype != "uint8":
            raise ValueError("not a shard of features")
        failures = {bytes.fromhex(row): reason for row, reason in json.loads(metadata["failures"]).items()}
        return cls([name.tobytes() for name in names], features, failures, float(metadata["seconds"]))


class FeatureMatrix:
    """Features of ``rows``, in that order; in memory if the shards are small, else memory-mapped."""

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
        """A matrix from a tensor [N, D]."""
        rows = [number.to_bytes(32, "big") for number in range(len(features))]
        return cls([Shard(rows, features)], rows)

    def __len__(self) -> int:
        return len(self._row)

    @property
    def width(self) -> int:
        """The number of features of a row."""
        return (self._parts[0] if self._whole is None else self._whole).shape[1]

    def to(self, device: torch.device) -> "FeatureMatrix":
        """Moves the features to a GPU if they are in memory and take at most a quarter of its free memory."""
        if self._whole is not None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if self._whole.nbytes <= free / 4:
                self._whole = self._whole.to(device)
        return self

    def take(self, index: Tensor) -> "FeatureMatrix":
        """The matrix of the rows ``index``."""
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
        """All rows in order, up to ``size`` at a time; in memory they are slices, not copies."""
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

    views: Sequence[FeatureMatrix]  # one matrix of N rows per view
    labels: Tensor  # class indices, [N]

    @classmethod
    def of(cls, features: Tensor, labels: Tensor) -> "Labelled":
        """From tensors: features [N, D] and labels [N]."""
        return cls([FeatureMatrix.of(features)], labels)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Labelled":
        """The images ``index``."""
        return Labelled([view.take(index) for view in self.views], self.labels[index])

    def blocks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features of the first view and labels, up to ``size`` rows at a time, on the device of the features."""
        for block, truth in zip(self.views[0].blocks(size), torch.split(self.labels, size), strict=True):
            yield block, truth.to(block.device)

    def sample(self) -> Tensor:
        """The first row, [1, D], for its width and its device."""
        return self.views[0].gather(torch.arange(1))
