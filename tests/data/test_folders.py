"""What a folder may hold beside class folders, and what its folders may be called."""

import os
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch

from headstart import FrozenBackbone, ImageFolderData
from headstart.cli import main
from headstart.data.folders import split_named
from headstart.data.sources import open_source
from headstart.files import in_either_form
from support import COLOURS, draw, newest_run

SMALL = ("--model.image_size=32", "--report=false", "--trainer.max_epochs=1")
SMALL = ("--model.image_size=32", "--report=false", "--trainer.max_epochs=1")
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def loaded(root: Path) -> ImageFolderData:
    data = ImageFolderData(str(root))
    data.load(FrozenBackbone(weights="random", image_size=32), torch.device("cpu"))
    return data


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *[(name, "train") for name in ("train", "Training", "TRAIN", "training_set", "seg_train", "train-images")],
        *[(name, "val") for name in ("valid", "Validation", "dev", "val_set", "seg_val")],
        *[(name, "test") for name in ("Testing", "test_set", "testset", "eval", "evaluation", "seg_test")],
        *[(name, None) for name in ("train_station", "test tube", "trains", "value", "contest", "device")],
    ],
)
def test_the_usual_names_of_splits(name, split):
    assert split_named(name) == split


@pytest.mark.fault("Training/ and Testing/ as splits")
def test_the_usual_names_of_splits_are_understood(tmp_path):
    draw(tmp_path / "photos/Training", images=8)
    draw(tmp_path / "photos/Testing", images=3, seed=1)
    data = loaded(tmp_path / "photos")
    assert data.class_names == ["blue", "green", "red"]
    assert {split: len(data.items_in(split)) for split in ("train", "val", "test")}["test"] == 9
    assert all(item.path.startswith("Testing/") == (item.split == "test") for item in data.items)


@pytest.mark.fault("train/ next to other folders")
@pytest.mark.parametrize("beside", ["unlabeled", "extra/red"])
def test_a_train_folder_beside_what_is_no_split_is_refused(beside, tmp_path, refused):
    draw(tmp_path / "photos/train", images=4)
    (tmp_path / "photos" / beside).mkdir(parents=True)
    shutil.copy(tmp_path / "photos/train/red/000.png", tmp_path / "photos" / beside / "x.png")
    line = refused("train", f"--data.root={tmp_path / 'photos'}")
    assert f"--data.root={tmp_path / 'photos/train'}" in line
    assert "put its images directly into it" in line
    assert beside.split("/")[0] in line


def test_what_is_beside_clear_splits_is_said(tmp_path, capsys):
    for split in ("train", "val", "unlabeled"):
        draw(tmp_path / "photos" / split, images=3, seed=len(split))
    assert len(loaded(tmp_path / "photos").items) == 18
    assert "folders other than the splits are left out: unlabeled" in capsys.readouterr().out


@pytest.mark.fault("class folders that all hold the same folders")
@pytest.mark.parametrize("outer", [("2023", "2024"), ("test", "val")])
def test_two_readings_are_refused_with_both(outer, tmp_path, refused):
    for name in outer:
        draw(tmp_path / "photos" / name, images=3)
    line = refused("train", f"--data.root={tmp_path / 'photos'}")
    assert f"the classes are either {', '.join(outer)}, or blue, green, red" in line
    assert "--data.csv" in line
    # One folder each, as in Tiny ImageNet's n01443537/images, is no second reading.
    for name in outer:
        shutil.rmtree(tmp_path / "photos" / name / "blue")
        shutil.rmtree(tmp_path / "photos" / name / "green")
    assert ImageFolderData(str(tmp_path / "photos")).class_names == sorted(outer)


@pytest.mark.fault("class called train")
def test_a_class_may_be_called_train(tmp_path):
    draw(tmp_path / "photos", images=4, colours={"train": (1, 2, 3), "test": (90, 9, 9), "bus": (9, 90, 9)})
    (tmp_path / "photos/train/steam").mkdir()
    assert ImageFolderData(str(tmp_path / "photos")).class_names == ["bus", "test", "train"]


@pytest.mark.fault("folders made by network disks and operating systems")
def test_thumbnails_of_network_disks_are_left_out_and_said(colours, capsys):
    for name in ("@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information", ".thumbnails"):
        draw(colours / "red" / name, images=1, seed=1)
        draw(colours / name, images=1, seed=1)
    data = loaded(colours)
    assert data.class_names == list(COLOURS)
    assert len(data.items) == 60
    out = capsys.readouterr().out
    assert "2 @eaDir/" in out
    assert "2 System Volume Information/" in out


@pytest.mark.fault("folder of runs inside the data")
def test_the_folder_of_runs_is_no_class(colours, train, refused, monkeypatch, capsys):
    monkeypatch.chdir(colours)
    for _ in range(2):
        result = train(Path(), "--trainer.max_epochs=1")
        assert result["classes"] == 3
    assert "1 logs/" in capsys.readouterr().out
    # What holds an image is never left out.
    shutil.copy("red/000.png", "logs/colours/mine.png")
    assert "class 'logs'" in refused("train", "--data.root=.", *SMALL)


@pytest.mark.fault("root that is empty")
def test_an_empty_root_is_refused(refused):
    assert "--data.root is empty" in refused("train", "--data.root=")
    assert "--data.csv=" in refused("train", "--data.csv=")


@pytest.mark.fault("class names that differ only by case or Unicode form")
@pytest.mark.parametrize("source", ["folder", "csv"])
@pytest.mark.parametrize("names", [("Bee", "bee"), (COMPOSED, DECOMPOSED)])
def test_class_names_that_look_alike_are_said(names, source, tmp_path, capsys):
    draw(tmp_path / "photos", images=4, colours=dict(zip(names, COLOURS.values(), strict=False)))
    if source == "csv":
        rows = [f"{name}/00{number}.png,{name}\n" for name in names for number in range(4)]
        (tmp_path / "photos/list.csv").write_text("path,label\n" + "".join(rows))
        ImageFolderData(csv=str(tmp_path / "photos/list.csv"))
    else:
        ImageFolderData(str(tmp_path / "photos"))
    out = capsys.readouterr().out
    assert "2 classes have names that differ only in case or Unicode form" in out
    assert ("'cafe\\u0301'" in out) == ("'caf\\xe9'" in out) == (names[0] == COMPOSED)


@pytest.mark.fault("one name in two Unicode forms, in train and val")
def test_a_refusal_of_names_that_look_alike_tells_the_code_points(tmp_path, refused):
    for split, name in (("train", COMPOSED), ("val", DECOMPOSED)):
        draw(tmp_path / "photos" / split, images=2, colours={name: (1, 2, 3), "bus": (90, 9, 9)})
    line = refused("train", f"--data.root={tmp_path / 'photos'}")
    assert f"{COMPOSED} ('caf\\xe9')" in line
    assert f"{DECOMPOSED} ('cafe\\u0301')" in line


@pytest.mark.fault("path in another Unicode form")
def test_a_path_is_found_in_either_form(tmp_path, capsys, train):
    """A list that was written on a Mac, of files on Linux; and mixed forms in one path."""
    draw(tmp_path / COMPOSED, images=12)
    (tmp_path / COMPOSED / "red").rename(tmp_path / COMPOSED / DECOMPOSED)
    rows = [
        f"{COMPOSED}/{COMPOSED if name == 'red' else name}/{number:03}.png,{name}\n"
        for name in COLOURS
        for number in range(12)
    ]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(unicodedata.normalize("NFD", row) for row in rows))
    result = main(["train", f"--data.csv={tmp_path / 'list.csv'}", *SMALL])
    assert sum(result["images"].values()) == 36
    (tmp_path / COMPOSED / DECOMPOSED).rename(tmp_path / COMPOSED / "red")
    assert train(tmp_path / DECOMPOSED, "--trainer.max_epochs=1")["skipped"] == 0
    assert in_either_form(Path(os.fsdecode(b"/nowhere/caf\xe9"))) == Path(os.fsdecode(b"/nowhere/caf\xe9"))


def test_domains_share_classes_and_are_scored_apart(tmp_path, train, capsys, refused):
    """A class may be missing from a domain; the splits are those of the images, whatever their domain."""
    root = draw(tmp_path / "world/photo", images=12)
    draw(tmp_path / "world/sketch", images=12, seed=1, colours={name: COLOURS[name] for name in ("red", "blue")})
    result = train(root.parent, "--data.source=domains", "--trainer.max_epochs=2")
    parts = result["domains"]
    assert sum(part["images"] for part in parts.values()) == result["images"]["test"]
    right = sum(part["acc"] * part["images"] for part in parts.values())
    assert right / result["images"]["test"] == pytest.approx(result["test/acc"])
    assert result["test/worst_domain_acc"] == min(part["acc"] for part in parts.values())
    assert "by domain, the worst first" in capsys.readouterr().out
    best = newest_run() / "checkpoints/best.ckpt"
    assert main(["evaluate", f"--ckpt_path={best}", "--report=false"])["domains"] == parts
    again = main(["evaluate", f"--ckpt_path={best}", "--report=false", f"--data.root={root}"])
    assert "domains" not in again
    assert "2 of each are needed" in refused("train", "--data.source=domains", f"--data.root={root}")
    options = open_source(str(root.parent), None, "domains").options  # for commands that are proposed
    assert options == f"--data.root={root.parent} --data.source=domains"
    draw(tmp_path / "world/sketch", images=3, seed=2)
    assert "--data.source=domains if they are domains" in refused("train", f"--data.root={root.parent}")
