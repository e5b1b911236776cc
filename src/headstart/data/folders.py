"""Folders of images: where the splits, the classes and the images are."""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from headstart.data.splits import Item, Split
from headstart.errors import UserError
from headstart.files import RUNS_MARK, read_regular
from headstart.images import decode, image_suffixes
from headstart.terminal import say

# The names under which a folder may hold ready-made splits.
SPLIT_FOLDERS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training", "train_set", "training_set", "seg_train"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "val_set", "validation_set", "seg_val", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "test_set", "testing_set", "seg_test"), "test"),
}
# Folders of systems and network disks, which hold thumbnails, deleted files and older states.
IGNORED_FOLDERS = {
    *("__MACOSX", "__pycache__", "@eaDir", "#recycle", "#snapshot", "@Recycle", "lost+found", "$RECYCLE.BIN"),
    "System Volume Information",
}


def images(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """The image files below a folder, in order, without hidden ones; ``others`` counts the other files by suffix.

    Says which folders cannot be read.
    """
    found, others, closed = [], Counter() if others is None else others, list[OSError]()
    for parent, folders, files in os.walk(folder, onerror=closed.append):
        others.update(f"folder(s) {name}" for name in folders if name in IGNORED_FOLDERS)
        folders[:] = sorted(name for name in folders if not _ignored(Path(parent) / name))
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
    say_others(others)
    if nested := sum(path.parent != folder for folder, paths in zip(classes, found, strict=True) for path in paths):
        say(f"data: {nested} images lie in folders within a class folder; they are of that class")
    return found


def say_others(others: Counter[str]) -> None:
    """Says what else is there, which ``images`` counted."""
    if others:
        said = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(4))
        say(f"data: there are also files that are no images to PIL, and are left out: {said}")


def read(root: Path, item: Item, shorter_side: int, max_pixels: int) -> Image.Image:
    """Decodes an image file, which must still be the one that was scanned; raises ``UnreadableImage`` as ``decode``."""
    try:
        data = read_regular(root / item.path)
    except FileNotFoundError as error:
        raise UserError(f"{root / item.path}: vanished during the run; start again") from error
    except OSError as error:
        raise UserError(f"{root / item.path}: cannot be read any more ({error.strerror}); start again") from error
    if hashlib.sha256(data).digest() != item.digest:
        raise UserError(f"{root / item.path}: changed during the run; start again")
    return decode(data, shorter_side, max_pixels)


def existing(root: str) -> Path:
    """The absolute path of a folder that must exist."""
    if not root.strip():
        raise UserError("--data.root: is empty; give a folder of class folders")
    path = Path(root).expanduser().resolve()
    if not path.is_dir():
        nearest = next(parent for parent in path.parents if parent.exists())
        raise UserError(f"--data.root={root}: no such folder; the nearest that exists is {nearest}")
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise UserError(f"--data.root={root}: cannot be read ({error.strerror}); change its mode or owner") from error
    return path


def _ignored(folder: Path) -> bool:
    runs = os.path.isfile(folder / RUNS_MARK)  # noqa: PTH113  # pathlib's raises where it may not look
    return folder.name.startswith(".") or folder.name in IGNORED_FOLDERS or runs


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, without hidden ones, those of systems, and one that holds runs."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not _ignored(entry))


def of_splits(root: Path) -> dict[Path, Split | None]:
    """The folders that hold class folders, and the split of each; None: to be split."""
    names = subfolders(root)
    named = {root / name: SPLIT_FOLDERS[name.lower()] for name in names if name.lower() in SPLIT_FOLDERS}
    named = {
        path: split
        for path, split in named.items()
        if os.access(path, os.R_OK | os.X_OK) and (subfolders(path) or not _has_images(path))
    }
    if "train" not in named.values() or len(named) < 2:
        _refuse_splits_as_classes(root, names)
        return {root: None}
    if len(set(named.values())) < len(named):
        raise UserError(f"{root}: two folders for one split ({', '.join(path.name for path in named)}); keep one")
    return {path: None if split == "train" and "val" not in named.values() else split for path, split in named.items()}


def _refuse_splits_as_classes(root: Path, names: Sequence[str]) -> None:
    """Folders that hold the same class folders each, or a `train` that does, are no classes."""
    below = {name: subfolders(root / name) for name in names if os.access(root / name, os.R_OK | os.X_OK)}
    bare = {name: found for name, found in below.items() if len(found) > 1 and not _has_images(root / name)}
    alike = len(bare) == len(names) > 1 and len({tuple(found) for found in bare.values()}) == 1
    split = next((name for name in bare if name.lower() in SPLIT_FOLDERS), None)
    if alike or split:
        inner = bare[split or names[0]]
        raise UserError(
            f"{root}: are the classes {_short(names)}, or {_short(inner)}, as in {split or names[0]}/? If "
            "these, name the outer folders train, val and test; if those, put the images straight into them"
        )


def _has_images(folder: Path) -> bool:
    return any(entry.suffix.lower() in image_suffixes() for entry in folder.iterdir())


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def say_alike(names: Sequence[str]) -> None:
    """Says which class names look the same, and are not: they differ by case or by Unicode's form alone."""
    first: dict[str, str] = {}
    for name in names:
        if (other := first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)) != name:
            say(f"data: the classes {other!a} and {name!a} differ by case or Unicode form alone; are they one?")


def in_either_form(root: Path, path: str) -> str:
    """A listed path as the disk has it: a Mac writes accents as characters of their own."""
    forms = (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))
    return next((form for form in forms if (root / form).exists()), path)


def class_names(folders: Mapping[Path, Split | None]) -> list[str]:
    """The names of the class folders: at least two, and the same in every split."""
    names = {folder: subfolders(folder) for folder in folders}
    first, expected = next(iter(names.items()))
    for folder, found in names.items():
        if different := set(found) ^ set(expected):
            shown = ", ".join(name if name.isascii() else ascii(name) for name in sorted(different)[:5])
            raise UserError(f"{folder} and {first} hold different classes: {shown}")
    if len(expected) < 2:
        raise UserError(
            f"{first}: {len(expected)} class folder(s), and at least 2 are needed; expected is one folder of images "
            f"a class, as in {first.name}/cat/1.jpg and {first.name}/dog/2.jpg"
        )
    say_alike(expected)
    return expected
