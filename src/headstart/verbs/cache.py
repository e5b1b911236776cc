"""The verb `cache`: what is kept between runs, whether it is whole, and how to be rid of it. Imports no torch."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat
from rich.table import Table
from safetensors import SafetensorError, safe_open

from headstart.features.hashes import cache_folder, verify
from headstart.parser import parser_of
from headstart.terminal import images_bar, say


def cache(options: Sequence[str]) -> dict[str, Any]:
    """Lists, verifies or prunes the cache; gives counts, by name."""
    parser = parser_of("cache", "[list|verify|prune]")
    parser.add_argument("action", nargs="?", type=Literal["list", "verify", "prune"], default="list", help="what to do")
    parser.add_argument("--cache_dir", type=str | None, help="None: $HEADSTART_CACHE, else the user's cache folder")
    parser.add_argument("--days", type=NonNegativeFloat, default=30.0, help="prune what was not used for so many days")
    given = parser.parse_args(list(options))
    folder = cache_folder(given.cache_dir)
    keys = sorted(path.parent for path in folder.glob("features/*/key.json"))
    if given.action == "verify":
        return _verify(keys)
    if given.action == "prune":
        return _prune(keys, given.days)
    return _list(folder, keys)


def _list(folder: Path, keys: Sequence[Path]) -> dict[str, Any]:
    table = Table("backbone", "pixels", "views", "arithmetic", "images", "MB", "last used", title=str(folder))
    total = 0
    for key in keys:
        try:
            about = json.loads((key / "key.json").read_text())
            images = sum(_images(path) for path in key.glob("*.safetensors"))
        except (OSError, ValueError, SafetensorError):
            say(f"{key}: damaged; `headstart cache verify` repairs it")
            continue
        size = _size(key)
        total += size
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime((key / "key.json").stat().st_mtime))
        table.add_row(
            f"{about['backbone']} {about['weights'][:8]}",
            str(about["preprocessing"]["crop_size"]),
            about["views"]["policy"],
            f"{about['arithmetic']['dtype']} {about['arithmetic']['device']}",
            str(images),
            f"{size / 1e6:.1f}",
            used,
        )
    say(table)
    return {"keys": len(keys), "bytes": total}


def _verify(keys: Sequence[Path]) -> dict[str, Any]:
    """Compares every checksum; a damaged piece is deleted, and the next run computes it again."""
    shards = [path for key in keys for path in sorted(key.glob("*.safetensors"))]
    damaged = 0
    with images_bar("verifying", len(shards)) as advance:
        for path in shards:
            try:
                verify(path)
            except (OSError, ValueError):
                path.unlink()
                damaged += 1
            advance(1)
    say(f"cache: {len(shards)} pieces read, {damaged} damaged and deleted; the next run computes those again")
    return {"pieces": len(shards), "damaged": damaged}


def _prune(keys: Sequence[Path], days: float) -> dict[str, Any]:
    old = [key for key in keys if (key / "key.json").stat().st_mtime <= time.time() - days * 86_400]
    freed = sum(_size(key) for key in old)
    for key in old:
        shutil.rmtree(key, ignore_errors=True)  # a run may be writing into it
    for leftover in (path for key in keys for path in key.glob(".*.tmp")):  # of writers that were killed
        if leftover.stat().st_mtime <= time.time() - 86_400:
            leftover.unlink()
    say(
        f"cache: {len(old)} of {len(keys)} sets of features were not used for {days:g} days; freed {freed / 1e6:.1f} MB"
    )
    return {"pruned": len(old), "bytes": freed}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _images(shard: Path) -> int:
    """How many rows a shard has, by its header."""
    with safe_open(shard, framework="numpy") as file:
        rows: int = file.get_slice("rows").get_shape()[0]
        return rows
