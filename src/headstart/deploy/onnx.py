"""Exports a trained head and its backbone to one ONNX file, which does not need headstart."""

import json
import logging
import warnings
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from headstart import __version__
from headstart.model.classifier import TransferClassifier

NEEDED = ("onnx", "onnxscript", "onnxruntime")


class Exported(nn.Module):
    """Images [B, 3, H, W] uint8, resized and cropped -> calibrated probabilities [B, C]."""

    def __init__(self, module: TransferClassifier) -> None:
        super().__init__()
        self.backbone, self.head, self.temperature = module.backbone, module.head, module.temperature

    def forward(self, images: Tensor) -> Tensor:
        """Normalises, computes features and logits, and scales them."""
        return torch.softmax(self.head(self.backbone(images)) / self.temperature, dim=1)


class ExportedWithKnown(Exported):
    """``Exported``, and how familiar each image is, [B]; only for a head that knows."""

    def __init__(self, module: TransferClassifier) -> None:
        super().__init__(module)
        self.known = module.known.float() if module.known else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """As ``Exported``, and ``Known`` of the same features."""
        assert self.known
        features = self.backbone(images)
        return torch.softmax(self.head(features) / self.temperature, dim=1), self.known(features)


def to_onnx(module: TransferClassifier) -> bytes:
    """ONNX with a dynamic batch size; class names and preprocessing are JSON in the metadata."""
    import onnx

    images, known = module.example_input_array, module.known
    assert isinstance(images, Tensor)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by the exporter's own code
        program: Any = torch.onnx.export(
            (ExportedWithKnown if known else Exported)(module).eval(),
            (images.repeat(2, 1, 1, 1),),
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities", "known"] if known else ["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
            verbose=False,
        )
    model = program.model_proto
    about = {
        "class_names": module.class_names,
        "preprocessing": asdict(module.backbone.preprocessing),
        "temperature": module.temperature,
        "made_by": f"headstart {__version__}",
    }
    if known:
        about["known"] = "share of the validation images and this one that are at least as far from all classes"
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def run_onnx(data: bytes, module: TransferClassifier, images: Tensor) -> Tensor:
    """The probabilities that onnxruntime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
