"""Exports a trained head and its backbone to one ONNX file, which does not need headstart."""

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from headstart import __version__
from headstart.features import int8
from headstart.model.classifier import TransferClassifier


class Probabilities(nn.Module):
    """Features [B, num_features] -> calibrated probabilities [B, C].

    With ``known`` also how familiar each image is, [B], where the head knows.
    """

    def __init__(self, module: TransferClassifier, known: bool = False) -> None:
        super().__init__()
        self.head, self.task = module.head, module.task
        self.known = module.known.float() if known and module.known else None

    def forward(self, features: Tensor) -> Any:
        """Computes logits, and scales them; and ``Known`` of the same features."""
        probabilities = self.task.probabilities(self.head(features))
        return probabilities if self.known is None else (probabilities, self.known(features))


class Exported(Probabilities):
    """Images [B, 3, H, W] uint8, resized and cropped -> what ``Probabilities`` gives for their features."""

    def __init__(self, module: TransferClassifier, known: bool = False) -> None:
        super().__init__(module, known)
        self.backbone = module.backbone

    def forward(self, images: Tensor) -> Any:
        """Normalises, and computes features and probabilities."""
        return super().forward(self.backbone(images))


def about(module: TransferClassifier) -> dict[str, str]:
    """Class names, preprocessing, and temperature or thresholds as JSON, for the metadata of a file."""
    found = {
        "class_names": module.class_names,
        "preprocessing": asdict(module.backbone.preprocessing),
        **module.task.about(),
        "made_by": f"headstart {__version__}",
    }
    return {name: json.dumps(value) for name, value in found.items()}


def to_onnx(module: TransferClassifier) -> bytes:
    """ONNX with a dynamic batch size, and what it is ``about`` in the metadata."""
    images = module.example_input_array
    assert isinstance(images, Tensor)
    return _finished(int8.to_onnx(Exported(module, known=True), images, ("images", *_outputs(module))), module)


def to_int8_onnx(module: TransferClassifier, quantised: bytes) -> bytes:
    """The ONNX file of a quantised backbone with the head behind it, which stays in fp32."""
    import onnx

    features = torch.zeros(1, module.backbone.num_features)
    backbone = onnx.load_from_string(quantised)
    head = int8.to_onnx(Probabilities(module, known=True), features, ("features", *_outputs(module)))
    head = onnx.compose.add_prefix(head, "head/", rename_inputs=False, rename_outputs=False)
    head.ir_version = backbone.ir_version
    return _finished(onnx.compose.merge_models(backbone, head, [("features", "features")]), module)


def run_onnx(data: bytes, module: TransferClassifier, images: Tensor) -> Tensor:
    """The probabilities that onnxruntime computes."""
    return torch.from_numpy(int8.session(data).run(None, {"images": images.numpy()})[0])


def _outputs(module: TransferClassifier) -> list[str]:
    return ["probabilities", "known"] if module.known else ["probabilities"]


def _finished(model: Any, module: TransferClassifier) -> bytes:
    import onnx

    metadata = about(module)
    if module.known:
        meaning = "share of the validation images and this one that are at least as far from all classes"
        metadata["known"] = json.dumps(meaning)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
