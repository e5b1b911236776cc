"""Finds the splits, the classes and the images in a folder."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from headstart.data.splits import Item, Split
from headstart.decoding import decode, heif_version, image_suffixes
from headstart.errors import UserError
from headstart.files import RUNS_MARK, in_either_form, patiently, read_regular
from headstart.images import Preprocessing
from headstart.terminal import listing, say

# Words that name the folder of a split, alone or as in training_set, seg_train or test-images.
SPLIT_WORDS: Mapping[str, Split] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_NAME = re.compile(
    rf"(?:(?:seg|images?|data(?:set)?)[ _.-]?)?({'|'.join(SPLIT_WORDS)})(?:[ _.-]?(?:set|split|images?|data))?",
    re.IGNORECASE,
)
# Folders of systems and network disks, with thumbnails and deleted files; in lower case.
IGNORED_FOLDERS = {
    *("__macosx", "__pycache__", ".thumbnails", "lost+found", "$recycle.bin", "recycler", "system volume information"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb", "@tmp"),
}


def split_named(name: str) -> Split | None:
    """The split that a folder name means, such as train, Testing or training_set; None: no split."""
    found = SPLIT_NAME.fullmatch(name)
    return SPLIT_WORDS[found[1].lower()] if found else None


def images(folder: Path, others: Counter[str] | None = None) -> list[Path]:
    """The image files below a folder, in order, without hidden ones; ``others`` counts everything else.

    Warns of unreadable folders.
    """
    return list(map(Path, _images(str(folder), Counter() if others is None else others)))


def _images(folder: str, others: Counter[str]) -> list[str]:
    """As ``images``; without objects, since there may be a million files."""
    found, closed, suffixes = [], list[OSError](), image_suffixes()
    for parent, folders, files in os.walk(folder, onerror=closed.append):
        others.update(f"{name}/" for name in folders if name.lower() in IGNORED_FOLDERS)
        folders[:] = sorted(name for name in folders if not _ignored(name))
        start = os.path.join(parent, "")  # noqa: PTH118
        for name in sorted(name for name in files if not name.startswith(".")):
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122
            if suffix in suffixes:
                found.append(start + name)
            else:
                others[suffix or "without a suffix"] += 1
    if closed:
        first = ", ".join(f"{error.filename} ({error.strerror})" for error in closed[:3])
        say(f"data: {len(closed)} folders cannot be read and are left out: {first}")
    return found


def images_of_classes(classes: Sequence[Path]) -> list[list[str]]:
    """The paths of the image files below each class folder; reports everything else in them."""
    others = Counter[str]()
    found = [_images(str(folder), others) for folder in classes]
    for parent in {folder.parent for folder in classes}:
        others.update(f"{path.name}/" for path in parent.iterdir() if path.is_dir() and _is_foreign(path))
    say_left_out(others)
    starts = [len(os.path.join(folder, "")) for folder in classes]  # noqa: PTH118
    if nested := sum(os.sep in path[start:] for start, paths in zip(starts, found, strict=True) for path in paths):
        say(f"data: {nested} images are in folders within a class folder; they belong to that class")
    return found


def say_left_out(others: Counter[str]) -> None:
    """Reports what a folder contains besides images: files by suffix, and folders that are not searched."""
    if others:
        said = ", ".join(f"{count} {name}" for name, count in others.most_common(8))
        heif = "; for .heic: pip install -e '.[heif]'" if others[".heic"] and not heif_version() else ""
        say(f"data: left out: {said}    (not images for PIL, or folders of systems and runs{heif})")


def read(root: Path, item: Item, preprocessing: Preprocessing, max_pixels: int) -> Image.Image:
    """Decodes an image file, as ``decode``; raises ``UserError`` if it changed since it was scanned."""

    def decoded() -> Image.Image:
        data = read_regular(root / item.path)
        if hashlib.sha256(data).digest() != item.digest:
            raise UserError(f"{root / item.path}: changed during the run; start again")
        return decode(data, preprocessing, max_pixels)

    try:
        return patiently(root / item.path, decoded)
    except FileNotFoundError as error:
        raise UserError(f"{root / item.path}: vanished during the run; start again") from error


def existing(root: str, option: str = "--data.root") -> Path:
    """The absolute path of an existing folder; ``UserError`` if it is missing or unreadable."""
    if not root:
        raise UserError(f"{option} is empty; give a folder, or . for the current one")
    path = in_either_form(Path(root).expanduser()).resolve()
    if not path.is_dir():
        nearest = next(parent for parent in path.parents if parent.exists())
        raise UserError(f"{option}={root}: no such folder; the nearest that exists is {nearest}")
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise UserError(f"{option}={root}: cannot be read ({error.strerror}); change its mode or owner") from error
    return path


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in image_suffixes()


def _ignored(name: str) -> bool:
    return name.startswith(".") or name.lower() in IGNORED_FOLDERS


def _is_foreign(folder: Path) -> bool:
    """Whether it is a folder of the system, or a folder of runs without images, such as ``logs``."""
    runs = os.path.isfile(folder / RUNS_MARK)  # noqa: PTH113  # pathlib raises without permission
    return folder.name.lower() in IGNORED_FOLDERS or (runs and not images(folder))


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, except hidden ones and those of systems and runs."""
    folders = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return sorted(path.name for path in folders if not _is_foreign(path))


def _straight_in(folder: Path) -> tuple[list[str], bool]:
    """The names of the folders in a folder, and whether it contains images directly; nothing if it is unreadable."""
    _, inner, files = next(os.walk(folder), ("", [], []))
    return sorted(name for name in inner if not _ignored(name)), any(map(_is_image, files))


def of_splits(root: Path) -> dict[Path, Split | None]:
    """The folders that contain class folders, and the split of each; None: to be split.

    A folder called train that contains images directly is a class.
    """
    names = subfolders(root)
    places = {root / name: split for name in names if (split := split_named(name))}
    named = {path: split for path, split in places.items() if not _straight_in(path)[1]}
    others = ", ".join(name for name in names if root / name not in named)
    if "train" not in named.values():
        return {root: None}
    if len(set(named.values())) < len(named):
        raise UserError(f"{root}: two folders for one split ({', '.join(path.name for path in named)}); keep one")
    if others and len(named) == 1:
        (train,) = named
        raise UserError(
            f"{root}: {train.name} looks like a split, with class folders, but is next to {others}: if it is a "
            f"split, give --data.root={train}; if it is a class, put its images directly into it"
        )
    if others:
        say(f"data: folders other than the splits are left out: {others}")
    return {path: None if split == "train" and "val" not in named.values() else split for path, split in named.items()}


def class_names(folders: Mapping[Path, Split | None]) -> list[str]:
    """The names of the class folders, at least two and the same in every split; otherwise ``UserError``."""
    names = {folder: subfolders(folder) for folder in folders}
    first, expected = next(iter(names.items()))
    for folder, found in names.items():
        if different := set(found) ^ set(expected):
            raise UserError(f"{folder} and {first} contain different classes: {listing(sorted(different))}")
    if len(expected) < 2:
        raise UserError(
            f"{first}: {len(expected)} class folder(s), but at least 2 are needed; give one folder of images per "
            f"class, as in {first.name}/cat/1.jpg and {first.name}/dog/2.jpg"
        )
    if len(folders) == 1:
        _refuse_two_readings(first, expected)
    return expected


def _refuse_two_readings(root: Path, names: Sequence[str]) -> None:
    """Refuses folders that contain the same folders and no images, since the inner ones may be the classes."""
    inner, straight = _straight_in(root / names[0])
    if len(inner) > 1 and not straight and all(_straight_in(root / name) == (inner, False) for name in names):
        raise UserError(
            f"{root}: the classes are either {listing(names)}, or {listing(inner)}, which are in each of these; in the "
            "first case put the images directly into the class folders, in the second name the outer folders train, "
            "val and test, or give --data.source=domains if they are domains; or list the images in --data.csv"
        )
