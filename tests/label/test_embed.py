import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from headstart import ImageFolderData, TransferClassifier
from headstart.cli import main
from support import rows_of


@pytest.fixture
def photos(trained) -> Path:
    """What the checkpoint was trained on."""
    return trained / "colours"


def test_the_files_hold_the_cached_features(checkpoint, photos, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    model = TransferClassifier.load_from_checkpoint(checkpoint)
    data = ImageFolderData(str(photos))
    wanted = {}
    for split in ("train", "val", "test"):
        features, labels, paths = data.numpy(split, model)
        assert features.shape == (len(labels), model.backbone.num_features)
        assert [data.class_names[label] for label in labels] == [path.split("/")[0] for path in paths]
        wanted |= {str(photos / path): row for path, row in zip(paths, features, strict=True)}
    single, options = str(photos / "red/000.png"), f"--ckpt_path={checkpoint}"
    assert main(["embed", str(photos), options, "--output=all.parquet"]) == {
        "images": 60,
        "width": model.backbone.num_features,
        "skipped": 0,
    }
    table = parquet.read_table("all.parquet").to_pydict()
    assert table["path"] == sorted(wanted)
    for path, row in zip(table["path"], table["features"], strict=True):
        assert np.array_equal(np.float32(row), wanted[path])
    main(["embed", single, str(photos / "blue"), options, "--output=some.npy"])
    paths = [row["path"] for row in rows_of(Path("some.csv"))]
    assert paths == [single, *(path for path in table["path"] if "/blue/" in path)]
    assert np.array_equal(np.load("some.npy"), np.stack([wanted[path] for path in paths]))
    main(["embed", str(photos), options, "--output=all.safetensors"])
    assert np.array_equal(load_file("all.safetensors")["features"], np.float32(table["features"]))
    assert [row["path"] for row in rows_of(Path("all.csv"))] == table["path"]


def test_files_that_cannot_be_read_are_left_out_by_name(checkpoint, photos, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    options = f"--ckpt_path={checkpoint}", "--output=some.npy"
    assert main(["embed", str(photos / "red"), "bad.png", "missing.png", *options])["skipped"] == 2
    said = capsys.readouterr().out
    assert "bad.png is left out: not an image" in said
    assert "missing.png is left out: missing" in said
    assert len(rows_of(Path("some.csv"))) == len(np.load("some.npy")) == 20


def test_nothing_is_overwritten_and_no_file_begun_in_vain(checkpoint, photos, refused, monkeypatch):
    command = "embed", str(photos / "red"), f"--ckpt_path={checkpoint}"
    assert "--output is missing" in refused(*command)
    assert "name it *.parquet" in refused(*command, "--output=features.txt")
    Path("features.csv").write_text("mine")
    assert "features.csv: already exists" in refused(*command, "--output=features.npy")
    assert Path("features.csv").read_text() == "mine"
    assert not Path("features.npy").exists()
    assert "leave out --model" in refused(*command, "--output=f.npy", "--model.image_size=64")
    assert "contains no images" in refused("embed", str(Path.cwd() / "logs"), *command[2:], "--output=f.npy")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install -e '.[parquet]'" in refused(*command, "--output=features.parquet")


def test_similar_finds_the_colour_and_not_the_picture_itself(checkpoint, photos):
    pictures = [str(photos / "red/000.png"), str(photos / "blue/003.png")]
    rows = main(["similar", *pictures, f"--in={photos}", f"--ckpt_path={checkpoint}", "--k=7"])
    assert [row["rank"] for row in rows] == [*range(1, 8), *range(1, 8)]
    for picture in pictures:
        found = [row for row in rows if row["picture"] == picture]
        assert {Path(row["path"]).parent for row in found} == {Path(picture).parent}
        assert picture not in {row["path"] for row in found}
        assert [row["similarity"] for row in found] == sorted((row["similarity"] for row in found), reverse=True)
    (folder,) = Path("logs/colours-similar").iterdir()
    with (folder / "similar.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [row["path"] for row in rows]
    page = (folder / "similar.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 2 + 14
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_what_similar_cannot_do_is_refused(checkpoint, photos, refused):
    options = f"--ckpt_path={checkpoint}", f"--in={photos}"
    assert "no PICTURE" in refused("similar", *options)
    assert "--in is missing" in refused("similar", "a.png", options[0])
    assert "--in=nothing: no such folder" in refused("similar", "a.png", options[0], "--in=nothing")
    assert "a.png: no such file" in refused("similar", "a.png", *options)
