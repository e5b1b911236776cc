"""The frozen features of images: computed once, kept safely, read as one matrix.

The cache is a folder of shards that are written once and never changed. Each belongs to one key, which names all that
the numbers depend on, and holds rows under the hash of the image's content. Labels and splits are not in the key, so
relabelling, re-splitting and adding images cost only what is new.
"""

import copy
import hashlib
import json
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import platformdirs
import safetensors.torch
import torch
from filelock import BaseFileLock, FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headstart.files import flat, write_atomically
from headstart.images import DECODER_VERSION, UnreadableImage
from headstart.model.backbone import FrozenBackbone
from headstart.terminal import images_bar, say

FeaturePrecision = Literal["auto", "bf16", "fp32"]
Row = bytes  # 32 bytes that name a row: the sha256 of an image's content, or of that and a view
Read = Callable[[Row], Tensor]

# Features of an image change in their last bits with the batch size, so it is fixed, and the last batch is padded.
BATCH = 32
# Batches that are decoded ahead, while an accelerator computes. On a processor both need the same cores: there a batch
# is decoded by all threads, then computed by all threads, which is faster than letting them get in each other's way.
BATCHES_AHEAD = 3
# So many cached rows are computed again whenever a cache is used, in fp32 and without folding. bf16 is off by up to
# 1.4 % of a row's length on torchvision's families; another image's row by 5 % and more, even with random weights.
PROBED, PROBE_TOLERANCE = 4, 0.03
# Another process may prune what was just written; the last attempt stays in memory.
ATTEMPTS = 3
# Up to this size a matrix is read whole, checksums compared; above, it is memory-mapped (`headstart cache verify`).
IN_MEMORY = 2**30


def cache_folder(chosen: str | None = None) -> Path:
    """``--data.cache_dir``, else ``$HEADSTART_CACHE``, else the user's cache folder."""
    return Path(chosen or os.environ.get("HEADSTART_CACHE") or platformdirs.user_cache_dir("headstart")).expanduser()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware; where it is emulated it is far slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False


def feature_dtype(precision: FeaturePrecision, device: torch.device) -> torch.dtype:
    """The arithmetic of the extraction; ``auto`` looks at the device and never times it."""
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def cache_key(
    backbone: FrozenBackbone, device: torch.device, dtype: torch.dtype, max_pixels: int, views: dict[str, Any]
) -> dict[str, Any]:
    """All that the features of an image's content depend on, as plain values."""
    import PIL
    import torchvision

    return {
        "backbone": backbone.name,
        "weights": backbone.digest(),
        "preprocessing": json.loads(json.dumps(asdict(backbone.preprocessing))),
        "decoder": {"version": DECODER_VERSION, "max_pixels": max_pixels},
        "views": views,
        "arithmetic": {
            "dtype": str(dtype).removeprefix("torch."),
            "layout": "channels_last",
            "folded": True,
            "batch": BATCH,
            "device": device.type,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
    }


class NonFiniteFeatures(Exception):
    """The backbone gave NaN or infinity for an image, which is never cached.

    Attributes:
        row: the row of the image.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(f"features that are not finite, row {row.hex()}")
        self.row = row


@dataclass(frozen=True)
class Shard:
    """A piece of the cache.

    Attributes:
        rows: the names of the rows.
        features: [rows, D] float32.
        failures: why images of this shard could not be read, by row.
        seconds: what computing it took.
    """

    rows: list[Row]
    features: Tensor
    failures: dict[Row, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_bytes(self) -> bytes:
        """The content of its file."""
        names = torch.frombuffer(bytearray(b"".join(self.rows)), dtype=torch.uint8) if self.rows else torch.empty(0)
        failures = json.dumps({row.hex(): reason for row, reason in self.failures.items()})
        metadata = {"failures": failures, "seconds": f"{self.seconds:.6f}"}
        tensors = {"features": self.features, "rows": names.to(torch.uint8).view(-1, 32)}
        return safetensors.torch.save(tensors, metadata)

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Memory-maps a shard; its features are read from the disk when they are used."""
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            features, names = file.get_tensor("features"), file.get_tensor("rows").numpy()
        failures = {bytes.fromhex(row): reason for row, reason in json.loads(metadata["failures"]).items()}
        return cls([name.tobytes() for name in names], features, failures, float(metadata["seconds"]))


class FeatureMatrix:
    """Rows of features in the order that was asked for; in memory if the shards are small, else mapped from them.

    Args:
        shards: that hold the rows.
        rows: the names of the rows, in order.
    """

    def __init__(self, shards: Sequence[Shard], rows: Sequence[Row]) -> None:
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
class Chunk:
    """Rows that are computed and written together."""

    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """The same rows, the same name, in whichever process."""
        return hashlib.sha256(b"".join(self.rows)).hexdigest()[:24]


def chunk_size(rows: int) -> int:
    """64 rows for a small folder, so that processes can share the work, up to 4,096 for a large one."""
    return int(BATCH * 2 ** max(1, min(7, (rows // (64 * BATCH)).bit_length())))


class FeatureCache:
    """The features under one key.

    Whoever needs missing rows takes the lock of a chunk of them, computes it and writes it atomically; then it waits
    for the chunks that others hold, and takes over those whose owner died. Ranks, separate runs and resumed runs are
    all served by that. Where the folder cannot be written the features are computed for this run alone.

    Args:
        folder: of the whole cache.
        key: as ``cache_key`` makes it.
    """

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._key = json.dumps(key, indent=1, sort_keys=True)
        self.folder = folder / "features" / hashlib.sha256(self._key.encode()).hexdigest()[:32]
        self._opened: dict[Path, Shard] = {}
        self._unsaved: list[Shard] = []
        self._writable = True

    def fill(
        self, rows: Sequence[Row], read: Read, backbone: FrozenBackbone, device: torch.device, workers: int
    ) -> dict[Row, str]:
        """Computes those of ``rows`` that are missing -> why images among them have no features.

        Args:
            rows: the names of the rows; repeated ones are computed once.
            read: gives the pixels of a row, [3, H, W] uint8; may raise ``UnreadableImage``.
            backbone: computes them, in the dtype that the key names.
            device: on which it computes them.
            workers: threads that decode meanwhile.
        """
        wanted, found = set(rows), self.read()
        if not self._agree(found, wanted, read, backbone):
            found = self._discard()
        missing = _missing(wanted, found)
        self._writable = self._prepare()
        self._say_what_is_there(found, len(wanted), len(missing))
        if missing:
            dtype = getattr(torch, json.loads(self._key)["arithmetic"]["dtype"])
            extractor = Extractor(read, backbone.for_extraction(dtype, device), device, workers)
            for attempt in range(ATTEMPTS):
                self._compute(sorted(missing), chunk_size(len(wanted)), extractor)
                found = self.read()
                if not (missing := _missing(wanted, found)):
                    break
                self._writable = attempt < ATTEMPTS - 2 and self._prepare()
        failures = {row: reason for shard in found for row, reason in shard.failures.items()}
        return {row: failures[row] for row in rows if row in failures} if failures else {}

    def matrix(self, rows: Sequence[Row]) -> FeatureMatrix:
        """The features of rows that are there."""
        return FeatureMatrix([*self._opened.values(), *self._unsaved], rows)

    def read(self) -> list[Shard]:
        """All readable shards; a damaged one is deleted, so that its rows are computed again."""
        sizes: dict[Path, int] = {}
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []:
            with suppress(FileNotFoundError):  # pruned since it was listed
                sizes[path] = path.stat().st_size
        total = sum(sizes.values())
        for path in sizes:
            if path in self._opened:
                continue
            try:
                if total <= IN_MEMORY:
                    verify(path)
                self._opened[path] = Shard.open(path)
            except FileNotFoundError:
                continue
            except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
                say(f"features: {path.name} is damaged and will be computed again ({error})")
                with suppress(OSError):
                    path.unlink()
        return [*self._opened.values(), *self._unsaved]

    def _agree(self, found: Sequence[Shard], wanted: Set[Row], read: Read, backbone: FrozenBackbone) -> bool:
        """Whether a random few of the cached rows are what the backbone makes of their images now."""
        known = [row for shard in found for row in shard.rows if row in wanted]
        # Not torch's generator, nor the seeded one: a run's numbers should not depend on what is cached.
        rows = random.SystemRandom().sample(known, min(PROBED, len(known)))
        if not rows:
            return True
        picked = set(rows)
        cached = FeatureMatrix([shard for shard in found if not picked.isdisjoint(shard.rows)], rows)
        with torch.no_grad():
            pixels = torch.stack([read(row) for row in rows]).to(next(backbone.parameters()).device)
            now, then = backbone(pixels).cpu(), cached.gather(torch.arange(len(rows)))
        return bool(((now - then).norm(dim=1) <= PROBE_TOLERANCE * now.norm(dim=1)).all())

    def _discard(self) -> list[Shard]:
        """Deletes all under this key."""
        say("features: cached rows are not what the backbone makes of their images; all are computed again")
        for path in self._opened:
            with suppress(OSError):
                path.unlink()
        self._opened, self._unsaved = {}, []
        return []

    def _prepare(self) -> bool:
        """Makes the folder; False, said once, where it cannot be written."""
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            described = self.folder / "key.json"
            if not described.exists() or described.read_bytes() != self._key.encode():
                write_atomically(described, self._key.encode())
            os.utime(described)  # when it was last used, for `headstart cache prune`
        except OSError as error:
            say(f"features: {self.folder} cannot be written ({error.strerror}); computed for this run alone")
            return False
        return True

    def _say_what_is_there(self, found: Sequence[Shard], wanted: int, missing: int) -> None:
        took = sum(shard.seconds for shard in found)
        share = (wanted - missing) / max(1, sum(len(shard.rows) for shard in found))
        if not missing:
            say(f"features: HIT, all {wanted} images are in {self.folder} (saves about {took * share:.1f} s)")
        elif missing < wanted:
            say(f"features: PARTIAL, {missing} of {wanted} images are new (the rest saves about {took * share:.1f} s)")
        else:
            say(f"features: MISS, {wanted} images to compute ({self._reason()})")

    def _reason(self) -> str:
        """How the nearest key that has features differs from this one."""
        if any(self.folder.glob("*.safetensors")):
            return "other images so far"
        mine = flat(json.loads(self._key))
        differences = []
        for path in sorted(self.folder.parent.glob("*/key.json")):
            with suppress(OSError, ValueError, AttributeError):
                other = flat(json.loads(path.read_text()))
                changed = [name for name in mine | other if mine.get(name) != other.get(name)]
                if changed and any(path.parent.glob("*.safetensors")):
                    differences.append(sorted(changed))
        if not differences:
            return "the cache is empty"
        return f"new: {', '.join(min(differences, key=len)[:4])}"

    def _compute(self, missing: Sequence[Row], size: int, extractor: "Extractor") -> None:
        chunks = [Chunk(tuple(missing[i : i + size])) for i in range(0, len(missing), size)]
        with images_bar("features", len(missing)) as advance:
            held = self._run(chunks, extractor, advance, wait=False)
            if held:
                say(f"features: waiting for {len(held)} pieces that another process computes")
            for chunk in held:  # one at a time: who waits must hold nothing that others wait for
                self._run([chunk], extractor, advance, wait=True)

    def _run(
        self, chunks: Sequence[Chunk], extractor: "Extractor", advance: Callable[[int], None], wait: bool
    ) -> list[Chunk]:
        """Computes and writes the chunks that no other process holds; gives those that one does."""
        locks: dict[Chunk, BaseFileLock | None] = {}
        held: list[Chunk] = []

        def batches() -> Iterator[tuple[Chunk, tuple[Row, ...]]]:
            for chunk in chunks:
                try:
                    lock = self._lock(chunk, wait)
                except Timeout:
                    held.append(chunk)
                    continue
                if next(self.folder.glob(f"{chunk.name}-*"), None):
                    advance(len(chunk.rows))
                    if lock:
                        lock.release()
                    continue
                locks[chunk] = lock
                yield from ((chunk, chunk.rows[i : i + BATCH]) for i in range(0, len(chunk.rows), BATCH))

        try:
            for chunk, shard in _whole_chunks(extractor(batches()), advance):
                self._write(chunk, shard)
                if lock := locks.pop(chunk):
                    lock.release()
        finally:
            for lock in locks.values():
                if lock:
                    lock.release()
        return held

    def _lock(self, chunk: Chunk, wait: bool) -> BaseFileLock | None:
        if not self._writable:
            return None
        lock = FileLock(self.folder / "locks" / f"{chunk.name}.lock")
        lock.acquire(timeout=-1 if wait else 0)
        return lock

    def _write(self, chunk: Chunk, shard: Shard) -> None:
        """Writes the shard under a name that holds its checksum; keeps it in memory where the disk refuses."""
        data = shard.to_bytes()
        if self._writable:
            try:
                write_atomically(self.folder / f"{chunk.name}-{hashlib.sha256(data).hexdigest()}.safetensors", data)
                return
            except OSError as error:
                say(f"features: cannot be written to {self.folder} ({error.strerror}; {len(data):,} bytes a piece)")
                self._writable = False
        self._unsaved.append(shard)


def _missing(wanted: Set[Row], found: Iterable[Shard]) -> set[Row]:
    missing = set(wanted)
    for shard in found:
        missing.difference_update(shard.rows, shard.failures)
    return missing


def verify(path: Path) -> None:
    """Compares a shard's content with the checksum in its name.

    Raises:
        ValueError: they differ.
    """
    if hashlib.sha256(path.read_bytes()).hexdigest() != path.stem.rsplit("-", 1)[-1]:
        raise ValueError("checksum differs")


@dataclass(frozen=True)
class Computed:
    """What the backbone made of a batch: the rows that could be read, their features, and the other rows' reasons."""

    rows: list[Row]
    features: Tensor
    failures: dict[Row, str]


class Extractor:
    """Decodes in threads; while an accelerator computes, those of the next batches.

    Args:
        read: gives the pixels of a row, [3, H, W] uint8.
        backbone: the copy that computes. It is made before the threads start: torch.fx, which folds it, replaces
            ``nn.Module.__call__`` for every thread while it traces.
        device: where it is.
        workers: the number of threads.
    """

    def __init__(self, read: Read, backbone: FrozenBackbone, device: torch.device, workers: int) -> None:
        self._read, self._backbone, self._device, self._workers = read, backbone, device, workers
        self._batch: Tensor | None = None

    def __call__(self, batches: Iterable[tuple[Chunk, tuple[Row, ...]]]) -> Iterator[tuple[Chunk, Computed]]:
        """Gives the batches in order, each when it is computed."""
        ahead: deque[tuple[Chunk, tuple[Row, ...], list[Future[Tensor]]]] = deque()
        with ThreadPoolExecutor(max(1, self._workers)) as pool:
            for chunk, rows in batches:
                ahead.append((chunk, rows, [pool.submit(self._read, row) for row in rows]))
                if len(ahead) > (0 if self._device.type == "cpu" else BATCHES_AHEAD):
                    chunk, rows, pixels = ahead.popleft()
                    yield chunk, self._finish(rows, pixels)
            while ahead:
                chunk, rows, pixels = ahead.popleft()
                yield chunk, self._finish(rows, pixels)

    def _finish(self, rows: Sequence[Row], pixels: Sequence[Future[Tensor]]) -> Computed:
        images: list[Tensor] = []
        readable: list[Row] = []
        failures: dict[Row, str] = {}
        for row, future in zip(rows, pixels, strict=True):
            try:
                images.append(future.result())
                readable.append(row)
            except UnreadableImage as error:
                failures[row] = str(error)
        if not images:
            return Computed([], torch.empty(0, self._backbone.num_features), failures)
        return Computed(readable, self.features(images), failures)

    @torch.no_grad()
    def features(self, images: Sequence[Tensor]) -> Tensor:
        """Up to ``BATCH`` images, each [3, H, W] uint8 -> features [B, D] float32 on the CPU."""
        if self._batch is None:
            self._batch = images[0].new_empty(BATCH, *images[0].shape)
        padded = [*images, *[images[0]] * (BATCH - len(images))]
        torch.stack(padded, out=self._batch)  # into the same memory each time: new pages cost more than the copy
        computed: Tensor = self._backbone(self._batch.to(self._device))
        return computed[: len(images)].cpu()


def _whole_chunks(
    computed: Iterable[tuple[Chunk, Computed]], advance: Callable[[int], None]
) -> Iterator[tuple[Chunk, Shard]]:
    """Joins the batches of each chunk; they come in order."""
    parts: list[Computed] = []
    done, started = 0, time.perf_counter()
    for chunk, part in computed:
        if not part.features.isfinite().all():
            raise NonFiniteFeatures(part.rows[int(part.features.isfinite().all(dim=1).int().argmin())])
        parts.append(part)
        size = len(part.rows) + len(part.failures)
        done += size
        advance(size)
        if done == len(chunk.rows):
            rows = [row for each in parts for row in each.rows]
            failures = {row: reason for each in parts for row, reason in each.failures.items()}
            now = time.perf_counter()
            yield chunk, Shard(rows, torch.cat([each.features for each in parts]), failures, now - started)
            parts, done, started = [], 0, now
