"""The readable images of a source, and their cached features."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from headstart.data.sources import Source
from headstart.data.splits import Item
from headstart.decoding import MAX_PIXELS, UnreadableImage, bits_of
from headstart.device import device_of
from headstart.errors import UserError
from headstart.features.arithmetic import Arithmetic, FeaturePrecision, chosen, dtype_of
from headstart.features.cache import FeatureCache, cache_key
from headstart.features.extract import NonFiniteFeatures
from headstart.features.hashes import cache_folder
from headstart.features.int8 import Int8Backbone
from headstart.features.matrix import FeatureMatrix, Key
from headstart.images import Preprocessing, Views, preprocess
from headstart.model.backbone import BACKBONE_OPTIONS, FrozenBackbone
from headstart.model.weights import for_data
from headstart.terminal import Seconds, images_bar, say

# What commands call arguments of ``FeatureStore``.
STORE_OPTIONS = ("num_workers", "cache_dir", "feature_precision", "max_pixels")
LONG, MANY_LONG = 2.0, 0.1  # an aspect ratio, and the share of such images that is reported
# More skipped images than this number and this share are an error.
MAX_SKIPPED, MAX_SKIPPED_SHARE = 5, 0.05


class FeatureStore:
    """The readable images of a source, and feature matrices of any of them; the options are those of ``ImageData``.

    Without a cache there are no features, and ``load`` decodes all images once to find unreadable ones.
    """

    def __init__(
        self,
        source: Source,
        num_workers: int | None = None,
        cache_dir: str | None = None,
        feature_precision: FeaturePrecision = "auto",
        max_pixels: int = MAX_PIXELS,
        cache: bool = True,
    ) -> None:
        self.source, self.cache, self.max_pixels = source, cache, max_pixels
        self.workers = max(1, min(8, os.cpu_count() or 1) if num_workers is None else num_workers)
        self.cache_dir = cache_folder(cache_dir)
        self.feature_precision: FeaturePrecision = feature_precision
        self.arithmetic: Arithmetic  # what it is for these images, after ``load``
        self.items: list[Item] = []  # the readable images, after ``load``
        self.skipped: dict[str, str] = {}  # the reason for each other image, by path
        self.seconds = Seconds("scan", "features")
        self.backbone: FrozenBackbone
        self.device: torch.device
        self._int8: Int8Backbone | None = None
        self._caches: dict[Views, FeatureCache] = {}
        self._loaded: tuple[str, Preprocessing] | None = None

    def load(self, backbone: FrozenBackbone, device: torch.device) -> bool:
        """Scans the source and computes missing features; False: already loaded for this backbone."""
        if (backbone.digest(), backbone.preprocessing) == self._loaded:
            return False
        self.backbone, self.device, self._caches = backbone, device, {}
        with self.seconds.of("scan"):
            found, self.skipped = self.source.scan(self.cache_dir / "index" if self.cache else None)
            if self.source.all_in:
                found = [replace(item, split=self.source.all_in) for item in found]
        self._choose_bits()
        self._say_what_is_cut_off()
        if self.cache:
            self.arithmetic = chosen(self.feature_precision, backbone, device, len(found), self.cache_dir)
            if self.arithmetic == "int8":
                with self.seconds.of("quantise"):
                    self._int8 = Int8Backbone(backbone, self.cache_dir)
            failures = self._fill({item.digest: item for item in found}, Views(), 0)
            self.skipped |= {item.path: failures[item.digest] for item in found if item.digest in failures}
        else:
            with self.seconds.of("scan"):
                self._decode_all(found)
        self.items = [item for item in found if item.path not in self.skipped]
        self._loaded = backbone.digest(), replace(backbone.preprocessing)
        return True

    def _choose_bits(self) -> None:
        """Chooses the scale of images of more than 8 bits by the largest value, unless the checkpoint has one."""
        preprocessing, largest = self.backbone.preprocessing, int(self.source.measured[:, 0].max(initial=0))
        preprocessing.bits = preprocessing.bits or bits_of(largest)
        if largest:
            say(f"data: images of more than 8 bits have values up to {largest}; {preprocessing.white} becomes white")

    def _say_what_is_cut_off(self) -> None:
        """Reports images of which a centre crop shows less than half, if they are many."""
        long = int((self.source.measured[:, 1] >= LONG).sum())
        if self.backbone.preprocessing.fit == "crop" and long > MANY_LONG * len(self.source.measured):
            say(
                f"data: {long} of {len(self.source.measured)} images are at least twice as long as wide, and a centre "
                "crop shows less than half of them; try --model.fit=pad"
            )

    def read(self, item: Item) -> Image.Image:
        """Decodes an image to RGB, at least as large as the backbone needs it."""
        return self.source.read(item, self.backbone.preprocessing, self.max_pixels)

    def check_skips(self) -> None:
        """Reports the skipped images; ``UserError`` if they are too many."""
        if not self.skipped:
            return
        first = "; ".join(f"{path}: {reason}" for path, reason in list(self.skipped.items())[:3])
        total = len(self.items) + len(self.skipped)
        if len(self.skipped) > max(MAX_SKIPPED, MAX_SKIPPED_SHARE * total):
            raise UserError(f"{len(self.skipped)} of {total} images cannot be read ({first}); fix or remove them")
        say(f"data: {len(self.skipped)} of {total} images are left out ({first}); all in skipped.csv")

    def matrix(self, items: Sequence[Item], views: Views | None = None, number: int = 0) -> FeatureMatrix:
        """The features of one view of images, computed if missing; view 0 is the image itself."""
        if not number or views is None:
            return self._caches[Views()].matrix([item.digest for item in items])
        keys = [hashlib.sha256(b"view %d " % number + item.digest).digest() for item in items]
        self._fill(dict(zip(keys, items, strict=True)), views, number)
        return self._caches[views].matrix(keys)

    def _fill(self, items: dict[Key, Item], views: Views, number: int) -> dict[Key, str]:
        """Computes the missing features of one view; returns the reason for each key without features."""

        def pixels(key: Key) -> Tensor:
            item = items[key]
            return views.view(self.read(item), item.digest, number, self.backbone.preprocessing)

        if views not in self._caches:
            self._caches[views] = FeatureCache(self.cache_dir, self._key(views), self._int8)
        with self.seconds.of("features"):
            try:
                return self._caches[views].fill(list(items), pixels, self.backbone, self.device, self.workers)
            except NonFiniteFeatures as error:
                raise UserError(f"{items[error.key].path}: its features are not finite; remove it") from error

    def _key(self, views: Views) -> dict[str, object]:
        described = {"policy": "none"} if views == Views() else asdict(views)
        dtype = dtype_of(self.arithmetic)
        return cache_key(self.backbone, self.device, dtype, self.max_pixels, described, self._int8)

    def _decode_all(self, items: Sequence[Item]) -> None:
        """Finds unreadable images by decoding all once, as the feature extraction does with a cache."""

        def reason(item: Item) -> str | None:
            try:
                preprocess(self.read(item), self.backbone.preprocessing)
            except UnreadableImage as error:
                return str(error)
            return None

        with ThreadPoolExecutor(self.workers) as pool, images_bar("checking", len(items)) as advance:
            for item, why in zip(items, pool.map(reason, items), strict=True):
                advance(1)
                if why is not None:
                    self.skipped[item.path] = why


def loaded_store(source: Source, given: Any, backbone: FrozenBackbone | None = None) -> FeatureStore:
    """The store of a source, loaded for a backbone; None: that of a command's options, `model`.

    ``given`` are the command's options; `data` holds ``STORE_OPTIONS``, and `accelerator` names the device.
    """
    store = FeatureStore(source, **{name: given.data[name] for name in STORE_OPTIONS})
    if backbone is None:
        given.model.weights = for_data(given.model.backbone, given.model.weights, str(source.path))
        backbone = FrozenBackbone(*(given.model[name] for name in BACKBONE_OPTIONS))
    store.load(backbone, device_of(given.accelerator))
    return store
