"""Data by name: torchvision's sets and Hugging Face's; datasets whose hashes are remembered."""

import hashlib
import io
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from headstart import DatasetData, ImageFolderData, TransferClassifier, decoding
from headstart.data import datasets as rows_module
from headstart.errors import UserError
from support import COLOURS, draw, features, newest_run, rows_of

parquet = pytest.importorskip("pyarrow.parquet")
hub = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by an entry with each image whose bytes are opened or pixels hashed."""
    calls: list[int] = []
    for module, name in ((decoding, "_opened"), (rows_module, "content_digest")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=function: (calls.append(1), real(*given))[1])
    return calls


def as_parquet(folder: Path, file: Path, names: tuple[str, str] = ("image", "label")) -> Path:
    """The bytes of the folder's files, with their classes by name, as a plain Parquet file."""
    paths = sorted(folder.glob("*/*"))
    images = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    table = parquet.core.pa.table if hasattr(parquet, "core") else __import__("pyarrow").table
    parquet.write_table(table({names[0]: images, names[1]: [path.parent.name for path in paths]}), file)
    return file


def test_a_parquet_file_of_a_folders_bytes_is_the_folder_to_the_bit(colours, tmp_path, train, own_cache, capsys, opened):
    short = "--trainer.max_epochs=3", "--data.source=hf"
    folder = train(colours, "--trainer.max_epochs=3", "--name=folder")
    of_folder = features(own_cache), {row["sha256"]: row["split"] for row in rows_of(newest_run() / "splits.csv")}
    shutil.rmtree(own_cache)
    file = as_parquet(colours, tmp_path / "drawn.parquet")
    found = train(file, *short)
    assert newest_run().parent.name == "drawn"
    assert features(own_cache) == of_folder[0]
    assert {row["sha256"]: row["split"] for row in rows_of(newest_run() / "splits.csv")} == of_folder[1]
    scores = {name for name in folder if name.startswith(("val/", "test/"))}
    assert {name: found[name] for name in scores} == {name: folder[name] for name in scores}
    capsys.readouterr()
    opened.clear()
    again = train(file, *short)
    assert "HIT" in capsys.readouterr().out
    assert len(opened) < 30  # the rows that are looked at again, of 60 images
    assert {name: again[name] for name in scores} == {name: folder[name] for name in scores}
