"""Reads a CSV file that lists images with their classes, and optionally their splits, groups and domains."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from headstart.data.folders import split_named
from headstart.data.splits import BETWEEN, Item, Split, refuse_torn_groups
from headstart.errors import UserError
from headstart.files import read_csv
from headstart.terminal import say

NEEDED = ("path", "label")


def read_table(file: Path, multilabel: bool | None = None) -> tuple[list[str], list[Item]]:
    """The sorted class names, and the images, from the columns path and label, and optionally split, group and domain.

    An empty split is assigned by hash; if no image is in val, train is split by hash too. A label such as red|round is
    two labels, unless ``multilabel`` is false; if it is true, an image may also have several rows, or an empty label.
    """
    rows = [{name: value.strip() for name, value in row.items()} for row in read_csv("--data.csv", file, NEEDED)]
    several = any(BETWEEN in row["label"] for row in rows) if multilabel is None else multilabel
    if several and multilabel is None:
        say("data: an image may have several labels, since some contain |; --data.multilabel=false keeps them whole")
    for line, row in enumerate(rows, start=2):
        if empty := [name for name in NEEDED if not row.get(name)]:
            remedy = ", or add --data.multilabel=true if images may have no label" if empty == ["label"] else ""
            if not (remedy and multilabel):
                raise UserError(f"--data.csv={file}, line {line}: no {empty[0]}; fill it in or remove the line{remedy}")
    names_of = [_names(row["label"], several) for row in rows]
    labels = sorted({name for names in names_of for name in names})
    if len(labels) < 2:
        raise UserError(f"--data.csv={file}: {len(labels)} class(es), but at least 2 are needed")
    number = {label: place for place, label in enumerate(labels)}
    items: dict[str, Item] = {}
    for line, (row, names) in enumerate(zip(rows, names_of, strict=True), start=2):
        group, domain, split = row.get("group") or "", row.get("domain") or "", _split(row, file, line)
        tags = tuple(sorted({number[name] for name in names})) if several else None
        item = Item(
            row["path"], -1 if several else number[names[0]], split=split, group=group, domain=domain, tags=tags
        )
        first = items.setdefault(item.path, item)
        both = replace(first, tags=tuple(sorted({*first.labels, *item.labels}))) if multilabel else first
        if replace(item, tags=both.tags) != both:
            remedy = "" if multilabel else ", or add --data.multilabel=true if it has both labels"
            raise UserError(f"--data.csv={file}, line {line}: {item.path} is listed twice; keep one{remedy}")
        items[item.path] = both
    return labels, _ready(list(items.values()), file)


def _names(label: str, several: bool) -> list[str]:
    """The names of a row's labels."""
    return [name for part in label.split(BETWEEN) if (name := part.strip())] if several else [label]


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
