"""Folders of images: where the splits, the classes and the images are."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from headstart.data.splits import Item, Split
from headstart.errors import UserError
from headstart.files import read_regular
from headstart.images import decode, image_suffixes
from headstart.terminal import say

# The names under which a folder may hold ready-made splits.
SPLIT_FOLDERS: Mapping[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
IGNORED_FOLDERS = {"__MACOSX", "__pycache__"}


def images(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """The image files below a folder, in order, without hidden ones; ``others`` counts the other files by suffix.

    Says which folders cannot be read.
    """
    found, others, closed = [], Counter() if others is None else others, list[OSError]()
    for parent, folders, files in os.walk(folder, onerror=closed.append):
        folders[:] = sorted(name for name in folders if not _ignored(name))
        for name in sorted(name for name in files if not name.startswith(".")):
            if (suffix := Path(name).suffix.lower()) in image_suffixes():
                found.append(Path(parent) / name)
            else:
                others[suffix or "without a suffix"] += 1
    if closed:
        first = ", ".join(f"{error.filename} ({error.strerror})" for error in closed[:3])
        say(f"data: {len(closed)} folders cannot be read, and what is in them is left out: {first}")
    return found


def images_of_classes(classes: Sequence[Path]) -> list[list[Path]]:
    """The image files below each class folder; says what else is there."""
    others = Counter[str]()
    found = [images(folder, others) for folder in classes]
    if others:
        said = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(4))
        say(f"data: there are also files that are no images to PIL: {said}")
    if nested := sum(path.parent != folder for folder, paths in zip(classes, found, strict=True) for path in paths):
        say(f"data: {nested} images lie in folders within a class folder; they are of that class")
    return found


def read(root: Path, item: Item, shorter_side: int, max_pixels: int) -> Image.Image:
    """Decodes an image file, which must still be the one that was scanned; raises ``UnreadableImage`` as ``decode``."""
    try:
        data = read_regular(root / item.path)
    except FileNotFoundError as error:
        raise UserError(f"{root / item.path}: vanished during the run; start again") from error
    if hashlib.sha256(data).digest() != item.digest:
        raise UserError(f"{root / item.path}: changed during the run; start again")
    return decode(data, shorter_side, max_pixels)


def existing(root: str) -> Path:
    """The absolute path of a folder that must exist."""
    path = Path(root).expanduser().resolve()
    if not path.is_dir():
        nearest = next(parent for parent in path.parents if parent.exists())
        raise UserError(f"--data.root={root}: no such folder; the nearest that exists is {nearest}")
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise UserError(f"--data.root={root}: cannot be read ({error.strerror}); change its mode or owner") from error
    return path


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED_FOLDERS


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, without hidden ones."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _ignored(entry.name))


def of_splits(root: Path) -> dict[Path, Split | None]:
    """The folders that hold class folders, and the split of each; None: to be split."""
    named = {root / name: SPLIT_FOLDERS[name.lower()] for name in subfolders(root) if name.lower() in SPLIT_FOLDERS}
    if "train" not in named.values() or len(named) < 2:
        return {root: None}
    if len(set(named.values())) < len(named):
        raise UserError(f"{root}: two folders for one split ({', '.join(path.name for path in named)}); keep one")
    return {path: None if split == "train" and "val" not in named.values() else split for path, split in named.items()}


def class_names(folders: Mapping[Path, Split | None]) -> list[str]:
    """The names of the class folders: at least two, and the same in every split."""
    names = {folder: subfolders(folder) for folder in folders}
    first, expected = next(iter(names.items()))
    for folder, found in names.items():
        if different := set(found) ^ set(expected):
            raise UserError(f"{folder} and {first} hold different classes: {', '.join(sorted(different)[:5])}")
    if len(expected) < 2:
        raise UserError(
            f"{first}: {len(expected)} class folder(s), and at least 2 are needed; expected is one folder of images "
            f"a class, as in {first.name}/cat/1.jpg and {first.name}/dog/2.jpg"
        )
    return expected
