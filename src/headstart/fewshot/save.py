"""Saves a head learnt from a few pictures per class as a checkpoint for every command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from headstart.fewshot.heads import TaskHead, learnt
from headstart.fewshot.training import make_trainer
from headstart.model.calibration import fit_temperature
from headstart.model.classifier import TransferClassifier
from headstart.model.heads import Unit

FOLDS = 10  # with more pictures per class, a tenth of them is left out at a time


@dataclass(frozen=True)
class Fitted:
    """A head learnt from all pictures."""

    head: torch.nn.Linear | Unit
    temperature: float  # divides the logits
    left_out: float | None  # accuracy on pictures left out; None: one per class, so that none can be


@torch.no_grad()
def fitted(head: TaskHead, classes: Sequence[Tensor], choose: bool = True) -> Fitted:
    """Learns from each class's pictures, [K, D]; with ``choose``, at the penalty that predicts held-out pictures best.

    The temperature is fitted on the logits of the held-out pictures. With one picture per class, the penalty is the
    head's default, and the temperature 1.
    """
    if max(map(len, classes)) < 2:
        return Fitted(learnt(head, classes), 1.0, None)
    found = []
    for strength in (choose and head.strengths) or (None,):
        head.set_strength(strength)
        logits, labels = leave_one_out(head, classes)
        temperature = fit_temperature(logits, labels)
        loss = float(functional.cross_entropy(logits / temperature, labels))
        found.append((loss, strength, temperature, float((logits.argmax(dim=1) == labels).float().mean())))
    _, strength, temperature, acc = min(found, key=lambda each: each[0])
    head.set_strength(strength)
    return Fitted(learnt(head, classes), temperature, acc)


def leave_one_out(head: TaskHead, classes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The logits [M, N] of each picture by a head learnt without it and one of each other class, and labels [M].

    So classes stay as frequent as they are. The only picture of a class is never left out.
    """
    folds = min(max(map(len, classes)), FOLDS)
    logits, labels = [], []
    for fold in range(folds):
        out = [(torch.arange(len(rows)) % folds == fold) & (len(rows) > 1) for rows in classes]
        kept = learnt(head, [rows[~left] for rows, left in zip(classes, out, strict=True)])
        logits.append(kept(torch.cat([rows[left] for rows, left in zip(classes, out, strict=True)])))
        labels += [label for label, left in enumerate(out) for _ in range(int(left.sum()))]
    return torch.cat(logits), torch.tensor(labels)


def save(path: Path, module: TransferClassifier, found: Fitted, name: str) -> None:
    """Writes the checkpoint of ``module`` with the head that the few-shot head ``name`` learnt."""
    module.head.load_state_dict(found.head.state_dict())
    module.task.take({"temperature": found.temperature})
    module.origin = f"{name}, few-shot"
    trainer = make_trainer("cpu")
    trainer.strategy.connect(module)
    module.trainer = trainer
    trainer.save_checkpoint(path)
