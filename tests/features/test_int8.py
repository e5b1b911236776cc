"""Features in int8: quantised once, the same each time, and refused where they would be wrong."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from headstart.cli import main
from headstart.errors import UserError
from headstart.features import int8
from headstart.features.arithmetic import as_trained, chosen
from headstart.features.int8 import Int8Backbone, calibration_images
from support import TINY, newest_run

ASKED = "--data.feature_precision=int8"


def test_the_features_are_close_to_fp32_and_depend_on_no_neighbour(quantised):
    backbone, network, _ = quantised
    images = calibration_images(32)
    found, exact = network(images), backbone(images)
    assert torch.nn.functional.cosine_similarity(found, exact).mean() > 0.98
    assert not torch.equal(found, exact)
    assert torch.equal(network(images[5:8]), found[5:8])


def test_a_head_is_trained_scored_and_used_in_int8(
    quantised, colours, train, kept, own_cache, refused, monkeypatch, capsys
):
    (network,) = kept.glob("*.onnx")
    trained = train(colours, ASKED, "--trainer.max_epochs=3", "--model.lr=0.1")
    assert trained["arithmetic"] == "int8"
    assert trained["seconds"]["quantise"] > 0
    best = newest_run() / "checkpoints/best.ckpt"
    assert torch.load(best, weights_only=True)["headstart"]["arithmetic"] == "int8"
    key = json.loads(next(own_cache.glob("features/*/key.json")).read_text())
    assert key["arithmetic"]["dtype"] == "int8"
    assert key["arithmetic"]["network"] == hashlib.sha256(network.read_bytes()).hexdigest()
    assert "quantised in" not in capsys.readouterr().out
    # A damaged network is made again.
    network.write_bytes(network.read_bytes()[:-1])
    monkeypatch.setattr(int8, "quantise", lambda backbone: (quantised[1].model, 0.99))
    evaluated = main(["evaluate", f"--ckpt_path={best}", "--report=false"])
    shown = capsys.readouterr().out
    assert evaluated["arithmetic"] == "int8"
    assert evaluated["test/acc"] == trained["test/acc"]
    assert "quantised in" in shown
    assert "HIT" in shown
    line = refused("predict", f"--ckpt_path={best}", str(colours), "--explain=maps", "--output=maps.csv")
    assert "no maps of int8 features" in line
    main(["predict", f"--ckpt_path={best}", str(colours), "--output=rows.csv"])
    assert "quantised in" not in capsys.readouterr().out
    rows = [line.split(",") for line in Path("rows.csv").read_text().splitlines()[1:]]
    assert sum(Path(row[0]).parent.name == row[1] for row in rows) > 0.9 * len(rows)


def test_int8_rows_are_compared_with_int8(colours, train, kept, monkeypatch, capsys):
    train(colours, ASKED, "--trainer.max_epochs=1")
    compute = Int8Backbone.__call__
    monkeypatch.setattr(Int8Backbone, "__call__", lambda self, images: compute(self, images) * 1.002)
    capsys.readouterr()
    train(colours, ASKED, "--trainer.max_epochs=1")
    assert "all are recomputed" in capsys.readouterr().out


def test_what_cannot_be_computed_in_int8_is_refused(colours, checkpoint, kept, refused, monkeypatch):
    assert "fine-tuning" in refused("finetune", f"--ckpt_path={checkpoint}", ASKED)
    (network,) = kept.glob("*.onnx")
    network.unlink()
    monkeypatch.setattr(int8, "quantise", lambda backbone: (b"", 0.97))
    line = refused("train", f"--data.root={colours}", *TINY, ASKED)
    assert "differ too much from those in fp32 (cosine 0.970" in line
    assert not list(kept.glob("*.onnx"))
    monkeypatch.setattr("headstart.features.arithmetic.INT8_NEEDS", ("not_installed",))
    assert "pip install -e '.[fast]'" in refused("train", f"--data.root={colours}", ASKED)


def test_auto_is_int8_only_for_a_head_of_int8(quantised, tmp_path, monkeypatch, capsys):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert as_trained("auto", "int8", cpu) == "int8"
    assert chosen("int8", quantised[0], cpu, 10, tmp_path) == "int8"
    with pytest.raises(UserError, match="is for CPUs, not for cuda"):
        chosen("int8", quantised[0], cuda, 10, tmp_path)
    assert as_trained("auto", "int8", cuda) == "fp32"
    monkeypatch.setattr("headstart.features.arithmetic.INT8_NEEDS", ("not_installed",))
    assert as_trained("auto", "int8", cpu) == "fp32"
    assert "fp32; the head was trained on int8" in capsys.readouterr().out
