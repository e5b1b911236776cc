"""Exports a trained head and its backbone as a program of torch.export, which torch runs without headstart."""

import io

import torch
from torch import Tensor

from headstart.deploy.onnx import Exported, about
from headstart.model.classifier import TransferClassifier


def to_program(module: TransferClassifier) -> bytes:
    """A .pt2 file with a dynamic batch size; class names and preprocessing are further files in it, as JSON."""
    images = module.example_input_array
    assert isinstance(images, Tensor)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Exported(module).eval(), (images.repeat(2, 1, 1, 1),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files=about(module))
    return file.getvalue()


def run_program(data: bytes, module: TransferClassifier, images: Tensor) -> Tensor:
    """The probabilities that the file's program computes."""
    probabilities: Tensor = torch.export.load(io.BytesIO(data)).module()(images)
    return probabilities
