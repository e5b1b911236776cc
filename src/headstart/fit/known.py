"""The last step of a fit: adds to the best checkpoint what measures how familiar an image looks."""

import torch
from torch import Tensor

from headstart.features.matrix import Labelled
from headstart.fit.cli import TrainCLI
from headstart.model.classifier import TransferClassifier
from headstart.model.known import Known
from headstart.model.sealed import SEAL, SealedCheckpointIO
from headstart.report.evaluation import evenly_spaced
from headstart.terminal import say

WIDEST = 4095  # features; the matrix of more is too large for a checkpoint
MOST = 20_000  # images that are used of a split, evenly spread
ROWS = 256


def add_known(cli: TrainCLI) -> None:
    """Adds ``Known`` to the best checkpoint, from the cached features; a run that is killed before it resumes here."""
    data, module, path = cli.datamodule, cli.model, cli.best.best_model_path
    if not path or not cli.trainer.is_global_zero or not data.store.cache or not data.items_in("val"):
        return
    if data.multilabel:  # there are no means of classes
        return
    if module.backbone.num_features > WIDEST:
        say(f"known: is left out, since more than {WIDEST:,} features are too many for its matrix")
        return
    checkpoint = SealedCheckpointIO().load_checkpoint(path)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    train, val = (_features(module.to(data.store.device).eval(), data.labelled(split)) for split in ("train", "val"))
    if known := Known.fit(*train, val[0]):
        checkpoint["headstart"]["known"] = dict(known.named_buffers())
        checkpoint.pop(SEAL, None)
        SealedCheckpointIO().save_checkpoint(checkpoint, path)
    else:
        say("known: is left out, since the training images of each class are all alike; add more images per class")


@torch.no_grad()
def _features(module: TransferClassifier, labelled: Labelled) -> tuple[Tensor, Tensor]:
    """Features [N, D] as the head gets them, and labels [N], of at most ``MOST`` images as they are."""
    chosen = Labelled(labelled.views[:1], labelled.labels).take(evenly_spaced(len(labelled), MOST))
    return torch.cat([module.features(rows) for rows, _ in chosen.blocks(ROWS)]), chosen.labels
