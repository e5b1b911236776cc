"""Exports a trained head as a state dict of the backbone's own library, which loads it without headstart."""

import io

import torch
from torch import Tensor, nn

from headstart.errors import UserError
from headstart.model.classifier import TransferClassifier
from headstart.model.heads import linear_head


def to_torchvision(module: TransferClassifier) -> bytes:
    """A state dict of the whole network with the new classifier, whose logits are calibrated."""
    net, path = module.backbone.net, module.backbone.classifier_path
    if path is None:
        raise UserError(f"--output: {module.backbone.name} has no single classifier to replace; export .onnx")
    head = linear_head(module.head)
    folded = zip(("weight", "bias"), module.task.folded(head.weight, head.bias), strict=True)
    classifier = {f"{path}.{name}": tensor for name, tensor in folded}
    file = io.BytesIO()
    torch.save({name: tensor.detach().clone() for name, tensor in (net.state_dict() | classifier).items()}, file)
    return file.getvalue()


def run_torchvision(data: bytes, module: TransferClassifier, images: Tensor) -> Tensor:
    """The probabilities of the library's own network, whose input the caller must normalise."""
    backbone = module.backbone
    assert backbone.classifier_path
    head = nn.Linear(backbone.num_features, len(module.class_names))
    net = backbone.family.whole(backbone.name, backbone.preprocessing.crop_size, backbone.classifier_path, head)
    net.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
    logits: Tensor = net.eval()((images.float() - backbone.mean) / backbone.std)
    return module.task.activation(logits)
