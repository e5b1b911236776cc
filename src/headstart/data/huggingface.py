"""Hugging Face's datasets: by their name there, or a local folder, Parquet or Arrow file."""

import re
from collections.abc import Callable, Mapping, Sequence
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
    image = _column(root, "image", chosen, features, (_is_image, _is_bytes))
    label = _column(root, "label", chosen, features, (_has_names, _is_value))
    classes, values = getattr(features[label], "names", None), None
    if classes is None:
        values = sorted({value for rows in parts.values() for value in rows.unique(label)} - {None})
        classes = list(map(str, values))
    if _is_image(features[image]):
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
    """The rows of each split; a dataset without splits, or with one alone, is split by content."""
    if not isinstance(loaded, dict) or len(loaded) == 1:
        return {"train": next(iter(loaded.values())) if isinstance(loaded, dict) else loaded}
    named = {split: rows for name, rows in loaded.items() if (split := split_named(name))}
    if "train" not in named:
        raise UserError(f"--data.root={root}: none of its splits ({listing(list(loaded))}) is for training")
    if others := [name for name in loaded if not split_named(name)]:
        say(f"data: splits other than train, val and test are left out: {listing(others)}")
    return named


def _column(
    root: str, kind: str, chosen: Mapping[str, str], features: Mapping[str, Any], fits: Sequence[Callable[[Any], bool]]
) -> str:
    """The chosen column, or the only one that fits; the first test that any column passes decides."""
    if kind in chosen and chosen[kind] in features:
        return chosen[kind]
    found = next(filter(None, ([name for name in features if fit(features[name])] for fit in fits)), [])
    if kind in chosen or len(found) != 1:
        raise UserError(
            f"--data.root={root}: which column is the {kind}? name one of {listing(found or list(features))} as in "
            f"--data.root={root.split(',')[0]},{kind}={(found or list(features))[0]}"
        )
    return found[0]


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _is_bytes(feature: Any) -> bool:
    """Whether it may hold the bytes of a file, directly or in a dict."""
    held = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(held, "dtype", "") in ("binary", "large_binary")


def _has_names(feature: Any) -> bool:
    return type(feature).__name__ == "ClassLabel"


def _is_value(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string", "bool", "int8", "int16", "int32", "int64")
