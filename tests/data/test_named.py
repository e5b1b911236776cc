"""Data by name: torchvision's sets and Hugging Face's; datasets whose hashes are remembered."""

import base64
import hashlib
import io
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from headstart import DatasetData, ImageFolderData, TransferClassifier, decoding
from headstart.cli import main
from headstart.data import datasets as rows_module
from headstart.data import folders
from headstart.errors import UserError
from support import COLOURS, TINY, draw, features, newest_run, rows_of

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
hub = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    hub.disable_progress_bars()
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
    parquet.write_table(pyarrow.table({names[0]: images, names[1]: [path.parent.name for path in paths]}), file)
    return file


def test_a_parquet_file_of_a_folders_bytes_is_the_folder(colours, tmp_path, train, own_cache, capsys, opened):
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
    best = newest_run() / "checkpoints/best.ckpt"
    assert main(["evaluate", f"--ckpt_path={best}", "--report=false"])["test/acc"] == folder["test/acc"]
    assert main(["check", *short[1:], f"--data.root={file}", *TINY])["damaged"] == 0  # wing: audit


def cifar_archive(folder: Path, monkeypatch: pytest.MonkeyPatch, images: int = 12) -> Path:
    """CIFAR-10's archive with a few made pictures, and its checksums in torchvision's class."""
    random, base = np.random.default_rng(0), CIFAR10.base_folder
    shades = np.repeat(np.arange(10), 1024 * 3).reshape(10, 3072) * 25
    files = {name: None for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)}
    for name in files:
        labels = [number % 10 for number in range(images * 10)]
        data = (shades[labels] + random.integers(0, 20, (len(labels), 3072))).astype(np.uint8)
        files[name] = pickle.dumps({"data": data, "labels": labels})
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    files["batches.meta"] = pickle.dumps({"label_names": names})
    folder.mkdir()
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{base}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    for each in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, each, [[name, md5[name]] for name, _ in getattr(CIFAR10, each)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((folder / CIFAR10.filename).read_bytes()).hexdigest())
    return folder


@pytest.mark.fault("named dataset that is not available")
def test_cifar10_by_name_from_its_archive(tmp_path, train, capsys, opened, monkeypatch, refused):
    folder = cifar_archive(tmp_path / "sets", monkeypatch)
    options = "--data.source=torchvision", "--trainer.max_epochs=1", "--data.limit=5"
    first = train(folder / "CIFAR10", *options)
    out = capsys.readouterr().out
    assert "MISS" in out
    assert first["images"] == {"train": 50, "val": first["images"]["val"], "test": 120}
    assert newest_run().parent.name == "CIFAR10"
    opened.clear()
    again = train(folder / "CIFAR10", *options)
    assert "HIT" in capsys.readouterr().out
    assert len(opened) < 30  # of 720 images
    assert again["test/loss"] == first["test/loss"]
    (folder / CIFAR10.base_folder / "data_batch_1").write_bytes(b"changed")
    (folder / CIFAR10.filename).unlink()
    line = refused("train", f"--data.root={folder / 'CIFAR10'}", "--data.source=torchvision")
    assert "is not available (the environment forbids the network)" in line
    assert "try CIFAR10" in refused("train", "--data.root=CIFAR11", "--data.source=torchvision")


class Given(torch.utils.data.Dataset[Any]):
    """Rows as a user has them."""

    classes = ("dark", "light")

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Any:
        row = self.rows[index]
        return row() if callable(row) else row

    def __len__(self) -> int:
        return len(self.rows)


def squares(seed: int = 0, count: int = 40) -> list[tuple[Image.Image, int]]:
    random = np.random.default_rng(seed)
    pixels = [random.integers(0, 100, (40, 40, 3)).astype(np.uint8) + (i % 2) * np.uint8(150) for i in range(count)]
    return [(Image.fromarray(each), i % 2) for i, each in enumerate(pixels)]


def scanned(rows: list[Any], **options: Any) -> list[str]:
    """The hashes that a run finds."""
    data = DatasetData(Given(rows), num_workers=0, **options)
    data.load(TransferClassifier(data.class_names, "timm/test_resnet", "random", 32).backbone, torch.device("cpu"))
    return [item.digest.hex() for item in data.store.items]


@pytest.mark.fault("dataset that changed since its hashes were stored")
def test_hashes_of_a_dataset_are_remembered_under_its_fingerprint(capsys, opened):
    rows = squares()
    first = scanned(rows)
    assert "40 images are hashed in each run; DatasetData remembers them under a fingerprint" in capsys.readouterr().out
    assert scanned(rows, fingerprint="a") == first
    opened.clear()
    assert scanned(rows, fingerprint="a") == first
    assert len(opened) < 20
    assert "hashed in each run" not in capsys.readouterr().out
    others = squares(seed=1)
    assert scanned(others, fingerprint="a") == scanned(others)
    assert "the dataset changed since its hashes were stored" in capsys.readouterr().out


def test_rows_that_are_dicts_and_bytes(colours):
    paths = sorted(colours.glob("[br]*/*.png"))
    rows = [{"img": path.read_bytes(), "y": number // 20} for number, path in enumerate(paths)]
    wanted = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert scanned(rows, columns=("img", "y")) == wanted


@pytest.mark.fault("dataset that returns different pixels when read again")
def test_a_dataset_that_gives_other_pixels_is_refused():
    images = [image for image, _ in squares(count=2000)]
    random = np.random.default_rng(0)
    rows = [lambda label=label: (images[random.integers(2000)], label) for label in [0, 1] * 20]
    with pytest.raises(UserError, match="different pixels when it is read again: remove the random transform"):
        scanned(rows)


@pytest.mark.fault("streamed dataset")
def test_a_streamed_dataset_is_refused():
    with pytest.raises(UserError, match="train is streamed, but an image is split by its content"):
        DatasetData(hub.Dataset.from_dict({"image": [0]}).to_iterable_dataset(), class_names=["a", "b"])


def test_columns_and_splits_of_hugging_face(colours, tmp_path, refused, capsys):
    paths = sorted(colours.glob("*/*.png"))
    names = {"fine": hub.ClassLabel(names=[*COLOURS]), "coarse": hub.ClassLabel(names=["a", "b"])}
    kinds = hub.Features(image=hub.Image(), **names)

    def rows(chosen: list[Path]) -> Any:
        fine = [path.parent.name for path in chosen]
        columns = {"image": [str(path) for path in chosen], "fine": fine, "coarse": ["a"] * len(chosen)}
        return hub.Dataset.from_dict(columns, features=kinds)

    splits = {"train": paths[::2], "validation": paths[1::4], "test": paths[3::4], "extra": paths[:3]}
    hub.DatasetDict({name: rows(chosen) for name, chosen in splits.items()}).save_to_disk(tmp_path / "saved")
    line = refused("train", f"--data.root={tmp_path / 'saved'}", "--data.source=hf")
    assert f"name one of fine, coarse as in --data.root={tmp_path / 'saved'},label=fine" in line
    data = ImageFolderData(f"{tmp_path / 'saved'},label=fine", source="hf")
    assert data.class_names == [*COLOURS]
    assert "splits other than one train, val and test are left out: extra" in capsys.readouterr().out
    data.load(TransferClassifier(data.class_names, "timm/test_resnet", "random", 32).backbone, torch.device("cpu"))
    counted = {split: len(data.items_in(split)) for split in ("train", "val", "test")}
    assert counted == {"train": 30, "val": 15, "test": 15}
    assert {item.digest for item in data.items} == {hashlib.sha256(path.read_bytes()).digest() for path in paths}


@pytest.mark.parametrize("root", ["no/such", "no.parquet"])
def test_what_hugging_face_does_not_have_is_one_line(root, refused):
    assert f"--data.root={root}: Hugging Face's datasets cannot load it" in refused(
        "train", f"--data.root={root}", "--data.source=hf"
    )


@pytest.mark.fault("group pattern that matches no path")
def test_groups_by_a_pattern_on_the_path(tmp_path, refused):
    root = draw(tmp_path / "frames", images=30)
    for path in root.glob("*/*.png"):
        number = int(path.stem)
        path.rename(path.with_name(f"{path.parent.name}{number // 3}_{number:03}.png"))
    data = ImageFolderData(str(root), group=r"(\w+\d+)_")
    data.load(TransferClassifier(data.class_names, "timm/test_resnet", "random", 32).backbone, torch.device("cpu"))
    places: dict[str, set[str]] = {}
    for item in data.items:
        places.setdefault(item.path.rsplit("_", 1)[0], set()).add(str(item.split))
    assert len(places) == 30
    assert all(len(found) == 1 for found in places.values())
    assert "matches no path, such as blue/" in refused("train", f"--data.root={root}", "--data.group=(x)")
    assert "put what names the group in brackets" in refused("train", f"--data.root={root}", "--data.group=x")
    assert "is not a valid regular expression" in refused("train", f"--data.root={root}", "--data.group=(")


# A red square of 16 pixels, compressed.
HEIC = (
    "c-muNV30{GsVvAy%}izhg51nBLl8SRGck>Ufw3kxwIq=N0u(b+a*CjAhJwuG5(YG&l$nzcHpIn&fe{FSfN=qY1_Cu8R?f`KO9S&jqM|@fDif5KQI"
    ">27V)7MamgK^f{K+gRDge@VG7FOPfpjTQnKL6ZNN56Bk=zG{KYxGxU|`^9P5|nVaA4$N{Qn=MfElEM8HD6^F*zgxB{iKG8PQ}GC^WK8d$n%Xvj>U`"
    "4m2<@@HBvgTatjP*<2V879Z>c+98~rpHq~VoKpc5<z-+4Dq#@GEG|feddvZeHIj1@K@Jmux*bga|Ns92kY<9>An}6CicFA3W)2PxASIDmkP8cAV6d"
    "?^GBLBZ0NHxEDT$ykR?=Wx&mtu3^WewJLmBpGUjEVxy^*i}cD43n&-vvWB_^%>zW@LvcwiL"
)


@pytest.mark.fault("HEIC without the extra `heif`")
def test_heic_is_read_with_its_extra_and_named_without(colours, monkeypatch, capsys):
    pytest.importorskip("pi_heif")
    (colours / "red/photo.heic").write_bytes(zlib.decompress(base64.b85decode(HEIC)))
    model = TransferClassifier([*COLOURS], "timm/test_resnet", "random", 32)
    data = ImageFolderData(str(colours))
    data.load(model.backbone, torch.device("cpu"))
    photo = next(item for item in data.items if item.path == "red/photo.heic")
    assert np.abs(np.array(data.store.read(photo)).mean(axis=(0, 1)) - COLOURS["red"]).max() < 10
    key = next(own for own in data.store.cache_dir.glob("features/*/key.json")).read_text()
    assert decoding.heif_version() in key
    monkeypatch.setattr(folders, "heif_version", lambda: None)
    monkeypatch.setattr(folders, "image_suffixes", lambda: {".png"})
    ImageFolderData(str(colours)).source.scan(None)
    assert "left out: 1 .heic" in (out := capsys.readouterr().out)
    assert "pip install -e '.[heif]'" in out
