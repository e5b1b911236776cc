"""What needs a GPU: run with `pytest -m gpu` where there is one.

HEADSTART_TEST_ACCELERATOR=cpu tries the tests themselves without.
"""

import os
from pathlib import Path

import pytest
import torch

from headstart import TransferClassifier
from headstart.cli import main
from headstart.device import device_of
from headstart.features.arithmetic import chosen
from headstart.features.extract import Extractor
from headstart.features.int8 import network_of
from headstart.model.backbone import FrozenBackbone
from support import killed_at, newest_run

pytestmark = pytest.mark.gpu
ACCELERATOR = os.environ.get("HEADSTART_TEST_ACCELERATOR", "gpu")
GPU = (f"--trainer.accelerator={ACCELERATOR}", "--trainer.devices=1")


def keys_in(cache: Path) -> set[str]:
    return {folder.name for folder in (cache / "features").iterdir()}


@pytest.mark.parametrize("cache", ["true", "false"])
def test_training_in_mixed_precision(cache, colours, train):
    result = train(colours, *GPU, "--trainer.precision=bf16-mixed", f"--data.cache={cache}", "--model.lr=0.02")
    assert result["test/acc"] == 1.0


def test_extraction_gives_the_processors_features(tmp_path):
    backbone, device = FrozenBackbone("resnet18", "bundled", 64), device_of(ACCELERATOR)
    pixels = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = []
    for where in (torch.device("cpu"), device):
        network = network_of(backbone.to(where), chosen("fp32", backbone, where, 0, tmp_path), where, tmp_path)
        extractor = Extractor(network, lambda key: pixels[int.from_bytes(key, "big")], where, workers=2)
        parts = extractor(number.to_bytes(32, "big") for number in range(len(pixels)))
        found.append(torch.cat([part.features for part in parts]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["true", "false"])
def test_a_killed_run_ends_with_the_same_bits(cache, colours, train):
    options = [*GPU, "--trainer.precision=bf16-mixed", f"--data.cache={cache}", "--trainer.max_epochs=4", "--name=run"]
    train(colours, *options, "--logs=whole")
    with killed_at(2, TransferClassifier):
        train(colours, *options, "--logs=parts")
    train(colours, *options, "--logs=parts", "--ckpt_path=last")
    whole, parts = (
        torch.load(newest_run(Path(logs)) / "checkpoints/last.ckpt", weights_only=True, map_location="cpu")
        for logs in ("whole", "parts")
    )
    assert parts["epoch"] == 3
    torch.testing.assert_close(parts["state_dict"], whole["state_dict"], rtol=0, atol=0)


def test_rows_of_devices_are_never_mixed(colours, train, own_cache):
    train(colours, *GPU, "--trainer.max_epochs=1")
    of_gpu = keys_in(own_cache)
    train(colours, "--trainer.accelerator=cpu", "--trainer.max_epochs=1")
    assert of_gpu < keys_in(own_cache) or ACCELERATOR == "cpu"


def test_the_other_commands(colours, train):
    train(colours, *GPU, "--trainer.max_epochs=3", "--model.lr=0.02")
    best, accelerator = newest_run() / "checkpoints/best.ckpt", f"--accelerator={ACCELERATOR}"
    scores = main(["evaluate", f"--ckpt_path={best}", accelerator, "--report=false"])
    assert scores["test/acc"] == 1.0
    # wing: finetune
    tuned = main(["finetune", f"--ckpt_path={best}", *GPU, "--trainer.max_epochs=1", "--report=false"])
    assert tuned["test/acc"] > 0.5
    # /wing
