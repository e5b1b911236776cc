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


def to_onnx(module: TransferClassifier) -> bytes:
    """ONNX with a dynamic batch size; class names and preprocessing are JSON in the metadata."""
    import onnx

    images = module.example_input_array
    assert isinstance(images, Tensor)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by the exporter's own code
        program: Any = torch.onnx.export(
            Exported(module).eval(),
            (images.repeat(2, 1, 1, 1),),
            dynamo=True,
            input_names=["images"],
            output_names=["probabilities"],
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
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def run_onnx(data: bytes, module: TransferClassifier, images: Tensor) -> Tensor:
    """The probabilities that onnxruntime computes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
