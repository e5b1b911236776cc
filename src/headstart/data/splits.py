"""Splits images into train, val and test by the hash of their content, so that an image never moves."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from headstart.errors import UserError
from headstart.files import csv_bytes, read_csv
from headstart.terminal import one_line, say, say_all

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Repeat = Callable[[Sequence["Item"], Sequence[str]], list["Item"]]  # ``repeated`` with a run's splits.csv
COLUMNS = ["split", "class", "path", "sha256"]
TABLE_ROWS = 24
BETWEEN = "|"  # the names of several labels


@dataclass(frozen=True, slots=True)
class Item:
    """An image: its path, label or labels, content hash, split, group and domain."""

    path: str  # relative to the root, with forward slashes; for a dataset, its name and the index
    label: int  # class index; -1 with ``tags``
    digest: bytes = b""  # sha256 of its content
    split: Split | None = None  # None until it is assigned
    group: str = ""  # images of a group, such as a burst of one scene, share a split; empty: no group
    domain: str = ""  # where the image is from, such as photo or sketch: scored apart, and no part of the split
    tags: tuple[int, ...] | None = None  # ascending class indices, of an image that may have several or none

    @property
    def labels(self) -> tuple[int, ...]:
        """The class indices."""
        return (self.label,) if self.tags is None else self.tags

    def with_digest(self, digest: bytes) -> "Item":
        """The image with its content hash; quicker than ``replace``, for a million files."""
        return Item(self.path, self.label, digest, self.split, self.group, self.domain, self.tags)

    def named(self, class_names: Sequence[str]) -> str:
        """The names of its classes, joined by ``|``."""
        return BETWEEN.join([class_names[label] for label in self.labels])


def assign(items: Sequence[Item], class_names: Sequence[str], val: float, test: float, seed: int) -> list[Item]:
    """Assigns a split to each image without one, by the hash of the seed and its content.

    A new image never moves an old one; identical images share a split, and so do the images of a group. If a class
    would be missing from a split, its lowest-hashed image or group is moved there, with a message; only in this case
    can a new image move another. ``val`` and ``test`` are fractions of the images, in [0, 1). A class with fewer
    different images or groups than splits is an error; one of several labels is then missing from a split.
    """
    present = {label for item in items for label in item.labels}
    for label, name in enumerate(class_names):
        if label not in present:
            raise UserError(f"class {name!r}: no readable image; add some or remove its folder")
    fractions: dict[Split, float] = {"test": test, "val": val, "train": 1 - val - test}
    needed = [split for split, fraction in fractions.items() if fraction > 0]
    units = _units([item for item in items if item.split is None])
    of_classes: dict[int, set[bytes]] = defaultdict(set)
    for item in items:
        for label in item.labels if item.split is None else ():
            of_classes[label].add(units[_own(item)])
    places = {unit: _place(seed, unit, val, test) for unit in units.values()}
    several = any(item.tags is not None for item in items)
    # Of several labels, some may be missing from a split; least of all from train.
    said = _fill(of_classes, places, needed[::-1] if several else needed, class_names, seed)
    if not several:
        _refuse_missing(of_classes, places, needed, class_names)
    say_all(said)
    return [item if item.split else replace(item, split=places[units[_own(item)]]) for item in items]


def _own(item: Item) -> bytes:
    """The hash that places an image, if no other image shares its content or its group."""
    return hashlib.sha256(b"group " + os.fsencode(item.group)).digest() if item.group else item.digest


def _units(items: Sequence[Item]) -> dict[bytes, bytes]:
    """The units that are split as a whole, by ``_own``: groups that share an image are merged.

    A unit is named by its lowest group, so that an image added to a group moves nothing.
    """
    groups = {_own(item) for item in items if item.group}
    if not groups:
        return {item.digest: item.digest for item in items}
    from scipy.sparse import coo_array  # here, since most data has no groups
    from scipy.sparse.csgraph import connected_components

    names = list(dict.fromkeys(name for item in items for name in (_own(item), item.digest)))
    number = {name: place for place, name in enumerate(names)}
    ends = [[number[_own(item)] for item in items], [number[item.digest] for item in items]]
    pairs = coo_array((np.ones(len(items), dtype=bool), ends), shape=(len(names), len(names)))
    _, component = connected_components(pairs, directed=False)
    first: dict[int, bytes] = {}
    for name in sorted(names, key=lambda name: (name not in groups, name)):
        first.setdefault(component[number[name]], name)
    return {name: first[component[number[name]]] for name in names}


def folds_of(items: Sequence[Item], folds: int) -> list[int]:
    """The fold of each image; identical images share a fold, and so do the images of a group."""
    units = _units(items)
    return [units[_own(item)][-1] % folds for item in items]


def _unit_hash(seed: int, digest: bytes) -> float:
    """A hash in [0, 1), uniform over contents."""
    return int.from_bytes(hashlib.sha256(b"split %d " % seed + digest).digest()[:6], "big") / 2**48


def _place(seed: int, digest: bytes, val: float, test: float) -> Split:
    value = _unit_hash(seed, digest)
    if value < test:
        return "test"
    return "val" if value < test + val else "train"


def _fill(
    of_classes: Mapping[int, Set[bytes]],
    places: dict[bytes, Split],
    needed: Sequence[Split],
    class_names: Sequence[str],
    seed: int,
) -> list[str]:
    """Moves the lowest-hashed unit that can be spared into each split that lacks a class.

    It spares no unit that one of its classes needs where it is. Returns one message per unit moved and class missing.
    """
    said = list[str]()
    sizes = {label: Counter(places[unit] for unit in units) for label, units in of_classes.items()}
    for label, units in sorted(of_classes.items()):
        for split in needed:
            if sizes[label][split]:
                continue
            owners = {unit: [own for own in sizes if unit in of_classes[own]] for unit in units}
            spare = [unit for unit, labels in owners.items() if all(sizes[own][places[unit]] > 1 for own in labels)]
            if not spare:
                said.append(f"data: class {class_names[label]!r} has no image in {split}, since it has too few")
                continue
            unit = min(spare, key=lambda unit: _unit_hash(seed, unit))
            for own in owners[unit]:
                sizes[own][split] += 1
                sizes[own][places[unit]] -= 1
            places[unit] = split
            name = class_names[label]
            said.append(f"data: class {name!r} would be missing from {split}; its lowest-hashed image was moved there")
    return said


def _refuse_missing(
    of_classes: Mapping[int, Set[bytes]], places: Mapping[bytes, Split], needed: Sequence[Split], names: Sequence[str]
) -> None:
    """Refuses a class that is missing from a split, as it has too few images or they are in too few groups."""
    for label, units in sorted(of_classes.items()):
        if len(units) < len(needed):
            raise UserError(
                f"class {names[label]!r}: {len(units)} different image(s) or group(s), but {len(needed)} are needed, "
                f"one for each split ({', '.join(needed)}); add images or remove the class"
            )
        if missing := [split for split in needed if split not in {places[unit] for unit in units}]:
            raise UserError(
                f"class {names[label]!r}: its groups leave no image for {', '.join(missing)}; add images, "
                "or give each image a split"
            )


def limited(items: Sequence[Item], limit: int) -> list[Item]:
    """Keeps the ``limit`` lowest-hashed training images per class, and all validation and test images.

    An image with several labels is kept while one of them has fewer.
    """
    kept: dict[int, int] = Counter()
    left_out: set[int] = set()
    for position, item in sorted(enumerate(items), key=lambda entry: entry[1].digest):
        if item.split == "train":
            labels = item.labels or (-1,)
            if all(kept[label] >= limit for label in labels):
                left_out.add(position)
            else:
                for label in labels:
                    kept[label] += 1
    return [item for position, item in enumerate(items) if position not in left_out]


def check_training(items: Sequence[Item], class_names: Sequence[str]) -> None:
    """Refuses a class without a training image; warns of other splits that lack classes."""
    for split in SPLITS:
        of_split = [item for item in items if item.split == split]
        labels = {label for item in of_split for label in item.labels}
        missing = [name for label, name in enumerate(class_names) if label not in labels]
        if missing and split == "train":
            raise UserError(f"class {missing[0]!r}: no training image; add some, or remove the class")
        if missing and labels:
            say(f"data: {len(missing)} of {len(class_names)} classes have no image in {split}, such as {missing[0]!r}")


def refuse_torn_groups(items: Iterable[Item], given: str) -> None:
    """Refuses a group whose images are given in several splits; ``given`` is the option that groups them."""
    places: dict[str, set[Split | None]] = defaultdict(set)
    for item in items:
        if item.group:
            places[item.group].add(item.split)
    if torn := [group for group, found in places.items() if len(found) > 1]:
        raise UserError(f"{given}: group {torn[0]!r} is in several splits; give it a single one")


def shared_between_splits(items: Iterable[Item]) -> int:
    """The number of different images that are in more than one split."""
    first: dict[bytes, Split | None] = {}
    return len({item.digest for item in items if first.setdefault(item.digest, item.split) != item.split})


def check_copies(items: Sequence[Item], strict: bool) -> None:
    """Warns of identical images in two splits or with two labels; refuses them if ``strict``."""
    problems = []
    if shared := shared_between_splits(items):
        problems.append(
            f"{shared} images are in more than one split, byte for byte, which inflates scores; remove them"
        )
    first: dict[bytes, Item] = {}
    pairs = [(first[item.digest], item) for item in items if first.setdefault(item.digest, item).labels != item.labels]
    if pairs:
        named = "; ".join(f"{one.path} and {other.path}" for one, other in pairs[:3])
        problems.append(f"{len(pairs)} image(s) have two labels, byte for byte ({named}); remove the wrong one of each")
    for problem in problems:
        if strict:
            raise UserError(f"--data.strict: {problem}")
        say(f"data: {problem}")


def to_csv(items: Iterable[Item], class_names: Sequence[str]) -> bytes:
    """The content of ``splits.csv``: split, class or classes, path and content hash of each image."""
    rows = ([item.split, item.named(class_names), item.path, item.digest.hex()] for item in items)
    return csv_bytes([COLUMNS, *rows])


def frozen(items: Sequence[Item], file: Path) -> list[Item]:
    """Gives each image its split in a run's ``splits.csv``, found by content; leaves out the others."""
    places = places_of("--data.splits", file)
    known = [replace(item, split=places[item.digest.hex()]) for item in items if item.digest.hex() in places]
    if len(known) < len(items):
        say(f"data: {len(items) - len(known)} image(s) are not in {file} and are left out")
    if missing := places.keys() - {item.digest.hex() for item in known}:
        say(f"data: {len(missing)} image(s) of {file} are missing or changed")
    return known


def places_of(option: str, file: Path) -> dict[str, Split]:
    """The split of each image in a run's ``splits.csv``, by content hash."""
    places: dict[str, Split] = {}
    for row in read_csv(option, file, ["split", "sha256"], errors="surrogateescape"):
        split = next((split for split in SPLITS if split == row["split"]), None)
        if split is None:
            raise UserError(f"{option}={file}: unknown split {row['split']!r}; use {', '.join(SPLITS)}")
        places[row["sha256"]] = split
    return places


def repeated(items: Sequence[Item], class_names: Sequence[str], file: Path, only: Sequence[str] = SPLITS) -> list[Item]:
    """The images of a run's ``splits.csv``, with the split and order of the run, found by class and content.

    Images added since are left out, with a message. ``only`` names the splits whose images are needed.

    Raises:
        UserError: an image of the run is missing, or its content or class changed.
    """
    found: dict[tuple[str, str], dict[str, Item]] = defaultdict(dict)
    for item in items:
        found[item.named(class_names), item.digest.hex()][item.path] = item
    kept: list[Item] = []
    for row in read_csv("--ckpt_path", file, COLUMNS, errors="surrogateescape"):
        if row["split"] not in only:
            continue
        same = found[row["class"], row["sha256"]]
        if not same:
            raise UserError(
                f"{row['path']}: is missing, damaged or changed since the run ({file}); restore it, "
                "or start a new run without --ckpt_path"
            )
        item = same.pop(row["path"] if row["path"] in same else min(same))
        kept.append(replace(item, split=cast(Split, row["split"])))
    if len(kept) < len(items) and only == SPLITS:
        say(f"data: {len(items) - len(kept)} image(s) are not in {file} and are left out")
    return kept


def counts_table(items: Sequence[Item], class_names: Sequence[str]) -> Table:
    """A table of images per class and split; of many classes, only the first ones."""
    images = {split: [item for item in items if item.split == split] for split in SPLITS}
    images = {split: found for split, found in images.items() if found}
    counts = {split: Counter(label for item in found for label in item.labels) for split, found in images.items()}
    table = Table("class", *counts, title=f"{len(items)} images")
    for label, name in list(enumerate(class_names))[:TABLE_ROWS]:
        table.add_row(one_line(name), *(str(count[label]) for count in counts.values()))
    if len(class_names) > TABLE_ROWS:
        table.add_row(f"… {len(class_names) - TABLE_ROWS} more", *("…" for _ in counts))
    table.add_section()
    table.add_row("all", *(str(len(found)) for found in images.values()))
    if any(item.tags is not None for item in items):
        means = (sum(counts[split].values()) / len(found) for split, found in images.items())
        table.add_row("labels per image", *(f"{mean:.2f}" for mean in means))
        table.add_row("without a label", *(str(sum(not item.labels for item in found)) for found in images.values()))
    return table


def counts_of(labels: Tensor, num_classes: int) -> Tensor:
    """The number of images of each class, [num_classes], from what ``labels_of`` gives."""
    return labels.sum(dim=0) if labels.ndim == 2 else torch.bincount(labels, minlength=num_classes)


def labels_of(items: Sequence[Item], several: int = 0) -> Tensor:
    """The class index of each image, [N]; of images with ``several`` possible labels, 0 or 1 for each, [N, several]."""
    if not several:
        return torch.tensor([item.label for item in items], dtype=torch.long)
    found = torch.zeros(len(items), several, dtype=torch.uint8)
    rows = [row for row, item in enumerate(items) for _ in item.labels]
    found[rows, [label for item in items for label in item.labels]] = 1
    return found
