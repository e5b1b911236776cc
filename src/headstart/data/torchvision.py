"""torchvision's classification datasets by name, downloaded and checked by its own code."""

import difflib
import hashlib
import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch.utils.data import Dataset
from torchvision import __version__, datasets

from headstart.data.datasets import DatasetSource
from headstart.data.splits import Split
from headstart.errors import UserError
from headstart.model.weights import offline
from headstart.terminal import say

# The arguments that give each split, by the names of the sets.
TRAIN_OR_NOT: dict[Split, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
WHOLE: dict[Split, dict[str, Any]] = {"train": {}}
TWO: dict[Split, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE: dict[Split, dict[str, Any]] = TWO | {"val": {"split": "val"}}
SETS: dict[str, dict[Split, dict[str, Any]]] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), TRAIN_OR_NOT),
    **dict.fromkeys(("Food101", "GTSRB", "STL10", "StanfordCars", "SVHN"), TWO),
    **dict.fromkeys(("DTD", "FGVCAircraft", "Flowers102", "PCAM", "RenderedSST2"), THREE),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "SEMEION", "SUN397"), WHOLE),
    "Country211": TWO | {"val": {"split": "valid"}},
    "Imagenette": {"train": {"split": "train"}, "val": {"split": "val"}},
    "OxfordIIITPet": TWO | {"train": {"split": "trainval"}},
}
NUMBERED = {"GTSRB": 43, "PCAM": 2, "SEMEION": 10, "SVHN": 10, "USPS": 10}  # classes that have no names


def source(root: str) -> DatasetSource:
    """The set whose name is the last part of ``root``, in the folder before it; without one, in torch's own folder."""
    path = Path(root).expanduser()
    name = path.name
    if name not in SETS:
        near = difflib.get_close_matches(name, SETS, n=3) or sorted(SETS)
        raise UserError(f"--data.root={root}: torchvision has no such classification set; try {', '.join(near)}")
    named = path.parent != Path()
    folder = path.parent.resolve() if named else Path(torch.hub.get_dir()).parent / "datasets" / name
    found: dict[Split, Dataset[Any]] = {
        split: _made(name, folder, arguments) for split, arguments in SETS[name].items()
    }
    names = getattr(found["train"], "classes", None) or getattr(found["train"], "categories", None)
    names = names or range(NUMBERED[name])
    names = [", ".join(each) if isinstance(each, tuple) else str(each) for each in names]
    made = DatasetSource(found, names, fingerprint=_fingerprint(name, folder), named=f"--data.root={root}")
    made.path = folder / name if named else Path(name)
    return made


def _made(name: str, folder: Path, arguments: dict[str, Any]) -> Dataset[Any]:
    """One split of a set; downloaded if it is not there or damaged, by one process for all."""
    made: Callable[..., Dataset[Any]] = partial(getattr(datasets, name), str(folder), **arguments)
    try:
        return made(download=False)
    except (RuntimeError, OSError):  # not there, or another checksum
        pass
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{name}.lock"), _network(not offline()):
            say(f"data: torchvision's {name} is read from its archive, or downloaded, into {folder}")
            return made(download=True)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        said = "the environment forbids the network" if offline() else " ".join(str(error).split())
        raise UserError(f"--data.root={name}: is not available ({said}); put it into {folder} yourself") from error


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Within, torchvision opens addresses only if this is allowed."""
    nothing = urllib.request.OpenerDirector()
    nothing.add_handler(urllib.request.UnknownHandler())
    urllib.request.install_opener(None if allowed else nothing)
    try:
        yield
    finally:
        urllib.request.install_opener(None)


def _fingerprint(name: str, folder: Path) -> str:
    """Changes with the set, torchvision, and the size, mtime or inode of any file below the folder."""
    seen = hashlib.sha256(f"torchvision {__version__} {name} {SETS[name]}".encode())
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(Path(parent, file) for file in files):
            stat = file.lstat()
            stamp = f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}\n"
            seen.update(stamp.encode(errors="surrogateescape"))
    return seen.hexdigest()
