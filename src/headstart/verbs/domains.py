"""The `domains` command: leaves out each domain in turn, trains on the others, and tests on the one left out."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from headstart.data import splits
from headstart.data.module import ImageFolderData
from headstart.data.sources import open_source
from headstart.data.store import STORE_OPTIONS, loaded_store
from headstart.domains.figure import roc_by_domain
from headstart.domains.leave_out import LeftOut, check_domains, leave_one_out
from headstart.errors import UserError
from headstart.files import csv_bytes, write_atomically
from headstart.model.backbone import BACKBONE_OPTIONS
from headstart.model.classifier import TransferClassifier
from headstart.parser import OptionParser, add_options, add_run, parser_of
from headstart.runs.folder import new_run_folder
from headstart.terminal import images_bar, one_line, quiet_libraries, say

SPLIT_OPTIONS = ("val_fraction", "test_fraction", "split_seed")
COLUMNS = ["domain", "images", "acc", "auroc", "seen acc", "seen auroc", "l2"]


def domains(options: Sequence[str]) -> list[dict[str, Any]]:
    """Trains the exact head on all domains but one, for each in turn; returns a row of scores per domain."""
    quiet_libraries()
    given = _parser().parse_args(list(options))
    kind = given.data.source or ("domains" if given.data.root else None)
    source = open_source(given.data.root, given.data.csv, kind)
    if source.multilabel:
        raise UserError(f"--data.csv={source.path}: has several labels per image, but a head of one is trained here")
    store = loaded_store(source, given)
    store.check_skips()
    fractions = given.data.val_fraction, given.data.test_fraction
    items = splits.assign(store.items, source.class_names, *fractions, given.data.split_seed)
    names = check_domains(items, source.class_names)
    with images_bar("domains", len(names)) as advance:
        found = leave_one_out(items, source.class_names, store.matrix, given.balance, advance)
    rows = [_row(each) for each in found]
    folder = new_run_folder(Path(given.logs), given.name or f"{source.path.stem}-domains", source.path)
    write_atomically(folder / "domains.csv", csv_bytes([COLUMNS, *(list(row.values()) for row in rows)]))
    roc_by_domain(found).save(folder / "roc.png")
    write_atomically(folder / "domains.json", json.dumps(rows, indent=2).encode())
    _say(rows)
    say(f"scores:   {folder / 'domains.csv'}")
    say(f"ROC:      {folder / 'roc.png'}")
    return rows


def _row(found: LeftOut) -> dict[str, Any]:
    auroc = [None if part.auroc != part.auroc else part.auroc for part in (found.unseen, found.seen)]
    values = (found.domain, len(found.unseen.items), found.unseen.acc, auroc[0], found.seen.acc, auroc[1], found.l2)
    return dict(zip(COLUMNS, values, strict=True))


def _say(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(*COLUMNS[:-1], title="each domain, by the head of the others; the worst first")
    for row in sorted(rows, key=lambda row: row["acc"]):
        scores = ("" if row[name] is None else f"{row[name]:.3f}" for name in COLUMNS[2:-1])
        table.add_row(one_line(row["domain"]), str(row["images"]), *scores)
    say(table)
    worst = min(rows, key=lambda row: row["acc"])
    mean, known = (statistics.mean(row[name] for row in rows) for name in ("acc", "seen acc"))
    say(
        f"domains:  accuracy {mean:.3f} on a new domain (mean), {known:.3f} on the training domains; the worst is "
        f"{one_line(worst['domain'])}, {worst['acc']:.3f}"
    )


def _parser() -> OptionParser:
    parser = parser_of("domains")
    add_options(parser, ImageFolderData, "data", ("root", "csv", "source", *STORE_OPTIONS, *SPLIT_OPTIONS))
    add_options(parser, TransferClassifier, "model", BACKBONE_OPTIONS)
    parser.add_argument("--balance", type=bool, default=False, help="weight domains equally, whatever their size")
    add_run(parser, "<data folder>-domains")
    return parser
