"""Saves a head learnt from a few pictures per class as a checkpoint for every command."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.errors import UserError
from headstart.fewshot.heads import learnt
from headstart.fewshot.training import make_trainer
from headstart.files import new_path
from headstart.model.calibration import fit_temperature
from headstart.model.classifier import TransferClassifier
from headstart.model.heads import linear_head


def save(path: Path, module: TransferClassifier, head: nn.Module, classes: Sequence[Tensor]) -> float:
    """Writes what the head learns from all pictures as a linear head; returns its leave-one-out accuracy.

    The temperature is fitted on the leave-one-out logits. The head must be a prototype (euclidean, without L2) or
    ridge; ``classes`` are the features of each class's pictures, [K, D] each, K at least 2.
    """
    new_path("--save", path)
    if alone := [name for name, rows in zip(module.class_names, classes, strict=True) if len(rows) < 2]:
        raise UserError(f"--save={path}: {', '.join(alone[:5])}: one picture, but at least 2 per class are needed")
    with torch.no_grad():
        logits, labels = leave_one_out(head, classes)
        weight, bias = learnt(head, classes)
        target = linear_head(module.head)
        target.weight.copy_(weight)
        target.bias.copy_(bias)
    module.temperature, module.origin = fit_temperature(logits, labels), f"{type(head).__name__.lower()}, few-shot"
    trainer = make_trainer("cpu")
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(path)
    return float((logits.argmax(dim=1) == labels).float().mean())


def leave_one_out(head: nn.Module, classes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The logits [M, N] of each picture by a head learnt without it, and the labels [M]."""
    logits, labels = [], []
    for label, rows in enumerate(classes):
        for number in range(len(rows)):
            kept = torch.arange(len(rows)) != number
            without = [others[kept] if other == label else others for other, others in enumerate(classes)]
            logits.append(functional.linear(rows[number], *learnt(head, without)))
            labels.append(label)
    return torch.stack(logits), torch.tensor(labels)
