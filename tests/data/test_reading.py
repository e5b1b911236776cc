"""What lies in folders: names in two forms, splits that look like classes, folders of systems, files of other kinds."""

import errno
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headstart import DatasetData, ImageFolderData, TransferClassifier
from headstart.cli import main
from headstart.data.folders import of_splits
from headstart.images import Preprocessing, UnreadableImage, Views, decode, to_rgb
from support import at_most, draw, newest_run, rows_of

COMPOSED, SPLIT = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def counts(root: Path, **options: object) -> dict[str, int]:
    data = ImageFolderData(str(root), **options)
    data.load(TransferClassifier(data.class_names, image_size=32).backbone, torch.device("cpu"))
    return {name: sum(item.label == label for item in data.items) for label, name in enumerate(data.class_names)}


@pytest.mark.fault("splits by other names, such as Training and Testing")
@pytest.mark.parametrize(
    ("train", "other", "split"),
    [("Training", "Testing", "test"), ("training_set", "test_set", "test"), ("seg_train", "dev", "val")],
)
def test_usual_names_of_splits_are_known(tmp_path, train, other, split):
    draw(tmp_path / "data" / train, images=6)
    draw(tmp_path / "data" / other, images=3, seed=1)
    assert set(counts(tmp_path / "data")) == {"blue", "green", "red"}
    assert of_splits(tmp_path / "data")[tmp_path / "data" / other] == split


@pytest.mark.fault("splits by other names, such as Training and Testing")
@pytest.mark.parametrize("names", [("round1", "round2"), ("train", "extra"), ("Training", "more", "most")])
def test_splits_by_unknown_names_are_no_classes(tmp_path, refused, names):
    for seed, name in enumerate(names):
        draw(tmp_path / "data" / name, images=2, seed=seed)
    line = refused("train", f"--data.root={tmp_path / 'data'}")
    assert "blue, green, red" in line or f"--data.root={tmp_path / 'data' / names[0]}" in line  # the other reading
    assert names[-1] in line


def test_a_class_may_be_called_train(tmp_path):
    draw(tmp_path / "data", images=4, colours={"train": (0, 0, 200), "ship": (200, 0, 0), "test": (0, 200, 0)})
    assert counts(tmp_path / "data") == {"ship": 4, "test": 4, "train": 4}


@pytest.mark.fault("folders of tools, such as .ipynb_checkpoints")
@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information"])
def test_folders_of_systems_are_left_out(tmp_path, capsys, name):
    root = draw(tmp_path / "data", images=4)
    shutil.copytree(root / "red", root / "red" / name)
    shutil.copytree(root / "red", root / name)
    assert counts(root) == {"blue": 4, "green": 4, "red": 4}
    assert f"2 {name}/" in capsys.readouterr().out


@pytest.mark.fault("run started inside the data")
def test_the_runs_own_folder_is_no_class(tmp_path, train, monkeypatch):
    monkeypatch.chdir(draw(tmp_path / "data", images=8))
    for _ in range(2):
        train(Path(), "--trainer.max_epochs=1")
    assert {row["class"] for row in rows_of(newest_run() / "splits.csv")} == {"blue", "green", "red"}


@pytest.mark.fault("root that is missing")
def test_an_empty_root_is_refused(refused):
    assert "--data.root is empty" in refused("train", "--data.root=")


@pytest.mark.fault("names that differ by case or Unicode form alone")
def test_names_that_look_the_same_are_said(tmp_path, capsys):
    root = draw(tmp_path / "data", images=4, colours={COMPOSED: (0, 0, 200), "tea": (200, 0, 0)})
    draw(root, images=4, seed=1, colours={SPLIT: (0, 0, 200), "Tea": (200, 0, 0)})
    assert len(counts(root)) == 4
    said = capsys.readouterr().out
    assert "4 classes have names that differ by case or Unicode form alone" in said
    assert all(shown in said for shown in (r"('cafe\u0301')", r"('caf\xe9')", "Tea, tea"))


@pytest.mark.fault("names that differ by case or Unicode form alone")
def test_a_listed_path_is_found_in_either_form(tmp_path, refused):
    root = draw(tmp_path / "data", images=4, colours={SPLIT: (0, 0, 200), "tea": (200, 0, 0)})
    rows = [f"{COMPOSED}/{n:03}.png,coffee" for n in range(4)] + [f"tea/{n:03}.png,tea" for n in range(4)]
    (root / "list.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    data = ImageFolderData(csv=str(root / "list.csv"))
    data.load(TransferClassifier(data.class_names, image_size=32).backbone, torch.device("cpu"))
    assert len(data.items) == 8
    both = tmp_path / "both"
    draw(both / "train", images=4, colours={COMPOSED: (0, 0, 200), "tea": (200, 0, 0)})
    draw(both / "val", images=4, seed=1, colours={SPLIT: (0, 0, 200), "tea": (200, 0, 0)})
    assert all(shown in refused("train", f"--data.root={both}") for shown in (r"'cafe\u0301'", r"'caf\xe9'"))
    assert "hold different classes" in refused("train", f"--data.root={both}")


@pytest.mark.wing("deploy")
@pytest.mark.fault("file without an image's suffix, for predict")
def test_predict_says_what_it_leaves_out_of_a_folder(checkpoint, tmp_path, capsys):
    folder = draw(tmp_path / "files", images=1)
    shutil.copy(folder / "red/000.png", folder / "noname")
    (folder / "x.heic").write_bytes(b"heic")
    main(["predict", f"--ckpt_path={checkpoint}", str(folder), "--output=rows.csv"])
    said = capsys.readouterr().out
    assert "left out" in said
    assert "1 .heic" in said
    assert "1 without a suffix" in said
    main(["predict", f"--ckpt_path={checkpoint}", str(folder / "noname"), str(folder / "x.heic"), "--output=two.csv"])
    named, heic = rows_of(Path("two.csv"))
    assert named["label"] == "red"
    assert heic["error"] == "not an image"


@pytest.mark.fault("floating-point image")
def test_floats_are_scaled_or_left_out(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(ramp).save(tmp_path / "ramp.tif")
    pixels = np.asarray(decode((tmp_path / "ramp.tif").read_bytes(), Preprocessing(32, 32)))
    assert np.abs(pixels[..., 0] / 255 - ramp).max() < 0.5 / 255 + 1e-6
    for number, wrong in enumerate((np.nan, np.inf, -0.1, 2.0)):
        spoilt = ramp.copy()
        spoilt[3, 3] = wrong
        Image.fromarray(spoilt).save(tmp_path / f"{number}.tif")
        with pytest.raises(UnreadableImage, match="floating-point values"):
            decode((tmp_path / f"{number}.tif").read_bytes(), Preprocessing(32, 32))


def test_an_image_of_a_dataset_that_cannot_be_used_is_left_out(capsys):
    class Floats(torch.utils.data.Dataset):
        classes = ("a", "b")

        def __len__(self) -> int:
            return 12

        def __getitem__(self, index: int):
            value = 7.0 if index == 5 else index / 12
            return Image.fromarray(np.full((32, 32), value, dtype=np.float32)), index % 2

    data = DatasetData(Floats())
    data.load(TransferClassifier(["a", "b"], image_size=32).backbone, torch.device("cpu"))
    assert len(data.items) == 11
    assert "train/5: floating-point values" in capsys.readouterr().out


@pytest.mark.fault("network disk that fails for a moment")
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_passing_failure_is_tried_again_and_never_kept(code, tmp_path, train, refused, monkeypatch):
    root = draw(tmp_path / "data", images=8)
    read, times = Path.read_bytes, {"left": 2}

    def fail(self: Path) -> bytes:
        if self.name == "003.png" and self.parent.name == "red" and times["left"]:
            times["left"] -= 1
            raise OSError(code, os.strerror(code))
        return read(self)

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(Path, "read_bytes", fail)
    with at_most(60):
        assert train(root, "--trainer.max_epochs=1")["skipped"] == 0
        times["left"] = 10**9
        (root / "red/003.png").touch()
        os.utime(root / "red/003.png", ns=(1, 1))
        shutil.copy(root / "blue/001.png", root / "red/new.png")
        assert "red/003.png: cannot be read now" in refused("train", f"--data.root={root}", "--model.image_size=32")
        times["left"] = 0
        assert train(root, "--trainer.max_epochs=1")["skipped"] == 0


@pytest.mark.fault("network disk that fails for a moment")
def test_too_little_memory_says_nothing_of_the_image(tmp_path, train, refused, monkeypatch):
    root = draw(tmp_path / "data", images=8)

    def fail(*_: object) -> Image.Image:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("time.sleep", lambda _: None)
        patched.setattr("headstart.images.to_rgb", fail)
        assert "out of memory" in refused("train", f"--data.root={root}", "--model.image_size=32")
    assert train(root, "--trainer.max_epochs=1")["skipped"] == 0


@pytest.mark.fault("left and right that differ")
def test_without_flip_no_view_is_mirrored():
    arrow = np.zeros((64, 64, 3), dtype=np.uint8)
    arrow[:, 40:] = 255  # bright on the right
    image = to_rgb(Image.fromarray(arrow), Preprocessing())

    def mirrored(flip: bool) -> int:
        views = Views("light", flip=flip)
        seen = [views.view(image, b"x", number, Preprocessing(64, 64)).float() for number in range(1, 33)]
        return sum(bool(view[..., :16].mean() > view[..., -16:].mean()) for view in seen)

    assert mirrored(False) == 0
    assert 8 <= mirrored(True) <= 24
