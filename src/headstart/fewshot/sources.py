"""Sources of few-shot classes, and their split into training, validation and test classes."""

import hashlib
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from headstart.data import folders
from headstart.data.sources import FileSource
from headstart.data.splits import SPLITS, Item, Split
from headstart.errors import UserError
from headstart.fewshot.glyphs import glyphs
from headstart.files import claim_by_rename, read_regular

SourceName = Literal["glyphs", "folder", "omniglot", "domains"]


def source_of(root: str | None) -> SourceName:
    """The default source: folder if a root is given, else glyphs."""
    return "folder" if root else "glyphs"


@dataclass
class Classes(FileSource):
    """A folder of classes, with their groups and splits."""

    root: Path
    class_names: list[str]  # the paths of the classes' folders below the root
    groups: list[str]  # the script or alphabet of each class; classes of one group are never in two splits
    split: Mapping[str, Split]  # given by the folder for some classes; the others are split by hash

    def __post_init__(self) -> None:
        self.path = self.root

    def listed(self) -> list[Item]:
        return self.in_folders(
            {self.root / name: partial(Item, label=label) for label, name in enumerate(self.class_names)}
        )


def classes_of(source: SourceName, root: str | None, cache: Path) -> Classes:
    """The classes of a source.

    Glyphs are drawn into ``cache``. A folder holds class folders, or train, val and test with class folders. Omniglot
    is a folder or zip file in its layout, alphabet / character / image, or several of these, separated by commas.
    Domains are a folder of domains with class folders: a class is domain/class.
    """
    if source == "glyphs":
        return _grouped(glyphs(cache))
    if root is None:
        raise UserError(f"--data.root is missing: --data.source={source} reads files; glyphs needs none")
    if source == "omniglot":
        return _grouped(_omniglot(root, cache))
    folder = folders.existing(root)
    if source == "domains":
        return _grouped(folder)
    splits = folders.of_splits(folder)
    if splits == {folder: None}:
        names = folders.class_names(splits)
        return Classes(folder, names, list(names), {})
    found = {f"{place.name}/{name}": chosen for place, chosen in splits.items() for name in folders.subfolders(place)}
    _disjoint([name.split("/", 1)[1] for name in found], folder)
    known = {name: chosen for name, chosen in found.items() if chosen is not None}
    return Classes(folder, list(found), list(found), known)


def _disjoint(names: Sequence[str], folder: Path) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{folder}: classes in more than one split: {', '.join(twice[:5])}; few-shot classes must be new in a test"
        )


def _grouped(root: Path) -> Classes:
    names = [f"{group}/{name}" for group in folders.subfolders(root) for name in folders.subfolders(root / group)]
    if not names:
        raise UserError(f"{root}: no image folders two levels down, as in alphabet / character or domain / class")
    return Classes(root, names, [name.split("/")[0] for name in names], {})


def _omniglot(roots: str, cache: Path) -> Path:
    """One folder of alphabets: the given one, or one into which all given files and folders were merged."""
    given = [Path(root.strip()).expanduser() for root in roots.split(",")]
    for path in given:
        if not path.exists():
            raise UserError(f"--data.root={path}: no such file or folder; give Omniglot's zip files or folders")
    if len(given) == 1 and given[0].is_dir():
        return given[0].resolve()
    described = "\n".join(f"{path.resolve()} {path.stat()}" for path in given)
    name = hashlib.sha256(os.fsencode(described)).hexdigest()[:16]
    folder = cache / "omniglot" / name
    if not folder.is_dir():
        with claim_by_rename(folder) as temporary:
            for path in given:
                _collect(path, temporary)
    return folder


def _collect(path: Path, target: Path) -> None:
    """Copies alphabet / character / image from a zip file or a folder; what is in several is kept once."""
    files: dict[tuple[str, ...], Callable[[], bytes]]
    if path.is_dir():
        files = {found.relative_to(path).parts[-3:]: partial(read_regular, found) for found in path.rglob("*.png")}
    else:
        try:
            archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"--data.root={path}: not a zip file ({error})") from error
        names = [name for name in archive.namelist() if name.endswith(".png") and "__MACOSX" not in name]
        files = {tuple(name.split("/")[-3:]): partial(archive.read, name) for name in names}
    for parts, read in files.items():
        if len(parts) < 3 or any(part in ("", ".", "..") for part in parts):
            raise UserError(f"--data.root={path}: not in Omniglot's layout, alphabet / character / image")
        place = target.joinpath(*parts)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(read())


def split_classes(classes: Classes, val_fraction: float, test_fraction: float, seed: int) -> dict[Split, list[str]]:
    """Assigns a split to each class, in whole groups, ordered by a hash of the seed and the group's name.

    The fractions are approximate shares of the classes; a test fraction of 1 puts all into the test.
    """
    parts: dict[Split, list[str]] = {split: [] for split in SPLITS}
    members: dict[str, list[str]] = defaultdict(list)
    for name, group in zip(classes.class_names, classes.groups, strict=True):
        if name in classes.split:
            parts[classes.split[name]].append(name)
        else:
            members[group].append(name)
    order = sorted(members, key=lambda group: hashlib.sha256(os.fsencode(f"{seed} {group}")).digest())
    shares: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
    shares = {split: share for split, share in shares.items() if not parts[split]}
    shares["train"] = 1 - sum(shares.values())
    total = sum(map(len, members.values()))
    for group in order:
        # To the split that lacks most classes, where a large group does least harm.
        lacking = {split: share * total - len(parts[split]) for split, share in shares.items()}
        parts[max(lacking, key=lambda split: lacking[split])] += members[group]
    return parts
