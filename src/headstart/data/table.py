"""A CSV file that lists images, their classes, and maybe their splits and groups."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from headstart.data.folders import SPLIT_FOLDERS
from headstart.data.splits import Item, Split
from headstart.errors import UserError

NEEDED, OPTIONAL = ("path", "label"), ("split", "group")


@dataclass(frozen=True)
class ImageTable:
    """The images that a file lists.

    Attributes:
        file: its absolute path.
        class_names: the different labels, sorted.
        items: the images, by their path relative to the file; with a split where the file gives one.
    """

    file: Path
    class_names: list[str]
    items: list[Item]

    @classmethod
    def read(cls, file: Path) -> "ImageTable":
        """Reads the columns path and label, and split and group if they are there.

        Without an image for val, those of train are split; then, or with the empty split, a hash decides.

        Raises:
            UserError: columns are missing, values are empty or unknown, or the lines contradict each other.
        """
        rows = _rows(file)
        labels = sorted({row["label"] for row in rows})
        if len(labels) < 2:
            raise UserError(f"--data.csv={file}: {len(labels)} class(es), and at least 2 are needed")
        number = {label: place for place, label in enumerate(labels)}
        items: dict[str, Item] = {}
        for line, row in enumerate(rows, start=2):
            item = Item(row["path"], number[row["label"]], split=_split(row, file, line), group=row.get("group") or "")
            if items.setdefault(item.path, item) != item:
                raise UserError(f"--data.csv={file}, line {line}: {item.path} was listed before, otherwise; keep one")
        return cls(file, labels, _ready(list(items.values()), file))


def _rows(file: Path) -> Sequence[Mapping[str, str]]:
    """The lines with their values stripped."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text, strict=True)
            columns = [name.strip() for name in reader.fieldnames or []]
            rows = [dict(zip(columns, map(_stripped, row.values()), strict=False)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data.csv={file}: cannot be read as CSV ({error})") from error
    if missing := [name for name in NEEDED if name not in columns]:
        raise UserError(
            f"--data.csv={file}: lacks {', '.join(missing)}; its first line names the columns {', '.join(NEEDED)}, "
            f"and maybe {', '.join(OPTIONAL)}"
        )
    for line, row in enumerate(rows, start=2):
        if empty := [name for name in NEEDED if not row.get(name)]:
            raise UserError(f"--data.csv={file}, line {line}: no {empty[0]}; fill it in or remove the line")
    return rows


def _stripped(value: object) -> str:
    return value.strip() if isinstance(value, str) else ""


def _split(row: Mapping[str, str], file: Path, line: int) -> Split | None:
    given = row.get("split", "").lower()
    if given and given not in SPLIT_FOLDERS:
        raise UserError(f"--data.csv={file}, line {line}: unknown split {given!r}; use train, val or test, or none")
    return SPLIT_FOLDERS.get(given)


def _ready(items: Sequence[Item], file: Path) -> list[Item]:
    """Checks that groups keep together, and leaves what trains to be split where nothing validates."""
    places: dict[str, set[Split | None]] = defaultdict(set)
    for item in items:
        if item.group:
            places[item.group].add(item.split)
    if torn := [group for group, found in places.items() if len(found) > 1]:
        raise UserError(f"--data.csv={file}: group {torn[0]!r} is in several splits; give its images the same")
    given = {item.split for item in items}
    if "val" in given or not given - {None}:
        return list(items)
    return [replace(item, split=None) if item.split == "train" else item for item in items]
