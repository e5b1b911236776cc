"""Exports a trained head and its backbone to one ONNX file, which does not need headstart."""

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from headstart import __version__
from headstart.features import int8
from headstart.model.classifier import TransferClassifier


class Exported(nn.Module):
    """Images [B, 3, H, W] uint8, resized and cropped -> calibrated probabilities [B, C]."""

    def __init__(self, module: TransferClassifier) -> None:
        super().__init__()
        self.backbone, self.head, self.temperature = module.backbone, module.head, module.temperature

    def forward(self, images: Tensor) -> Tensor:
        """Normalises, computes features and logits, and scales them."""
        return torch.softmax(self.head(self.backbone(images)) / self.temperature, dim=1)


class Outputs(nn.Module):
    """Features [B, D] -> what a file gives: calibrated probabilities [B, C], and `known` [B] if the head knows."""

    def __init__(self, module: TransferClassifier) -> None:
        super().__init__()
        self.head, self.temperature = module.head, module.temperature
        self.known = module.known.float() if module.known else None
        self.names = ["probabilities", *(["known"] if self.known else [])]

    def forward(self, features: Tensor) -> Any:
        """Computes logits, and scales them."""
        probabilities = torch.softmax(self.head(features) / self.temperature, dim=1)
        return (probabilities, self.known(features)) if self.known else probabilities


def about(module: TransferClassifier) -> dict[str, str]:
    """Class names, preprocessing and temperature as JSON, for the metadata of a file."""
    found = {
        "class_names": module.class_names,
        "preprocessing": asdict(module.backbone.preprocessing),
        "temperature": module.temperature,
        "made_by": f"headstart {__version__}",
    }
    if module.known:
        found["known"] = "share of the validation images and this one that are at least as far from all classes"
    return {name: json.dumps(value) for name, value in found.items()}


def to_onnx(module: TransferClassifier) -> bytes:
    """ONNX with a dynamic batch size, and what it is ``about`` in the metadata."""
    images, outputs = module.example_input_array, Outputs(module)
    assert isinstance(images, Tensor)
    whole = nn.Sequential(module.backbone, outputs)
    return _finished(int8.to_onnx(whole, images, ("images", *outputs.names)), module)


def to_int8_onnx(module: TransferClassifier, quantised: bytes) -> bytes:
    """The ONNX file of a quantised backbone with the head behind it, which stays in fp32."""
    import onnx

    features, outputs = torch.zeros(1, module.backbone.num_features), Outputs(module)
    backbone = onnx.load_from_string(quantised)
    head = int8.to_onnx(outputs, features, ("features", *outputs.names))
    head = onnx.compose.add_prefix(head, "head/", rename_inputs=False, rename_outputs=False)
    head.ir_version = backbone.ir_version
    return _finished(onnx.compose.merge_models(backbone, head, [("features", "features")]), module)


def run_onnx(data: bytes, module: TransferClassifier, images: Tensor) -> Tensor:
    """The probabilities that onnxruntime computes."""
    return torch.from_numpy(int8.session(data).run(["probabilities"], {"images": images.numpy()})[0])


def _finished(model: Any, module: TransferClassifier) -> bytes:
    import onnx

    onnx.helper.set_model_props(model, about(module))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
