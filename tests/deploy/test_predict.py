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
from headstart.deploy.explain import explainer
from headstart.deploy.predictor import Answers, Predictor
from headstart.features import stream
from headstart.features.stream import FileStream
from headstart.model.sets import threshold
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


@pytest.mark.fault("files that predict skips")
def test_what_a_folder_leaves_out_is_said_and_what_is_named_gets_a_row(checkpoint, photos, tmp_path, capsys):
    folder = shutil.copytree(photos / "red", tmp_path / "mine")
    shutil.copy(photos / "red/000.png", folder / "no suffix")
    (folder / "photo.cr2").write_bytes(b"raw")
    draw(folder / "@eaDir", images=1)
    main(["predict", f"--ckpt_path={checkpoint}", str(folder), "--output=all.csv"])
    assert {row["path"] for row in rows_of(Path("all.csv"))} == {str(path) for path in folder.glob("*.png")}
    said = capsys.readouterr().out
    assert all(left in said for left in ("1 .cr2", "1 without a suffix", "1 @eaDir/"))
    named = [str(folder / "no suffix"), str(folder / "photo.cr2")]
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


def test_what_is_like_no_class_is_unknown(checkpoint, photos, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"noise{number}.png")
    paths = [str(photos / "red"), *(str(path) for path in sorted(tmp_path.glob("noise*.png"))), "nothing.png"]
    main(["predict", f"--ckpt_path={checkpoint}", *paths, "--unknown=0.2", "--output=p.csv"])
    rows = rows_of(Path("p.csv"))
    assert list(rows[0])[:5] == ["path", "label", "probability", "known", "label_2"]
    assert [row["label"] for row in rows[-4:]] == ["unknown"] * 3 + [""]
    images = len(TransferClassifier.load_from_checkpoint(checkpoint).known.distances)
    assert [row["known"] for row in rows[-4:]] == [f"{1 / (1 + images):.6f}"] * 3 + [""]
    assert all((row["label"] == "unknown") == (float(row["known"]) <= 0.2) for row in rows[:-1])
    assert sum(row["label"] == "red" for row in rows[:20]) > 10
    main(["predict", f"--ckpt_path={checkpoint}", *paths[:-1], "--output=all.jsonl"])
    found = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert [f"{row['known']:.6f}" for row in found] == [row["known"] for row in rows[:-1]]
    assert "unknown" not in {row["label"] for row in found}
    assert "set" not in found[0]


def test_sets_and_the_least_probability(checkpoint, photos):
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    coverage, highest = 0.5, 0.0
    least = threshold(module.task.true_probabilities, coverage)
    options = ["predict", f"--ckpt_path={checkpoint}", str(photos), f"--coverage={coverage}"]
    main([*options, "--output=p.jsonl"])
    rows = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    for row in rows:
        highest = max(highest, row["probability"])
        assert row["set"] == [name for name, share in row["top"].items() if share >= least or name == row["label"]]
    main([*options, "--top_k=1", f"--min_probability={highest}", "--output=p.csv"])
    written = rows_of(Path("p.csv"))
    assert list(written[0]) == ["path", "label", "probability", "known", "set", "error"]
    assert [row["set"] for row in written] == ["|".join(row["set"]) for row in rows]
    assert [row["label"] for row in written] == [
        row["label"] if row["probability"] >= highest else "unknown" for row in rows
    ]


@pytest.mark.fault("too few validation images for `--unknown` or `--coverage`")
def test_a_promise_that_the_head_cannot_keep_is_refused(checkpoint, photos, refused):
    last, image = checkpoint.with_name("last.ckpt"), str(photos / "red/000.png")
    images = len(TransferClassifier.load_from_checkpoint(checkpoint).known.distances)
    for option in ("--unknown=0.001", "--coverage=0.999"):
        line = refused("predict", f"--ckpt_path={checkpoint}", image, option)
        assert line == f"error: {option}: needs 999 validation images, but the head has {images}"
    assert "the head has none; take best.ckpt" in refused("predict", f"--ckpt_path={last}", image, "--unknown=0.5")
    main(["predict", f"--ckpt_path={last}", image, "--output=p.csv"])
    assert rows_of(Path("p.csv"))[0]["known"] == ""


def test_a_class_named_unknown_is_not_taken_for_a_refusal():
    module = TransferClassifier(["a", "unknown"], "timm/test_resnet", "random", image_size=32)
    answers = Answers(module, min_probability=0.7)
    assert [answers.label(("unknown", share), None) for share in (0.8, 0.6)] == ["unknown", "(unknown)"]


def test_what_cannot_be_done_is_refused(checkpoint, photos, refused):
    image = str(photos / "red/000.png")
    Path("there.csv").write_text("mine")
    assert "already exists" in refused("predict", f"--ckpt_path={checkpoint}", image, "--output=there.csv")
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
    predictor = Predictor(module, FileStream(module.backbone, torch.device("cpu"), "fp32"))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "swin_t", "timm/test_resnet", "timm/mixer_s32_224"])
def test_maps_are_exact_where_features_are_a_mean_over_places(name, dtype):
    module = TransferClassifier(list("abc"), backbone=name, weights="random", image_size=64)
    backbone = module.backbone.for_extraction(dtype, torch.device("cpu"))
    explain = explainer(module, backbone)
    assert explain.method == "exact class activation"
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        logits = module.head(backbone(images))
    for label in range(3):
        means = explain(torch.full((3,), label)).mean(dim=(1, 2)) + module.head.bias[label].detach()
        assert torch.allclose(means, logits[:, label], atol=1e-5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize(
    ("name", "head", "side", "grid"),
    [
        ("timm/test_vit", "linear", 64, 4),  # read at its class token
        ("timm/test_vit2", "linear", 64, 4),  # read at the mean of its tokens, and normalised
        ("timm/test_vit", "mlp", 96, 6),
        ("timm/test_convnext", "linear", 128, 4),  # normalised after pooling
        ("resnet18", "cosine", 128, 4),
    ],
)
def test_other_maps_are_those_of_gradients(name, head, side, grid):
    """A head that tells images with a red quadrant from plain ones looks at that quadrant."""
    module = TransferClassifier(["red", "plain"], backbone=name, weights="random", image_size=side, head=head).eval()
    backbone, half = module.backbone.for_extraction(torch.float32, torch.device("cpu")), side // 2
    images = torch.full((5, 3, 2, half, 2, half), 128, dtype=torch.uint8)
    for number in range(4):
        images[number, :, number // 2, :, number % 2] = torch.tensor([250, 20, 20]).view(3, 1, 1)
    images = images.reshape(5, 3, side, side)
    with torch.no_grad():
        features = backbone(images)
        if head == "linear":
            module.head.weight[0] = features[:4].mean(dim=0) - features[4]
    explain = explainer(module, backbone)
    backbone(images)
    assert explain.method == "gradient x activation"
    maps = explain(torch.zeros(4, dtype=torch.long))
    assert maps.shape == (4, grid, grid)
    assert not torch.allclose(maps, explain(torch.ones(4, dtype=torch.long)))
    if head == "linear":
        evidence = maps.clamp(min=0).view(4, 2, grid // 2, 2, grid // 2).sum(dim=(2, 4)).flatten(1)
        assert evidence.argmax(dim=1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("backbone", "method"), [("resnet18", "exact class activation"), ("timm/test_vit", "gradient x activation")]
)
def test_explained_files_get_a_picture(backbone, method, colours, train, capsys):
    options = [f"--model.backbone={backbone}", "--model.weights=random", "--model.image_size=64"]
    train(colours, *options, "--trainer.max_epochs=1")
    checkpoint = newest_run() / "checkpoints/last.ckpt"
    capsys.readouterr()
    main(["predict", f"--ckpt_path={checkpoint}", str(colours / "red"), "--explain=maps", "--output=p.csv"])
    assert f"maps ({method})" in capsys.readouterr().out
    pictures = list(Path("maps").glob(f"*-{method.replace(' ', '_')}.png"))
    assert len(pictures) == len(list((colours / "red").iterdir()))
    with Image.open(pictures[0]) as image:
        assert image.size == (64, 64)
        assert np.asarray(image).std() > 1


def test_maps_that_cannot_be_drawn_are_refused(colours, train, refused, monkeypatch):
    image = str(colours / "red/000.png")
    train(colours, "--trainer.max_epochs=1", "--model.layers=all")
    options = "predict", f"--ckpt_path={newest_run() / 'checkpoints/last.ckpt'}", image, "--explain=maps"
    assert "train with --model.layers=last" in refused(*options)
    train(colours, "--trainer.max_epochs=1", "--model.backbone=timm/test_vit", "--model.weights=random", "--name=vit")
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    (run,) = Path("logs/vit").iterdir()
    line = refused("predict", f"--ckpt_path={run / 'checkpoints/last.ckpt'}", image, "--explain=maps")
    assert "pip install -e '.[explain]'" in line
