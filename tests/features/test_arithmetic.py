"""Which arithmetic `auto` is, and that it stays."""

import json

import pytest
import torch
import yaml

from headstart.cli import main
from headstart.features import arithmetic
from headstart.features.arithmetic import as_trained, chosen, images_per_second
from headstart.model.backbone import FrozenBackbone
from support import newest_run

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch):
    """Sets what a measurement finds, and counts them; returns the dictionary of speeds and the list of networks."""
    speeds, networks = {"bf16": 10.0, "fp32": 20.0}, []
    monkeypatch.setattr(arithmetic, "images_per_second", lambda backbone: networks.append(backbone.name) or speeds)
    return speeds, networks


@pytest.fixture
def backbone():
    return FrozenBackbone("timm/test_resnet", "random", 32)


def test_many_images_are_measured_once_per_network_and_size(measured, backbone, tmp_path, capsys):
    speeds, networks = measured
    assert chosen("auto", backbone, CPU, 300, tmp_path) == "fp32"
    assert "fp32; this machine computes 10 images/s in bf16, 20 in fp32" in capsys.readouterr().out
    speeds["bf16"] = 30.0
    assert chosen("auto", backbone, CPU, 5000, tmp_path) == "fp32"  # remembered
    assert chosen("auto", FrozenBackbone("timm/test_resnet", "random", 64), CPU, 300, tmp_path) == "bf16"
    assert len(networks) == 2
    file, _ = sorted(tmp_path.glob("arithmetic/*.json"), key=lambda path: path.stat().st_mtime)
    assert json.loads(file.read_text())["processor"]
    file.write_text("{")  # a damaged memory is measured again
    assert chosen("auto", backbone, CPU, 300, tmp_path) == "bf16"
    (tmp_path / "file").touch()
    assert chosen("auto", backbone, CPU, 300, tmp_path / "file") == "bf16"  # not writable
    assert len(networks) == 4


def test_few_images_and_what_was_asked_for_are_not_measured(measured, backbone, tmp_path, monkeypatch):
    assert chosen("bf16", backbone, CPU, 10**6, tmp_path) == "bf16"
    for amx in (True, False):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda amx=amx: amx)
        assert chosen("auto", backbone, CPU, 299, tmp_path) == ("bf16" if amx else "fp32")
    assert not measured[1]
    assert not list(tmp_path.glob("arithmetic/*.json"))


def test_both_are_measured(backbone):
    found = images_per_second(backbone, 0.01)
    assert found.keys() == {"bf16", "fp32"}
    assert all(0 < speed < float("inf") for speed in found.values())


def test_a_head_keeps_the_arithmetic_of_its_training(colours, train, monkeypatch, capsys):
    monkeypatch.setattr(arithmetic, "MANY", 10)
    monkeypatch.setattr(arithmetic, "images_per_second", lambda backbone: {"bf16": 2.0, "fp32": 1.0})
    assert train(colours, "--trainer.max_epochs=1")["arithmetic"] == "bf16"
    run = newest_run()
    best = run / "checkpoints/best.ckpt"
    assert torch.load(best, weights_only=True)["headstart"]["arithmetic"] == "bf16"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["feature_precision"] == "bf16"
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(arithmetic, "images_per_second", lambda backbone: {"bf16": 1.0, "fp32": 2.0})
    monkeypatch.setattr(arithmetic, "_remembered", lambda file: {})  # as on another machine
    assert train(colours, "--trainer.max_epochs=2", f"--ckpt_path={best}")["arithmetic"] == "bf16"
    assert main(["evaluate", f"--ckpt_path={best}", "--report=false"])["arithmetic"] == "bf16"
    capsys.readouterr()
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert as_trained("auto", "bf16", CPU) == "fp32"
    assert "no bf16, in which the head was trained" in capsys.readouterr().out
    assert as_trained("bf16", "fp32", CPU) == "bf16"
    assert as_trained("auto", None, CPU) == "auto"
