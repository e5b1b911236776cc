"""The `similar` command: the nearest images of a folder to each of some pictures."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from headstart.data.store import FeatureStore
from headstart.errors import UserError
from headstart.features.stream import FileStream
from headstart.files import csv_bytes, write_atomically
from headstart.label.heap import add_features, folder_of_images, load
from headstart.parser import parser_of, required
from headstart.ranges import Positive, RunName
from headstart.report.page import jpeg
from headstart.runs.folder import new_run_folder
from headstart.search.knn import nearest
from headstart.templates import rendered
from headstart.terminal import quiet_libraries, say

SIDE = 160  # pixels of a picture on the page


def similar(options: Sequence[str]) -> list[dict[str, Any]]:
    """Finds the nearest images by cosine of centred features; writes a table and a page with pictures.

    Returns the rows of the table: `picture`, `rank`, `path`, `similarity`.
    """
    quiet_libraries()
    parser = parser_of("similar", "PICTURE…")
    parser.add_argument("pictures", nargs="*", type=str, help="image files")
    parser.add_argument("--in", type=str | None, help="folder of the images to search")
    parser.add_argument("--k", type=Positive, default=20, help="number of images to find for each picture")
    add_features(parser)
    parser.add_argument("--name", type=RunName | None, help="name of the run; None: <folder>-similar")
    parser.add_argument("--logs", type=str, default="logs", help="where to write the folder of the run")
    given = parser.parse_args(list(options))
    required(given, "--in")
    if not given.pictures:
        raise UserError("no PICTURE; give image files")
    source = folder_of_images(given["in"], "--in")
    store, _ = load(source, given)
    stream = FileStream(
        store.backbone, store.device, store.arithmetic, store.workers, store.max_pixels, store.cache_dir
    )
    rows = _rows(given.pictures, _features(stream, given.pictures), store, given.k)
    folder = new_run_folder(Path(given.logs), given.name or f"{source.path.name}-similar", source.path)
    table = [list(rows[0]), *([*row.values()] for row in rows)]
    write_atomically(folder / "similar.csv", csv_bytes(table))
    write_atomically(folder / "similar.html", _page(rows, stream))
    for row in rows[:5]:
        say(f"similar:  {row['similarity']:.3f}  {row['path']}")
    say(f"table:    {folder / 'similar.csv'}")
    say(f"page:     {folder / 'similar.html'}")
    return rows


def _features(stream: FileStream, pictures: Sequence[str]) -> torch.Tensor:
    parts = list(stream(pictures))
    for part in parts:
        for key, reason in part.failures.items():
            raise UserError(f"{os.fsdecode(key)}: {reason}")
    return torch.cat([part.features for part in parts])


def _rows(pictures: Sequence[str], features: torch.Tensor, store: FeatureStore, k: int) -> list[dict[str, Any]]:
    """A row per found image; a picture is not found for itself."""
    similarities, places = nearest(features, store.matrix(store.items), k + 1)
    root, rows = store.source.path, list[dict[str, Any]]()
    for picture, near, found in zip(pictures, similarities.tolist(), places.tolist(), strict=True):
        paths = [root / store.items[place].path for place in found]
        others = [pair for pair in zip(paths, near, strict=True) if pair[0].resolve() != Path(picture).resolve()]
        rows += [
            {"picture": picture, "rank": rank, "path": str(path), "similarity": round(value, 6)}
            for rank, (path, value) in enumerate(others[:k], start=1)
        ]
    return rows


def _page(rows: Sequence[dict[str, Any]], stream: FileStream) -> bytes:
    """The images found, next to each picture; one self-contained file."""

    def tile(path: str, text: str) -> dict[str, Any]:
        image = stream.image(path)
        image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
        return {"picture": jpeg(image), "text": text}

    sections = dict[str, list[dict[str, Any]]]()
    for row in rows:
        tiles = sections.setdefault(row["picture"], [tile(row["picture"], row["picture"])])
        tiles.append(tile(row["path"], f"{row['similarity']:.3f} {row['path']}"))
    return rendered("label/similar.html.jinja", title="Similar pictures", rows=sections.values())
