"""The feature cache: features are computed once and stored under a key of everything that they depend on.

A folder of immutable shards. Each belongs to one key, which covers everything that the values depend on except the
image, and stores rows by the hash of the image content. Labels and splits are not part of the key: after relabelling,
re-splitting or adding images, only new images are computed.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from headstart.decoding import DECODER_VERSION, heif_version
from headstart.features import matrix
from headstart.features.arithmetic import BATCH
from headstart.features.extract import Extractor
from headstart.features.hashes import verify
from headstart.features.int8 import Int8Backbone
from headstart.features.matrix import FeatureMatrix, Key, Shard
from headstart.files import flat, write_atomically
from headstart.model.backbone import FrozenBackbone, combined, tensor_digests
from headstart.terminal import images_bar, say, say_all

# Number of cached rows recomputed at each use of a cache, and the tolerance relative to the norm of a row; another
# image differs by 5 % or more, even at random weights. fp32 rows are recomputed without folding; bf16 rows by the copy
# that made them, since EfficientNet-Lite0's differ from fp32's by up to 9 %; int8 rows by the engine that made them.
PROBED, PROBE_TOLERANCE, INT8_TOLERANCE = 4, 0.03, 1e-3
# Another process may prune new shards; the last attempt keeps them in memory.
ATTEMPTS = 3


def cache_key(
    backbone: FrozenBackbone,
    device: torch.device,
    dtype: torch.dtype,
    max_pixels: int,
    views: dict[str, Any],
    int8: Int8Backbone | None = None,
) -> dict[str, Any]:
    """Everything that features depend on besides the image content, as plain values; ``int8``: what computes them."""
    import PIL
    import torchvision

    return {
        "backbone": backbone.name,
        "layers": backbone.layers if getattr(backbone.net, "mirror", True) else f"{backbone.layers}, not mirrored",
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
        }
        | ({"dtype": "int8", **int8.key} if int8 else {}),
        "versions": {
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        }
        | ({"heif": heif} if (heif := heif_version()) else {})
        | dict(backbone.versions),
    }


def chunk_size(rows: int) -> int:
    """The rows per shard: 64 for a small folder, so that processes can share the work, up to 4,096 for a large one."""
    return int(BATCH * 2 ** max(1, min(7, (rows // (64 * BATCH)).bit_length())))


class FeatureCache:
    """The features stored under one key of ``cache_key``.

    A process that needs missing rows locks a chunk of them, computes it and writes it atomically; then it waits for the
    chunks that other processes hold, and takes over those whose owner died. This works for ranks, separate runs and
    resumed runs. If the folder is not writable, the features are computed for this run only.
    """

    def __init__(self, folder: Path, key: dict[str, Any], int8: Int8Backbone | None = None) -> None:
        self._key = json.dumps(key, indent=1, sort_keys=True)
        self.folder = folder / "features" / hashlib.sha256(self._key.encode()).hexdigest()[:32]
        self._int8 = int8
        self._opened: dict[Path, Shard] = {}
        self._unsaved: list[Shard] = []
        self._writable = True

    def fill(
        self,
        rows: Sequence[Key],
        read: Callable[[Key], Tensor],
        backbone: FrozenBackbone,
        device: torch.device,
        workers: int,
    ) -> dict[Key, str]:
        """Computes the missing rows; returns the rows without features, each with the reason.

        ``read`` is called in ``workers`` threads: row -> pixels [3, H, W] uint8; it may raise ``UnreadableImage``.
        """
        wanted, found = set(rows), self.read()
        if not self._agree(found, wanted, read, backbone):
            found = self._discard()
        missing = _missing(wanted, found)
        self._writable = self._prepare()
        self._say_what_is_there(found, len(wanted), len(missing))
        if missing:
            key = json.loads(self._key)
            if combined(tensor_digests(backbone)) != key["weights"]:
                raise RuntimeError("the backbone changed after its digest was taken; its features are not cached")
            network = self._int8 or backbone.for_extraction(getattr(torch, key["arithmetic"]["dtype"]), device)
            extractor = Extractor(network, read, device, workers)
            for attempt in range(ATTEMPTS):
                self._compute(sorted(missing), chunk_size(len(wanted)), extractor)
                found = self.read()
                if not (missing := _missing(wanted, found)):
                    break
                self._writable = attempt < ATTEMPTS - 2 and self._prepare()
        failures = {row: reason for shard in found for row, reason in shard.failures.items()}
        return {row: failures[row] for row in rows if row in failures} if failures else {}

    def matrix(self, rows: Sequence[Key]) -> FeatureMatrix:
        """The features of rows that are cached."""
        return FeatureMatrix([*self._opened.values(), *self._unsaved], rows)

    def read(self) -> list[Shard]:
        """All readable shards; damaged ones are deleted, so that their rows are recomputed."""
        sizes: dict[Path, int] = {}
        with suppress(OSError):  # an unreadable folder
            for path in sorted(self.folder.glob("*.safetensors")):
                with suppress(FileNotFoundError):  # pruned since it was listed
                    sizes[path] = path.stat().st_size
        total, damaged = sum(sizes.values()), []
        for path in sizes:
            if path in self._opened:
                continue
            try:
                if total <= matrix.IN_MEMORY:
                    verify(path)
                self._opened[path] = Shard.open(path)
            except FileNotFoundError:
                continue
            except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
                damaged.append(f"features: {path.name} is damaged and will be recomputed ({error})")
                with suppress(OSError):
                    path.unlink()
        say_all(damaged)
        return [*self._opened.values(), *self._unsaved]

    def _agree(
        self, found: Sequence[Shard], wanted: Set[Key], read: Callable[[Key], Tensor], backbone: FrozenBackbone
    ) -> bool:
        """Whether a few random cached rows match what the backbone computes for their images now."""
        known = [row for shard in found for row in shard.rows if row in wanted]
        # Not a seeded generator: the results of a run must not depend on what is cached.
        rows = random.SystemRandom().sample(known, min(PROBED, len(known)))
        if not rows:
            return True
        picked = set(rows)
        cached = FeatureMatrix([shard for shard in found if not picked.isdisjoint(shard.rows)], rows)
        device, dtype = backbone.mean.device, json.loads(self._key)["arithmetic"]["dtype"]
        probe = self._int8 or (backbone if dtype == "float32" else backbone.for_extraction(torch.bfloat16, device))
        tolerance = INT8_TOLERANCE if self._int8 else PROBE_TOLERANCE
        with torch.no_grad():
            pixels = torch.stack([read(row) for row in rows]).to(device)
            now, then = probe(pixels).cpu(), cached.whole()
        return bool(((now - then).norm(dim=1) <= tolerance * now.norm(dim=1)).all())

    def _discard(self) -> list[Shard]:
        """Deletes all shards of this key."""
        say("features: cached rows differ from what the backbone computes for their images; all are recomputed")
        for path in self._opened:
            with suppress(OSError):
                path.unlink()
        self._opened, self._unsaved = {}, []
        return []

    def _prepare(self) -> bool:
        """Creates the folder; False, with a message, if it is not writable."""
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            described = self.folder / "key.json"
            if not described.exists() or described.read_bytes() != self._key.encode():
                write_atomically(described, self._key.encode())
            os.utime(described)  # time of last use, for `headstart cache prune`
        except OSError as error:
            say(f"features: {self.folder} cannot be written ({error.strerror}); computed for this run only")
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
        """How this key differs from the nearest one that has features."""
        if not self._writable:
            return "the cache cannot be used"
        if any(self.folder.glob("*.safetensors")):
            return "only other images are cached"
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

    def _compute(self, missing: Sequence[Key], size: int, extractor: Extractor) -> None:
        """Computes the chunks that no other process holds, then waits for the others."""
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        with images_bar("features", len(missing)) as advance:
            held = [chunk for chunk in chunks if not self._compute_chunk(chunk, extractor, advance, wait=False)]
            if held:
                say(f"features: waiting for {len(held)} chunks that another process computes")
            for chunk in held:  # one at a time: holding a lock while waiting could deadlock
                self._compute_chunk(chunk, extractor, advance, wait=True)

    def _compute_chunk(
        self, keys: Sequence[Key], extractor: Extractor, advance: Callable[[int], None], wait: bool
    ) -> bool:
        """Computes and writes rows unless they are cached; False: another process holds them."""
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:24]  # the same in every process
        try:
            with self._locked(name, wait):
                if self._writable and next(self.folder.glob(f"{name}-*"), None):
                    advance(len(keys))
                else:
                    self._write(name, extractor.shard(keys, advance))
        except Timeout:
            return False
        return True

    @contextmanager
    def _locked(self, name: str, wait: bool) -> Iterator[None]:
        if not self._writable:
            yield
            return
        with FileLock(self.folder / "locks" / f"{name}.lock").acquire(timeout=-1 if wait else 0):
            yield

    def _write(self, name: str, shard: Shard) -> None:
        """Writes a shard, with its checksum in the file name; keeps it in memory if it cannot be written."""
        data = shard.to_bytes()
        if self._writable:
            try:
                write_atomically(self.folder / f"{name}-{hashlib.sha256(data).hexdigest()}.safetensors", data)
                return
            except OSError as error:
                say(f"features: cannot be written to {self.folder} ({error.strerror}; {len(data):,} bytes per shard)")
                self._writable = False
        self._unsaved.append(shard)


def _missing(wanted: Set[Key], found: Iterable[Shard]) -> set[Key]:
    missing = set(wanted)
    for shard in found:
        missing.difference_update(shard.rows, shard.failures)
    return missing
