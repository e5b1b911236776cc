"""Hugging Face datasets: by name from the Hub, or a local folder, Parquet or Arrow file."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from headstart.data.datasets import DatasetSource
from headstart.data.folders import split_named
from headstart.data.splits import Split
from headstart.errors import UserError
from headstart.model.weights import offline
from headstart.terminal import listing, say

ROOT = re.compile(r"(.+?)((?:,(?:image|label|config|revision)=[^,]+)*)")  # name, and what is chosen in it
# The kinds of columns that may hold it, the likely ones first.
KINDS = {
    "image": (("Image",), ("binary", "large_binary")),
    "label": (("ClassLabel",), ("string", "large_string", "bool", "int8", "int16", "int32", "int64")),
}


class Rows(Dataset[tuple[Any, int]]):
    """The image, not decoded, and the label of each row; a label is a number, or else a value in ``values``."""

    def __init__(self, rows: Any, image: str, label: str, classes: Sequence[str], values: Sequence[Any] | None) -> None:
        self._rows, self._image, self._label, self.classes = rows, image, label, classes
        self._numbers = {value: number for number, value in enumerate(values)} if values else None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self._rows[index]
        label = row[self._label]
        return row[self._image], self._numbers.get(label, -1) if self._numbers else label

    def __len__(self) -> int:
        return len(self._rows)


def source(root: str) -> DatasetSource:
    """The images of a dataset in its own splits; ``root`` is NAME or PATH, and may choose in it: NAME,label=COLUMN."""
    matched = ROOT.fullmatch(root)
    if matched is None:
        raise UserError(f"--data.root={root}: give the name of a dataset, a folder, or a Parquet or Arrow file")
    name, chosen = matched[1], dict(part.split("=", 1) for part in matched[2].split(",")[1:])
    local = Path(name).expanduser()
    parts = _splits(_loaded(name, root, chosen), root)
    features = parts["train"].features
    image = _column(root, "image", chosen, features)
    label = _column(root, "label", chosen, features)
    for split in [split for split, rows in parts.items() if not set(rows.unique(label)) - {-1, None}]:
        say(f"data: {split} has no labels and is left out")
        del parts[split]
    classes, values = getattr(features[label], "names", None), None
    if classes is None:
        values = sorted({value for rows in parts.values() for value in rows.unique(label)} - {None})
        classes = list(map(str, values))
    if _kind(features[image]) == "Image":
        from datasets import Image

        parts = {split: rows.cast_column(image, Image(decode=False)) for split, rows in parts.items()}
    fingerprint = " ".join(["hf", image, label, *classes, *(rows._fingerprint for rows in parts.values())])
    found: dict[Split, Dataset[Any]] = {
        split: Rows(rows.select_columns([image, label]), image, label, classes, values) for split, rows in parts.items()
    }
    made = DatasetSource(found, None, fingerprint=fingerprint, named=f"--data.root={root}")
    made.path = Path(f"{local.resolve() if local.exists() else name}{matched[2]}")
    return made


def _loaded(name: str, root: str, chosen: Mapping[str, str]) -> Any:
    """The dataset, or its splits by name."""
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise UserError("--data.source=hf: needs datasets: pip install -e '.[hf]'") from error
    # Both read the environment when they are imported.
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE or offline()
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # sent for local files too
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    path = Path(name).expanduser()
    try:
        if path.suffix == ".arrow" and path.is_file():
            return datasets.Dataset.from_file(str(path))
        if path.suffix == ".parquet" and path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path.resolve()))
        if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(path)
        where = str(path.resolve()) if path.is_dir() else name
        return datasets.load_dataset(where, chosen.get("config"), revision=chosen.get("revision"))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"--data.root={root}: Hugging Face's datasets cannot load it ({said})") from error


def _splits(loaded: Any, root: str) -> dict[Split, Any]:
    """The rows of each split; a dataset without splits, or with only one, is split by content."""
    if not isinstance(loaded, dict) or len(loaded) == 1:
        return {"train": next(iter(loaded.values())) if isinstance(loaded, dict) else loaded}
    named: dict[Split, Any] = {}
    for name, rows in loaded.items():
        if split := split_named(name):
            named.setdefault(split, rows)
    if "train" not in named:
        raise UserError(f"--data.root={root}: none of its splits ({listing(list(loaded))}) is for training")
    if others := [name for name, rows in loaded.items() if all(rows is not kept for kept in named.values())]:
        say(f"data: splits other than one train, val and test are left out: {listing(others)}")
    return named


def _column(root: str, which: str, chosen: Mapping[str, str], features: Mapping[str, Any]) -> str:
    """The chosen column, or the only one of the first kind that any column is of."""
    found = next(filter(None, ([n for n in features if _kind(features[n]) in kinds] for kinds in KINDS[which])), [])
    found = [chosen[which]] if chosen.get(which) in features else found
    if len(found) != 1 or chosen.get(which, found[0]) != found[0]:
        names = found or list(features)
        raise UserError(
            f"--data.root={root}: which column is the {which}? name one of {listing(names)} as in "
            f"--data.root={root.split(',')[0]},{which}={names[0]}"
        )
    return found[0]


def _kind(feature: Any) -> str:
    """What a column holds: Image, ClassLabel, or the type of its values; of a dict, that of its ``bytes``."""
    held: Any = feature.get("bytes") if isinstance(feature, dict) else feature
    return str(held.dtype) if type(held).__name__ == "Value" else type(held).__name__
