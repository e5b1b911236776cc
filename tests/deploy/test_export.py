import json
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision import models

from headstart import TransferClassifier
from headstart.cli import main
from headstart.verbs import export as exporting


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)


def probabilities(checkpoint: Path) -> torch.Tensor:
    module = TransferClassifier.load_from_checkpoint(checkpoint)
    with torch.no_grad():
        return (module(images()) / module.temperature).softmax(dim=1)


def test_the_onnx_file_needs_nothing_else(checkpoint):
    result = main(["export", f"--ckpt_path={checkpoint}", "--output=model.onnx"])
    assert result["images"] == 32
    assert result["difference"] < 1e-4
    onnx.checker.check_model("model.onnx")
    session = onnxruntime.InferenceSession("model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["class_names"]) == ["blue", "green", "red"]
    assert json.loads(about["preprocessing"])["crop_size"] == 32
    for count in (1, 5):  # any number of images
        found = torch.from_numpy(session.run(None, {"images": images()[:count].numpy()})[0])
        torch.testing.assert_close(found, probabilities(checkpoint)[:count], rtol=0, atol=1e-5)


def test_torchvision_alone_loads_the_weights(checkpoint):
    """The article's own code: a resnet18 with a new fc."""
    main(["export", f"--ckpt_path={checkpoint}", "--output=resnet18.pth"])
    model = models.resnet18()
    model.fc = nn.Linear(model.fc.in_features, 3)
    model.load_state_dict(torch.load("resnet18.pth", weights_only=True))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (images() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        found = model.eval()(pixels).softmax(dim=1)
    torch.testing.assert_close(found, probabilities(checkpoint), rtol=0, atol=1e-5)


@pytest.mark.fault("export that computes something else")
def test_an_export_that_computes_something_else_is_not_written(checkpoint, refused, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    assert "not written" in refused("export", f"--ckpt_path={checkpoint}", "--output=resnet18.pth")
    assert not Path("resnet18.pth").exists()


def test_what_cannot_be_done_is_refused(checkpoint, refused, monkeypatch):
    Path("mine.pth").write_text("mine")
    assert "is there already" in refused("export", f"--ckpt_path={checkpoint}", "--output=mine.pth")
    assert "name it" in refused("export", f"--ckpt_path={checkpoint}", "--output=model.h5")
    assert "--output is missing" in refused("export", f"--ckpt_path={checkpoint}")
    Path("empty").mkdir()
    line = refused("export", f"--ckpt_path={checkpoint}", "--output=a.pth", "--data.root=empty")
    assert "no readable image" in line
    assert "no file" in refused("export", "--ckpt_path=nowhere.ckpt", "--output=a.onnx")
    monkeypatch.setattr(exporting, "NEEDED", ("not_installed",))
    assert "pip install -e '.[export]'" in refused("export", f"--ckpt_path={checkpoint}", "--output=a.onnx")
