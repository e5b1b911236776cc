"""The `cache` command: lists, verifies and prunes the files cached between runs. Does not import torch."""

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

# The folders beside the features, and what their files are; each is dated by its last use.
OTHERS = {"int8": "quantised networks", "arithmetic": "measured speeds"}


def cache(options: Sequence[str]) -> dict[str, Any]:
    """Lists, verifies or prunes the cache; returns counts by name."""
    parser = parser_of("cache", "[list|verify|prune]")
    parser.add_argument("action", nargs="?", type=Literal["list", "verify", "prune"], default="list", help="what to do")
    parser.add_argument(
        "--cache_dir", type=str | None, help="cache folder; None: $HEADSTART_CACHE, else the user's cache folder"
    )
    parser.add_argument("--days", type=NonNegativeFloat, default=30.0, help="prune files not used for this many days")
    given = parser.parse_args(list(options))
    folder = cache_folder(given.cache_dir)
    features = folder / "features"  # glob would silently skip an unreadable folder
    keys = sorted(key for key in features.iterdir() if (key / "key.json").exists()) if features.is_dir() else []
    if given.action == "verify":
        return _verify(keys)
    if given.action == "prune":
        return _prune(folder, keys, given.days)
    return _list(folder, keys)


def _list(folder: Path, keys: Sequence[Path]) -> dict[str, Any]:
    table = Table("backbone", "pixels", "views", "arithmetic", "images", "MB", "last used", title=str(folder))
    total, damaged = 0, []
    for key in keys:
        try:
            described = _described(key)
            images = sum(_images(path) for path in key.glob("*.safetensors"))
        except (OSError, ValueError, LookupError, TypeError, SafetensorError):  # or of an unknown format
            damaged.append(f"{key}: damaged; `headstart cache verify` repairs it")
            continue
        size = _size(key)
        total += size
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime((key / "key.json").stat().st_mtime))
        table.add_row(*described, str(images), f"{size / 1e6:.1f}", used)
    say_all(damaged)
    say(table)
    for name, what in OTHERS.items():
        sizes = [path.stat().st_size for path in _others(folder / name)]
        total += sum(sizes)
        if sizes:
            say(f"cache: {len(sizes)} {what} in {name}/, {sum(sizes) / 1e6:.1f} MB")
    return {"keys": len(keys), "bytes": total}


def _others(folder: Path) -> list[Path]:
    """The files of a folder other than features, except locks, which a process may hold."""
    return [path for path in folder.iterdir() if path.suffix != ".lock"] if folder.is_dir() else []


def _described(key: Path) -> list[str]:
    """The table's columns that describe the features of a key."""
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
            except PermissionError:  # the file may be intact
                raise
            except (OSError, ValueError):
                path.unlink(missing_ok=True)
                damaged += 1
            advance(1)
    say(f"cache: {len(shards)} pieces read, {damaged} damaged and deleted; the next run computes those again")
    return {"pieces": len(shards), "damaged": damaged}


def _prune(folder: Path, keys: Sequence[Path], days: float) -> dict[str, Any]:
    before = time.time() - days * 86_400
    old = [key for key in keys if (key / "key.json").stat().st_mtime <= before]
    others = [path for name in OTHERS for path in _others(folder / name)]
    unused = [path for path in others if path.stat().st_mtime <= before]
    size, freed = sum(_size(key) for key in old), sum(path.stat().st_size for path in unused)
    for path in unused:
        path.unlink(missing_ok=True)
    for key in old:
        shutil.rmtree(key, ignore_errors=True)  # a run may be writing into it
    freed += size - sum(_size(key) for key in old)
    say_all([f"{key}: could not be deleted completely" for key in old if key.exists()])
    for leftover in (path for key in keys for path in key.glob(".*.tmp")):  # left by killed writers
        if leftover.stat().st_mtime <= time.time() - 86_400:
            leftover.unlink()
    counts = f"{len(old)} of {len(keys)} sets of features and {len(unused)} of {len(others)} other files"
    say(f"cache: {counts} were not used for {days:g} days; freed {freed / 1e6:.1f} MB")
    return {"pruned": len(old), "bytes": freed}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _images(shard: Path) -> int:
    """Number of rows of a shard, from its header."""
    with safe_open(shard, framework="numpy") as file:
        rows: int = file.get_slice("rows").get_shape()[0]
        return rows
