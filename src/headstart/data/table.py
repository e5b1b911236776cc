"""Reads a CSV file that lists images with their classes, and optionally their splits, groups and domains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from headstart.data.folders import split_named
from headstart.data.splits import Item, Split, refuse_torn_groups
from headstart.errors import UserError
from headstart.files import read_csv

NEEDED = ("path", "label")


def read_table(file: Path) -> tuple[list[str], list[Item]]:
    """The sorted class names, and the images, from the columns path and label, and optionally split, group and domain.

    An empty split is assigned by hash; if no image is in val, so are those of train.
    """
    rows = [{name: value.strip() for name, value in row.items()} for row in read_csv("--data.csv", file, NEEDED)]
    for line, row in enumerate(rows, start=2):
        if empty := [name for name in NEEDED if not row.get(name)]:
            raise UserError(f"--data.csv={file}, line {line}: no {empty[0]}; fill it in or remove the line")
    labels = sorted({row["label"] for row in rows})
    if len(labels) < 2:
        raise UserError(f"--data.csv={file}: {len(labels)} class(es), but at least 2 are needed")
    number = {label: place for place, label in enumerate(labels)}
    items: dict[str, Item] = {}
    for line, row in enumerate(rows, start=2):
        group, domain = row.get("group") or "", row.get("domain") or ""
        label, split = number[row["label"]], _split(row, file, line)
        item = Item(row["path"], label, split=split, group=group, domain=domain)
        if items.setdefault(item.path, item) != item:
            raise UserError(f"--data.csv={file}, line {line}: {item.path} is listed twice; keep one")
    return labels, _ready(list(items.values()), file)


def _split(row: Mapping[str, str], file: Path, line: int) -> Split | None:
    given = row.get("split", "")
    if given and not split_named(given):
        raise UserError(f"--data.csv={file}, line {line}: unknown split {given!r}; use train, val or test")
    return split_named(given)


def _ready(items: Sequence[Item], file: Path) -> list[Item]:
    """Checks that no group is in several splits; if no image is in val, leaves those of train to be split."""
    refuse_torn_groups(items, f"--data.csv={file}")
    given = {item.split for item in items}
    if "val" in given or not given - {None}:
        return list(items)
    return [replace(item, split=None) if item.split == "train" else item for item in items]
