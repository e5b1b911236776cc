import csv
import errno
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from headstart import TransferClassifier, files
from headstart.cli import main
from headstart.deploy.explain import ClassActivation
from headstart.features import stream
from headstart.features.stream import FileStream
from headstart.verbs.predict import Predictor
from support import COLOURS, draw, newest_run, rows_of


@pytest.fixture
def mixed(tmp_path) -> Path:
    folder = draw(tmp_path / "mixed", images=24)
    draw(folder, images=8, seed=1, colours={"red": COLOURS["green"]})
    return folder


@pytest.fixture
def photos(trained) -> Path:
    """What the checkpoint was trained on."""
    return trained / "colours"


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_test_files_give_the_runs_accuracy(mixed, train, precision, monkeypatch, capsys):
    result = train(mixed, "--trainer.max_epochs=3", f"--data.feature_precision={precision}")
    run = newest_run()
    with (run / "splits.csv").open(newline="") as file:
        tested = [row for row in csv.DictReader(file) if row["split"] == "test"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(str(mixed / row["path"]) for row in tested)))
    checkpoint = run / "checkpoints/best.ckpt"
    counts = main(["predict", f"--ckpt_path={checkpoint}", "--output=p.csv", f"--feature_precision={precision}"])
    assert counts == {"predicted": len(tested), "errors": 0}
    found = rows_of(Path("p.csv"))
    assert [row["path"] for row in found] == [str(mixed / row["path"]) for row in tested]
    right = [row["label"] == truth["class"] for row, truth in zip(found, tested, strict=True)]
    assert 0 < sum(right) < len(right)
    assert sum(right) / len(right) == pytest.approx(result["test/acc"], abs=1e-7)


def test_damaged_files_are_rows_with_their_error(checkpoint, photos, tmp_path):
    good = (photos / "red/000.png").read_bytes()
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    for number in range(40):
        (folder / "deep" / f"{number:02}.png").write_bytes(good)
    damaged = {"a.png": b"", "b.jpg": b"<html>", "c.png": good[:200], "d.png": good[:60] + b"\xff" * 30 + good[90:]}
    for name, content in damaged.items():
        (folder / name).write_bytes(content)
    Image.new("RGB", (4, 4)).save(folder / "e.png")
    counts = main(["predict", f"--ckpt_path={checkpoint}", str(folder), "--output=p.jsonl", "--top_k=2"])
    assert counts == {"predicted": 40, "errors": 5}
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    errors = {Path(row["path"]).name: row["error"] for row in rows if "error" in row}
    assert set(errors) == {*damaged, "e.png"}
    assert errors["a.png"] == "empty file"
    assert errors["b.jpg"] == "not an image"
    assert "smaller than" in errors["e.png"]
    first = next(row for row in rows if "label" in row)
    assert next(iter(first["top"])) == first["label"]
    assert len(first["top"]) == 2


@pytest.mark.fault("files that predict leaves out")
def test_what_a_folder_leaves_out_is_said_and_what_is_named_gets_a_row(checkpoint, photos, tmp_path, capsys):
    folder = shutil.copytree(photos / "red", tmp_path / "mine")
    shutil.copy(photos / "red/000.png", folder / "no suffix")
    (folder / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    draw(folder / "@eaDir", images=1)
    main(["predict", f"--ckpt_path={checkpoint}", str(folder), "--output=all.csv"])
    assert {row["path"] for row in rows_of(Path("all.csv"))} == {str(path) for path in folder.glob("*.png")}
    said = capsys.readouterr().out
    assert all(left in said for left in ("1 .heic", "1 without a suffix", "1 @eaDir/"))
    named = [str(folder / "no suffix"), str(folder / "photo.heic")]
    assert main(["predict", f"--ckpt_path={checkpoint}", *named, "--output=named.csv"]) == {"predicted": 1, "errors": 1}
    assert [(row["label"], row["error"]) for row in rows_of(Path("named.csv"))] == [("red", ""), ("", "not an image")]


@pytest.mark.fault("network disk or memory that fails for a while")
def test_a_disk_that_fails_is_a_row_with_its_error(checkpoint, photos, monkeypatch):
    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files, "PAUSES", (0, 0))
    works = stream.read_regular
    monkeypatch.setattr(stream, "read_regular", lambda path: fails(path) if path.stem == "001" else works(path))
    counts = main(["predict", f"--ckpt_path={checkpoint}", str(photos / "red"), "--output=rows.csv"])
    assert counts == {"predicted": 19, "errors": 1}
    assert "Input/output error" in rows_of(Path("rows.csv"))[1]["error"]


def test_rows_go_to_the_standard_output_and_nothing_else_does(checkpoint, photos, capsys):
    main(["predict", f"--ckpt_path={checkpoint}", str(photos / "red/000.png"), "nothing.png"])
    out, err = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["path"] for row in rows] == [str(photos / "red/000.png"), "nothing.png"]
    assert rows[1]["error"] == "no such file or directory"
    shares = [float(rows[0][name]) for name in ("probability", "probability_2", "probability_3")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert shares == sorted(shares, reverse=True)
    assert "1 files, and 1 that could not be read" in err


def test_what_cannot_be_done_is_refused(checkpoint, photos, refused):
    image = str(photos / "red/000.png")
    Path("there.csv").write_text("mine")
    assert "is there already" in refused("predict", f"--ckpt_path={checkpoint}", image, "--output=there.csv")
    assert Path("there.csv").read_text() == "mine"
    assert "name it" in refused("predict", f"--ckpt_path={checkpoint}", image, "--output=p.xls")
    Path("maps").mkdir()
    Path("maps/mine").touch()
    assert "not empty" in refused("predict", f"--ckpt_path={checkpoint}", image, "--explain=maps")
    Path("empty").mkdir()
    assert "no images" in refused("predict", f"--ckpt_path={checkpoint}", "empty")
    assert "none of the 1 files" in refused("predict", f"--ckpt_path={checkpoint}", "x.png", "--output=p.csv")


def test_the_input_is_read_as_it_is_needed(checkpoint, photos):
    """100,000 files need no more memory than 100: paths are taken a batch at a time."""
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    predictor = Predictor(module, FileStream(module.backbone, torch.device("cpu")))
    taken = 0

    def paths():
        nonlocal taken
        while True:
            taken += 1
            yield str(photos / "red/000.png")

    predictions = predictor(paths())
    for number in range(100):
        next(predictions)
        assert taken <= number + 1 + 2 * 32


def test_maps_are_exact(checkpoint, photos):
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    backbone = module.backbone.for_extraction(torch.float32, torch.device("cpu"))
    activation = ClassActivation(backbone, module.head.weight.detach())
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        logits = module.head(backbone(images))
    for label in range(3):
        maps = activation(torch.full((3,), label))
        torch.testing.assert_close(maps.mean(dim=(1, 2)) + module.head.bias[label].detach(), logits[:, label])


def test_explained_files_get_a_picture(checkpoint, photos):
    main(["predict", f"--ckpt_path={checkpoint}", str(photos / "red"), "--explain=maps", "--output=p.csv"])
    assert len(list(Path("maps").glob("*.png"))) == len(list((photos / "red").iterdir()))
    with Image.open(min(Path("maps").iterdir())) as image:
        assert image.size == (32, 32)
        assert np.asarray(image).std() > 1


def test_a_backbone_without_places_has_no_maps(colours, train, refused):
    train(
        colours, "--trainer.max_epochs=1", "--model.backbone=alexnet", "--model.weights=random", "--model.image_size=64"
    )
    checkpoint = newest_run() / "checkpoints/last.ckpt"
    image = str(colours / "red/000.png")
    assert "not a spatial mean" in refused("predict", f"--ckpt_path={checkpoint}", image, "--explain=maps")
