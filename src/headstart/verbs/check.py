"""The `check` command: finds problems in a folder of images, from their cached features."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.audit.findings import KINDS, Finding, csv_rows, find
from headstart.audit.page import page
from headstart.data import splits
from headstart.data.module import ImageFolderData
from headstart.data.sources import WHERE, Source, chosen_source
from headstart.data.splits import Item
from headstart.data.store import STORE_OPTIONS, loaded_store
from headstart.errors import UserError
from headstart.files import csv_bytes, write_atomically
from headstart.model.backbone import BACKBONE_OPTIONS
from headstart.model.classifier import TransferClassifier
from headstart.parser import OptionParser, add_options, add_run, parser_of
from headstart.runs.folder import new_run_folder
from headstart.search.neighbours import rooted
from headstart.terminal import one_line, quiet_libraries, say

SHOWN, PAGE = 10, "check.html"
GROUPED = ("duplicate", "near-duplicate")
SPLIT_OPTIONS = ("val_fraction", "test_fraction", "split_seed", "splits")


def check(options: Sequence[str]) -> dict[str, int]:
    """Looks for duplicates, likely wrong labels, outliers, small classes and damaged files; changes nothing.

    Returns the number of findings of each kind.
    """
    quiet_libraries()
    given = _parser().parse_args(list(options))
    source = chosen_source(given.data)
    store = loaded_store(source, given)
    if not store.items:
        raise UserError(f"{source.path}: no readable image; {len(store.skipped)} files cannot be read")
    items, fault = _in_splits(store.items, source, given.data)
    findings = list(find(source, store.skipped, items, rooted(store.matrix(items).whole().cpu())))
    folder = new_run_folder(Path(given.logs), given.name or f"{source.path.stem}-check", source.path)
    write_atomically(folder / "check.csv", csv_bytes(csv_rows(findings)))
    write_atomically(folder / PAGE, page(f"{folder.parent.name}, {folder.name}", findings, items, store))
    counts = Counter(finding.kind for finding in findings)
    _say_findings(findings, counts, len(items))
    if fault:
        say(f"train:    would stop: {fault}")
    say(f"findings: {folder / 'check.csv'}    (nothing was changed)")
    say(f"pictures: {folder / PAGE}")
    return {kind: counts[kind] for kind in KINDS}


def _in_splits(items: Sequence[Item], source: Source, given: Any) -> tuple[list[Item], str]:
    """The images with their splits in `train`, and the error that would stop it; then all are training images."""
    try:
        known = splits.frozen(items, Path(given.splits).expanduser()) if given.splits else items
        test = 0.0 if source.has_test else given.test_fraction
        return splits.assign(known, source.class_names, given.val_fraction, test, given.split_seed), ""
    except UserError as error:
        return [replace(item, split=item.split or "train") for item in items], str(error)


def _parser() -> OptionParser:
    parser = parser_of("check")
    add_options(parser, ImageFolderData, "data", (*WHERE, *STORE_OPTIONS, *SPLIT_OPTIONS))
    add_options(parser, TransferClassifier, "model", BACKBONE_OPTIONS)
    add_run(parser, "<data folder>-check")
    return parser


def _say_findings(findings: Sequence[Finding], counts: Counter[str], images: int) -> None:
    table = Table("problem", "count", "first ones", title=f"{images} images")
    for kind, meaning in KINDS.items():
        lines: dict[object, list[Finding]] = defaultdict(list)
        for found in findings:
            if found.kind == kind:
                lines[found.group or found.path].append(found)
        count = f"{counts[kind]}{f' in {len(lines)} groups' if kind in GROUPED and lines else ''}"
        table.add_row(meaning, count, "\n".join(_line(together) for together in list(lines.values())[:SHOWN]))
    say(table)


def _line(together: Sequence[Finding]) -> str:
    note = together[0].note
    return one_line(f"{', '.join(found.path for found in together)}{f' ({note})' if note else ''}")
