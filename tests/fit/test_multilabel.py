"""Several labels per image from a CSV file to every command."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

from headstart import DatasetData, FrozenBackbone, ImageFolderData, TransferClassifier
from headstart.cli import main
from headstart.data.splits import Item, assign, labels_of, limited
from support import COLOURS, RESNET18, TINY, draw, newest_run, rows_of, working_in

FIGURES = ("precision_recall", "roc", "calibration", "together", "worst_misses")


def collages(folder: Path, images: int = 48) -> Path:
    """Pictures of one or two colours side by side, with both names as labels; every sixth is black and has none."""
    squares = draw(folder / "squares", images=images)
    names, rows = sorted(COLOURS), []
    for number in range(images):
        pair = (names[number % 3], names[(number // 3) % 3])
        left, right = (Image.open(squares / name / f"{number:03}.png").resize((32, 64)) for name in pair)
        both = Image.new("RGB", (64, 64))
        if number % 6:
            both.paste(left, (0, 0))
            both.paste(right, (32, 0))
        both.putpixel((0, 0), (number, 0, 0))  # no two alike
        both.save(folder / f"{number}.png")
        rows.append([f"{number}.png", "|".join(sorted(set(pair))) if number % 6 else ""])
    file = folder / "collages.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["path", "label"], *rows])
    return file


def table(folder: Path, *rows: tuple[str, str]) -> str:
    """A CSV file of pictures."""
    folder.mkdir(exist_ok=True)
    for name in {name for name, _ in rows}:
        Image.new("RGB", (8, 8), (hash(name) % 256, 0, 0)).save(folder / name)
    with (folder / "some.csv").open("w", newline="") as opened:
        csv.writer(opened).writerows([["path", "label"], *rows])
    return str(folder / "some.csv")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with collages, and a run on them with a report; all tests only read it."""
    folder = tmp_path_factory.mktemp("several")
    with working_in(folder):
        file = collages(folder)
        main(["train", f"--data.csv={file}", "--data.multilabel=true", *RESNET18, "--model.image_size=64"])
    return folder


@pytest.fixture
def run(trained, monkeypatch) -> Path:
    monkeypatch.setenv("HEADSTART_CACHE", str(trained / "cache"))
    return newest_run(trained / "logs")


def test_a_run_learns_labels_that_come_together(run):
    result = json.loads((run / "result.json").read_text())
    assert result["test/map"] > 0.8
    assert {"test/f1", "test/f1_micro", "test/exact_match", "test/hamming_loss", "test/auroc"} < set(result)
    assert "test/acc" not in result
    assert set(result["labels"]) == set(COLOURS)
    made = torch.load(run / "checkpoints/best.ckpt", weights_only=True)["headstart"]
    assert made["thresholds"].shape == (3,)
    assert result["labels"]["red"]["threshold"] == pytest.approx(float(made["thresholds"][2]))


def test_figures_are_in_tensorboard_and_in_the_report(run):
    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    shown = {name.removeprefix("test/") for name in events.Tags()["images"]}
    assert set(FIGURES[:4]) <= shown
    assert "confusion_matrix" not in shown
    assert "val/map" in events.Tags()["scalars"]
    page = (run / "report.html").read_text()
    assert "Mean average precision" in page
    assert "The worst misses" in page
    assert "Images with both labels" in page
    assert "taken for" not in page


@pytest.mark.wing("deploy")
def test_evaluate_and_predict_agree(run, trained, capsys):
    scores = main(["evaluate", f"--ckpt_path={run}/checkpoints/best.ckpt", "--report=false", "--logs=logs"])
    found = json.loads((run / "result.json").read_text())
    assert {name: scores[name] for name in ("test/map", "test/f1")} == {n: found[n] for n in ("test/map", "test/f1")}
    tested = {row["path"]: row for row in rows_of(newest_run() / "predictions.csv")}
    options = [f"--ckpt_path={run}/checkpoints/best.ckpt", "--output=out.csv", "--probabilities=true"]
    main(["predict", *options, *(str(trained / path) for path in tested)])
    for row in rows_of(Path("out.csv")):
        own = tested[Path(row["path"]).name]
        assert set(row["label"].split("|")) == set(own["prediction"].split("|"))
        for name in COLOURS:
            assert float(row[name]) == pytest.approx(float(own[name]), abs=1e-4)
    main(["predict", f"--ckpt_path={run}/checkpoints/best.ckpt", "--output=out.jsonl", str(trained / "1.png")])
    line = json.loads(Path("out.jsonl").read_text())
    assert set(line["top"]) == set(COLOURS)
    module = TransferClassifier.load_from_checkpoint(run / "checkpoints/best.ckpt")
    for name, threshold in zip(sorted(COLOURS), module.task.thresholds.tolist(), strict=True):
        assert (name in line["labels"]) == (line["top"][name] >= threshold)


@pytest.mark.wing("deploy")
@pytest.mark.parametrize("suffix", ["onnx", "pth", "pt2"])
def test_an_export_gives_the_same_probabilities(suffix, run, capsys):
    made = main(["export", f"--ckpt_path={run}/checkpoints/best.ckpt", f"--output=out.{suffix}"])
    assert made["difference"] < 1e-4
    if suffix == "onnx":
        import onnx

        metadata = {entry.key: json.loads(entry.value) for entry in onnx.load("out.onnx").metadata_props}
        assert metadata["class_names"] == sorted(COLOURS)
        module = TransferClassifier.load_from_checkpoint(run / "checkpoints/best.ckpt")
        assert metadata["thresholds"] == module.task.thresholds.tolist()
        both = module.predict([Image.new("RGB", (64, 64), colour) for colour in COLOURS.values()])
        assert both.shape == (3, 3)
        assert ((both > 0) & (both < 1)).all()


@pytest.mark.wing("deploy")
def test_what_needs_one_label_per_image_refuses(run, refused):
    checkpoint = f"--ckpt_path={run}/checkpoints/best.ckpt"
    for option in ("--unknown=0.1", "--coverage=0.9", "--min_probability=0.5"):
        assert "is for one label per image" in refused("predict", checkpoint, option, "x.png")
    assert "int8 is checked by accuracy" in refused("export", checkpoint, "--output=out.int8.onnx")


@pytest.mark.wing("finetune")
def test_a_search_and_fine_tuning_take_several_labels(tmp_path, capsys):
    file = collages(tmp_path, images=36)
    where = [f"--data.csv={file}", "--data.multilabel=true", *TINY, "--report=false", "--trainer.max_epochs=3"]
    found = main(["tune", *where, "--tune.lr=[0.1,0.01]", "--folds=2", "--model.class_weights=balanced"])
    assert found["settings"][0]["val/map"] >= found["settings"][-1]["val/map"]
    assert 0 < found["exact"]["val/map"] <= 1
    assert len(found["folds"]) == 2
    assert "result" in found
    (best,) = Path("logs/collages").glob("*/checkpoints/best.ckpt")
    tuned = main(["finetune", f"--ckpt_path={best}", "--unfreeze=layer4", "--report=false", "--trainer.max_epochs=1"])
    assert {"before/val/map", "val/map", "labels"} < set(tuned)
    compared = [name for name in where if not name.startswith("--model.")]
    backbones = "--backbones=timm/test_resnet@random,timm/test_vit@random"
    rows = main(["tune", *compared, "--model.image_size=32", backbones, "--tune.lr=[0.1]"])["backbones"]
    assert {"val/ranking_precision", "val/difference"} < set(rows[0])


@pytest.mark.wing("audit")
def test_check_doubts_single_labels(tmp_path, capsys):
    file = collages(tmp_path, images=96)
    rows = rows_of(file)
    wrong = (1, 2, 13, 14, 25, 26)
    for number in wrong:  # one too few, and one too many
        rows[number]["label"] = "green" if number % 2 else "blue|green|red"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["path", "label"], *(list(row.values()) for row in rows)])
    main(["check", f"--data.csv={file}", "--data.multilabel=true", *RESNET18, "--model.image_size=64"])
    found = [row for row in rows_of(newest_run() / "check.csv") if row["problem"] == "label"]
    notes = {row["path"]: row["note"] for row in reversed(found)}  # the surest of each
    hits = [number for number in wrong if f"{number}.png" in notes]
    assert len(hits) >= 4
    assert len(notes) <= 12
    assert all(notes[f"{number}.png"].startswith("looks like" if number % 2 else "looks unlike") for number in hits)


@pytest.mark.fault("several labels in one cell, several rows for one picture, or empty labels, in a CSV file")
@pytest.mark.parametrize(
    ("rows", "option", "said"),
    [
        ([("1.png", "a|b"), ("2.png", "a"), ("3.png", "")], [], "--data.multilabel=true if images may have no label"),
        ([("1.png", "a"), ("2.png", "b"), ("1.png", "b")], [], "--data.multilabel=true if it has both labels"),
        ([("1.png", "a|b"), ("2.png", "a|b")], ["--data.multilabel=false"], "1 class(es)"),
        ([("1.png", "a|"), ("2.png", "a")], [], "1 class(es)"),
    ],
)
def test_a_slip_does_not_change_the_task(rows, option, said, tmp_path, refused):
    assert said in refused("train", f"--data.csv={table(tmp_path / 'some', *rows)}", *TINY, *option)


def test_the_option_is_for_a_list_of_images(colours, refused):
    assert "--data.multilabel=true" in refused("train", f"--data.root={colours}", "--data.multilabel=true")


def test_rows_of_one_picture_are_its_labels(tmp_path):
    file = table(tmp_path / "some", ("1.png", "b"), ("1.png", "a"), ("2.png", ""), ("3.png", "b| a"))
    data = ImageFolderData(csv=file, multilabel=True)
    assert {item.path: item.labels for item in data.source.listed()} == {"1.png": (0, 1), "2.png": (), "3.png": (0, 1)}
    whole = ImageFolderData(csv=table(tmp_path / "other", ("1.png", "a|b"), ("2.png", "b")), multilabel=False)
    assert whole.class_names == ["a|b", "b"]
    assert not whole.multilabel


def items_of(*labels: tuple[int, ...]) -> list[Item]:
    return [Item(f"{n}.png", -1, bytes([n]) * 32, tags=own) for n, own in enumerate(labels)]


def test_every_label_is_in_every_split_where_it_can_be(capsys):
    items = items_of(*[(0,), (0, 1), (0, 2), ()] * 20, (3,), (0, 4), (0, 4), (0, 4))
    found = assign(items, list("abcde"), 0.2, 0.2, seed=0)
    for label in (0, 1, 2, 4):
        assert {item.split for item in found if label in item.labels} == {"train", "val", "test"}
    assert [item.split for item in found if 3 in item.labels] == ["train"]
    said = capsys.readouterr().out
    assert "class 'd' has no image in test, since it has too few" in said
    again = assign([*items, *items_of((0,))[:0]], list("abcde"), 0.2, 0.2, seed=0)
    assert again == found


def test_limits_keep_an_image_while_one_of_its_labels_has_fewer():
    items = [Item(i.path, -1, i.digest, "train", tags=i.tags) for i in items_of((0,), (0,), (0, 1), (), (), (0, 1))]
    assert [item.path for item in limited(items, 1)] == ["0.png", "2.png", "3.png"]
    assert labels_of(items[:4], 2).tolist() == [[1, 0], [1, 0], [1, 1], [0, 0]]


class Several(Dataset):
    """A dataset with 0 or 1 for each of two labels."""

    def __init__(self, label=lambda number: torch.tensor([number % 2, number % 3 == 0])) -> None:
        self.label = label

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index):
        return Image.new("RGB", (32, 32), (10 * index, 5, 5)), self.label(index)


def test_a_dataset_may_give_several_labels():
    data = DatasetData(Several(), class_names=["odd", "third"], cache=False)
    assert data.multilabel
    data.load(FrozenBackbone("timm/test_resnet", "random", 32), torch.device("cpu"))
    assert {item.path.split("/")[1]: item.labels for item in data.items}["3"] == (0, 1)
    assert int(data.counts("train").sum()) == int(data.labels("train").sum())


def test_a_dataset_with_other_numbers_is_refused():
    from headstart.errors import UserError

    data = DatasetData(Several(lambda number: [number, 0]), class_names=["a", "b"], cache=False)
    with pytest.raises(UserError, match="give 0 or 1 for each of 2"):
        data.load(FrozenBackbone("timm/test_resnet", "random", 32), torch.device("cpu"))


def test_model_and_data_must_agree(tmp_path):
    from pytorch_lightning import Trainer

    from headstart.errors import UserError

    data = ImageFolderData(csv=str(collages(tmp_path, images=12)), multilabel=True)
    model = TransferClassifier(data.class_names, "timm/test_resnet", "random", 32)
    with pytest.raises(UserError, match=r"multilabel=data\.multilabel"):
        Trainer(fast_dev_run=True, logger=False).fit(model, data)
