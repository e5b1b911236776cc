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
from headstart.files import read_regular
from headstart.parser import parser_of
from headstart.terminal import images_bar, say, say_all


def cache(options: Sequence[str]) -> dict[str, Any]:
    """Lists, verifies or prunes the cache; gives counts, by name."""
    parser = parser_of("cache", "[list|verify|prune]")
    parser.add_argument("action", nargs="?", type=Literal["list", "verify", "prune"], default="list", help="what to do")
    parser.add_argument("--cache_dir", type=str | None, help="None: $HEADSTART_CACHE, else the user's cache folder")
    parser.add_argument("--days", type=NonNegativeFloat, default=30.0, help="prune what was not used for so many days")
    given = parser.parse_args(list(options))
    folder = cache_folder(given.cache_dir)
    features = folder / "features"  # which glob would pass over in silence where it cannot be read
    keys = sorted(key for key in features.iterdir() if (key / "key.json").exists()) if features.is_dir() else []
    if given.action == "verify":
        return _verify(keys)
    if given.action == "prune":
        return _prune(keys, given.days)
    return _list(folder, keys)


def _list(folder: Path, keys: Sequence[Path]) -> dict[str, Any]:
    table = Table("backbone", "pixels", "views", "arithmetic", "images", "MB", "last used", title=str(folder))
    total, damaged = 0, []
    for key in keys:
        try:
            described = _described(key)
            images = sum(_images(path) for path in key.glob("*.safetensors"))
        except (OSError, ValueError, LookupError, TypeError, SafetensorError):  # or of another form
            damaged.append(f"{key}: damaged; `headstart cache verify` repairs it")
            continue
        size = _size(key)
        total += size
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime((key / "key.json").stat().st_mtime))
        table.add_row(*described, str(images), f"{size / 1e6:.1f}", used)
    say_all(damaged)
    say(table)
    return {"keys": len(keys), "bytes": total}


def _described(key: Path) -> list[str]:
    """The columns of the table that tell what the features of a key are."""
    about = json.loads(read_regular(key / "key.json"))
    arithmetic = f"{about['arithmetic']['dtype']} {about['arithmetic']['device']}"
    pixels, policy = about["preprocessing"]["crop_size"], about["views"]["policy"]
    return [f"{about['backbone']} {about['weights'][:8]}", str(pixels), str(policy), arithmetic]


def _verify(keys: Sequence[Path]) -> dict[str, Any]:
    """Compares every checksum; a damaged piece is deleted, and the next run computes it again."""
    shards = [path for key in keys for path in sorted(key.glob("*.safetensors"))]
    damaged = 0
    with images_bar("verifying", len(shards)) as advance:
        for path in shards:
            try:
                verify(path)
            except PermissionError:  # of a file that may be whole
                raise
            except (OSError, ValueError):
                path.unlink(missing_ok=True)
                damaged += 1
            advance(1)
    say(f"cache: {len(shards)} pieces read, {damaged} damaged and deleted; the next run computes those again")
    return {"pieces": len(shards), "damaged": damaged}


def _prune(keys: Sequence[Path], days: float) -> dict[str, Any]:
    old = [key for key in keys if (key / "key.json").stat().st_mtime <= time.time() - days * 86_400]
    size = sum(_size(key) for key in old)
    for key in old:
        shutil.rmtree(key, ignore_errors=True)  # a run may be writing into it
    freed = size - sum(_size(key) for key in old)
    say_all([f"{key}: not all of it could be deleted" for key in old if key.exists()])
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
