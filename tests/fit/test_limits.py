"""Options that leave nothing to train are refused; those that leave nothing to validate or to test are said."""

import json
from pathlib import Path

import pytest

from headstart.cli import main
from support import draw, newest_run


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return draw(tmp_path / "own", images=10)


@pytest.mark.fault("nothing to train")
@pytest.mark.parametrize("verb", ["train", "tune"])
@pytest.mark.parametrize("option", ["max_epochs=0", "limit_train_batches=0", "max_steps=0", "max_time=00:00:00:00"])
def test_nothing_to_train_is_refused(verb, option, own, refused):
    line = refused(verb, f"--data.root={own}", "--model.image_size=32", f"--trainer.{option}")
    assert f"--trainer.{option.split('=')[0]}" in line
    assert not Path("logs").exists()


@pytest.mark.fault("nothing to train")
def test_a_share_of_the_batches_that_is_none_is_refused(own, refused):
    options = f"--data.root={own}", "--model.image_size=32", "--trainer.limit_train_batches=0.01"
    assert "is less than one of" in refused("train", *options)
    assert not Path("logs").exists()


@pytest.mark.fault("nothing to validate or to test")
@pytest.mark.parametrize("option", ["limit_val_batches=0", "check_val_every_n_epoch=5"])
def test_without_a_validation_the_last_checkpoint_is_tested(option, own, train, capsys):
    result = train(own, "--trainer.max_epochs=2", f"--trainer.{option}", "--report=true")
    assert "nothing was validated, so the last checkpoint is used" in capsys.readouterr().out
    assert "val/acc" not in result
    assert result["test/acc"] >= 0
    assert json.loads((newest_run() / "result.json").read_text()) == result


@pytest.mark.fault("nothing to validate or to test")
def test_without_a_test_the_validation_is_reported(own, train, capsys):
    result = train(own, "--trainer.max_epochs=2", "--trainer.limit_test_batches=0", "--report=true")
    assert "nothing is tested" in capsys.readouterr().out
    assert result["val/acc"] >= 0
    assert "test/acc" not in result


def listed(own: Path, split: dict[str, str]) -> Path:
    """A list of the images, each in the split that the first digit of its name says."""
    names = sorted(path.relative_to(own).as_posix() for path in own.rglob("*.png"))
    rows = [f"{name},{name.split('/')[0]},{split[name[-5]]}" for name in names]
    (own / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    return own / "list.csv"


@pytest.mark.fault("nothing to train")
@pytest.mark.parametrize("splits", [["val", "test"], ["test", "test"], ["val", "val"]])
def test_a_list_without_training_images_is_refused(own, refused, splits):
    file = listed(own, {str(digit): splits[digit % 2] for digit in range(10)})
    assert "no training image" in refused("train", f"--data.csv={file}", "--model.image_size=32")


@pytest.mark.fault("nothing to validate or to test")
def test_a_split_of_another_run_without_validation(own, train, capsys, refused):
    train(own, "--trainer.max_epochs=1")
    text = (newest_run() / "splits.csv").read_text()
    Path("all.csv").write_text(text.replace("val,", "train,").replace("test,", "train,"))
    result = train(own, "--trainer.max_epochs=1", "--data.splits=all.csv", "--report=true", "--name=all")
    assert result["images"] == {"train": 30, "val": 0, "test": 0}
    assert "nothing was validated" in capsys.readouterr().out
    options = f"--data.root={own}", "--model.image_size=32", "--data.splits=all.csv"
    assert "no validation image" in refused("tune", *options)
    Path("none.csv").write_text(text.replace("val,", "test,").replace("train,", "test,"))
    assert "no training image" in refused("train", *options[:2], "--data.splits=none.csv")


@pytest.mark.fault("nothing to validate or to test")
def test_empty_folders_of_splits(tmp_path, train, refused):
    draw(tmp_path / "data/train", images=6)
    for name in ("blue", "green", "red"):
        (tmp_path / "data/val" / name).mkdir(parents=True)
    result = train(tmp_path / "data", "--trainer.max_epochs=1")
    assert result["images"] == {"train": 18, "val": 0, "test": 0}


@pytest.mark.fault("precision that converts the weights")
@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true", "64"])
def test_a_precision_that_converts_the_backbone_is_refused(precision, own, refused):
    line = refused("train", f"--data.root={own}", "--model.image_size=32", f"--trainer.precision={precision}")
    assert f"--trainer.precision={precision}: converts the frozen backbone" in line


def test_a_run_without_a_logger_has_everything_else(own, train):
    result = train(own, "--trainer.max_epochs=1", "--trainer.logger=false", "--report=true")
    assert result["test/acc"] >= 0
    assert (newest_run() / "report.html").is_file()
    assert not list(newest_run().glob("events*"))


@pytest.mark.fault("value out of range")
@pytest.mark.parametrize("option", ["--seed_everything=-1", "--tune.lr=[]", "--tune.weight_decay=[]"])
def test_seeds_and_grids_have_a_range(option, own, refused):
    assert option.split("=")[0] in refused("tune", f"--data.root={own}", "--model.image_size=32", option)


@pytest.mark.fault("fewer images than available, because of a Trainer option")
@pytest.mark.parametrize(
    ("option", "seen"), [("limit_train_batches=0.4", 8), ("overfit_batches=2", 16), ("limit_val_batches=1.0", None)]
)
def test_the_result_says_how_many_images_an_epoch_saw(option, seen, own, train, capsys):
    result = train(own, "--trainer.max_epochs=2", "--data.batch_size=8", f"--trainer.{option}")
    assert result["images_per_epoch"] == (seen or result["images"]["train"])
    said = f"an epoch saw {seen} of {result['images']['train']} training images"
    assert (said in capsys.readouterr().out) == (seen is not None)


@pytest.mark.wing("finetune")
@pytest.mark.fault("nothing to validate or to test")
@pytest.mark.parametrize("option", ["limit_val_batches=0", "limit_test_batches=0"])
def test_finetune_without_a_validation_or_a_test(option, checkpoint):
    result = main(["finetune", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=1", f"--trainer.{option}"])
    assert "recommended" in result


@pytest.mark.wing("finetune")
@pytest.mark.fault("nothing to train")
def test_finetune_with_nothing_to_train(checkpoint, refused):
    assert "leaves nothing" in refused("finetune", f"--ckpt_path={checkpoint}", "--trainer.max_epochs=0")
