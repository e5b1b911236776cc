import json

import pytest

from headstart.cli import main
from support import COLOURS, draw, newest_run


def test_the_own_test_split_gives_the_runs_own_scores(checkpoint, tmp_path):
    trained = json.loads((checkpoint.parent.parent / "result.json").read_text())
    result = main(["evaluate", f"--ckpt_path={checkpoint}"])
    assert result["test/loss_scaled"] > 0
    assert {name: result[name] for name in result if name.startswith("test/") and name != "test/loss_scaled"} == {
        name: trained[name] for name in trained if name.startswith("test/")
    }
    folder = newest_run()
    assert folder.parent.name == "colours-evaluate"
    assert json.loads((folder / "result.json").read_text()) == result
    assert (folder / "report.html").is_file()
    rows = (folder / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + trained["images"]["test"]


def test_another_folder_is_evaluated_whole(checkpoint, tmp_path):
    other = draw(tmp_path / "other", images=5, seed=3)
    result = main(["evaluate", f"--ckpt_path={checkpoint}", f"--data.root={other}", "--report=false"])
    assert result["images"] == {"train": 0, "val": 0, "test": 15}
    assert result["test/acc"] == 1.0
    assert not (newest_run() / "report.html").exists()


def test_unknown_images_are_told_from_the_own(checkpoint, tmp_path, capsys, refused):
    pink = draw(tmp_path / "pink", images=8, colours={"pink": (250, 150, 200)})
    options = "evaluate", f"--ckpt_path={checkpoint}", "--report=false", f"--unknown.root={pink}"
    result = main(list(options))
    assert result["unknown/images"] == 8
    assert result["unknown/auroc"] == 1.0
    assert result["unknown/fpr95"] == 0.0
    said = capsys.readouterr().out
    assert "unknown:  AUROC 1.000, false positives at 95 % 0.000" in said
    assert "how sure is sure enough" in said
    assert f"--unknown.root={tmp_path}/none: no such folder" in refused(*options, f"--unknown.root={tmp_path}/none")
    checkpoint.unlink()
    last = checkpoint.with_name("last.ckpt")
    assert "use best.ckpt" in refused("evaluate", f"--ckpt_path={last}", f"--unknown.root={pink}")


def test_other_classes_are_refused_with_the_difference(checkpoint, tmp_path, refused):
    other = draw(tmp_path / "other", images=5, colours={"red": COLOURS["red"], "pink": COLOURS["blue"]})
    line = refused("evaluate", f"--ckpt_path={checkpoint}", f"--data.root={other}")
    assert "missing: blue, green" in line
    assert "unknown to the head: pink" in line


def test_a_lone_checkpoint_asks_for_a_folder(checkpoint, tmp_path, refused):
    lone = tmp_path / "lone" / "head.ckpt"
    lone.parent.mkdir()
    lone.write_bytes(checkpoint.read_bytes())
    assert "--data.root is missing" in refused("evaluate", f"--ckpt_path={lone}")
    assert "--ckpt_path is missing" in refused("evaluate")
    assert "did you mean --ckpt_path" in refused("evaluate", "--ckpt_pat=x")
    assert "use auto" in refused("evaluate", f"--ckpt_path={checkpoint}", "--accelerator=abacus")


@pytest.mark.fault("evaluate on images that trained the head")
def test_images_that_trained_the_head_are_counted(checkpoint, trained, tmp_path, capsys, refused):
    counts = json.loads((checkpoint.parent.parent / "result.json").read_text())["images"]
    own = trained / "colours"
    options = ["evaluate", f"--ckpt_path={checkpoint}", "--report=false"]
    result = main([*options, f"--data.root={own}"])
    said = f"{counts['train']} of 60 images were in training, and {counts['val']} chose the epoch"
    assert f"{said}; on the {counts['test']} new ones: acc 1.000" in capsys.readouterr().out
    assert result["new/acc"] == 1.0
    line = refused(*options, f"--data.root={own}", "--data.strict=true")
    assert f"{counts['train'] + counts['val']} of these images were in training or chose the epoch" in line
    other = draw(tmp_path / "other", images=5, seed=3)
    assert "new/acc" not in main([*options, f"--data.root={other}", "--data.strict=true"])
    checkpoint.rename(tmp_path / "alone.ckpt")
    main(["evaluate", "--ckpt_path=alone.ckpt", "--report=false", f"--data.root={own}"])
    assert "it is unknown whether" in capsys.readouterr().out


@pytest.mark.wing("fewshot")
@pytest.mark.fault("evaluate on images that trained the head")
def test_a_head_of_few_pictures_knows_them(tmp_path, capsys):
    few = draw(tmp_path / "few", images=3)
    main(["fewshot", f"--data.root={few}", "--save=few.ckpt", "--model.image_size=32"])
    main(["evaluate", "--ckpt_path=few.ckpt", f"--data.root={few}", "--report=false"])
    assert "9 of 9 images were in training, and 0 chose the epoch; none is new" in capsys.readouterr().out
