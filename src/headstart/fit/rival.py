"""The exact optimum as a rival of the trained head: the better one by validation is ``best.ckpt``."""

import math
from functools import partial
from typing import Any

from torch import Tensor, nn

from headstart.data.module import ImageData
from headstart.fit.cli import TrainCLI
from headstart.model.classifier import TransferClassifier
from headstart.model.heads import linear_head
from headstart.model.sealed import SealedCheckpointIO
from headstart.search.bank import TrainedHead, logits_of
from headstart.search.exact import UNLIMITED, TooManyPasses, best_exact, by_loss
from headstart.terminal import say

TOLERANCE = 1e-3  # of the gradient of standardised features; 1e-4 changes no validation loss by 1 %
# A pass over the features takes the arithmetic of an epoch, but one step. What a step of the Trainer does beside its
# multiplications of features by weights takes as long as so many of them, so that in an epoch's time there are
# 1 + STEP / multiplications passes. More than MOST_PASSES are not needed.
STEP, MOST_PASSES = 3e7, 20
EXACT = "exact optimum"


def meet_rival(cli: TrainCLI) -> None:
    """Replaces the best epoch's head in ``best.ckpt`` by the exact optimum, unless it validates better.

    A function of the data and the options, so that a resumed run ends with the same head.
    """
    path, module, data, trainer = cli.best.best_model_path, cli.model, cli.datamodule, cli.trainer
    if not path or not has_rival(module, data, trainer):
        return
    best = SealedCheckpointIO().load_checkpoint(path)
    if best["headstart"].get("head", "").startswith(EXACT):  # the run was killed after this step
        return
    found = trainer.strategy.broadcast(_better(module, data, best, trainer.current_epoch))
    if found is None:
        return
    l2, state = found
    module.head.load_state_dict(state)
    module.origin = f"{EXACT}, L2 {l2:.1g}"
    trainer.validate(module, data, verbose=False)  # for its scores and its temperature
    trainer.save_checkpoint(path, weights_only=True)  # there is no optimizer to resume


def has_rival(module: TransferClassifier, data: ImageData, trainer: Any) -> bool:
    """Whether the head is linear and learns from the cached features of all images, by the usual loss."""
    plain = type(module.head) is nn.Linear and type(module).configure_loss is TransferClassifier.configure_loss
    whole = trainer.limit_train_batches == trainer.limit_val_batches == 1.0 and not trainer.overfit_batches
    return plain and whole and data.store.cache and not module.finetuned


def _better(
    module: TransferClassifier, data: ImageData, best: dict[str, Any], epochs: int
) -> tuple[float, dict[str, Tensor]] | None:
    """The penalty and the tensors of the exact optimum, if it is kept instead of the checkpoint ``best``."""
    multiplications = data.batch_size * linear_head(module.head).weight.numel()  # per step of the training
    passes = int(epochs * min(MOST_PASSES, 1 + STEP / multiplications))
    try:
        l2, exact = exact_rival(module, data, passes)
    except TooManyPasses:
        say(f"fit: the exact optimum was left out, since it takes more than {passes} passes over the features")
        return None
    module.load_state_dict(best["state_dict"], strict=False)
    val = data.labelled("val")
    both = [logits_of(head, val) for head in (module.head, exact.head)]
    trained, found = (module.task.recalibrated(logits, val.labels) for logits in both)
    return (l2, exact.head.cpu().state_dict()) if is_kept(module, trained, found, val.labels) else None


def is_kept(module: TransferClassifier, trained: Tensor, exact: Tensor, labels: Tensor) -> bool:
    """Whether the exact head is kept, from the calibrated validation logits [N, C] of both heads, and labels [N].

    By loss, the trained head must be better by more than the standard error of the paired difference: it is the best of
    many epochs by the same images, so that part of its lead is luck (the one-standard-error rule of Breiman et al.,
    "Classification and Regression Trees", 1984).
    """
    if module.hparams["best_by"] != "val/loss":
        return validation_rank(module, exact, labels) < validation_rank(module, trained, labels)
    losses, theirs = (module.task.losses(logits, labels) for logits in (trained, exact))
    gain = losses - theirs
    return float(gain.mean()) > -float(gain.std(correction=0)) / math.sqrt(len(gain))


def exact_rival(module: TransferClassifier, data: ImageData, passes: int = UNLIMITED) -> tuple[float, TrainedHead]:
    """The L2 penalty and the exact optimum that validate best; raises as ``best_exact``."""
    train, val = data.labelled("train"), data.labelled("val")
    rank = partial(validation_rank, module)
    return best_exact(train, val, len(data.class_names), module.loss_weights, rank, TOLERANCE, passes)


def validation_rank(module: TransferClassifier, logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The place of a head among others by ``best_by``, from logits [N, C] and labels: the lowest is the best."""
    name, loss = module.hparams["best_by"], by_loss(logits, labels)
    if name == "val/loss":
        return loss
    return -float(module.configure_metrics("val/")(module.task.activation(logits), labels)[name]), loss[1]
