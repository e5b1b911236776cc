"""A bank of linear heads, trained at once on a feature matrix, without a Trainer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headstart.data.loaders import BatchOrder, FeatureLoader
from headstart.features.matrix import Labelled
from headstart.model.heads import as_linear
from headstart.model.multilabel import task_of
from headstart.model.schedule import warmup_cosine
from headstart.model.task import SingleLabel, Task

ROWS_AT_ONCE = 65_536
BETAS, EPS = (0.9, 0.999), 1e-8  # defaults of torch.optim.AdamW


@dataclass(frozen=True)
class HeadSettings:
    """The settings of one head of a bank, as in ``TransferClassifier``."""

    lr: float
    weight_decay: float
    label_smoothing: float


@dataclass(frozen=True)
class Schedule:
    """The training schedule, common to all heads."""

    epochs: int
    batch_size: int
    warmup: float  # share of the steps in which the learning rate warms up
    seed: int  # seed of the initial values and of the order of images


@dataclass(frozen=True)
class TrainedHead:
    """A trained head and its validation scores."""

    head: nn.Linear  # at the epoch of the lowest validation loss
    score: float  # validation accuracy, or the headline of another task
    loss: float  # validation loss, unsmoothed
    epoch: int = 0  # that epoch, from 0

    @property
    def rank(self) -> tuple[float, float]:
        """Its place among others by validation: the lowest is the best."""
        return -self.score, self.loss


class Bank:
    """H linear heads on the same features, each with its own AdamW settings, trained in one pass.

    Each head ends as if ``torch.optim.AdamW`` trained it alone with the same initial values and batches: the gradients
    of the summed loss do not mix heads, and AdamW works elementwise. All heads have the same initial values.
    """

    def __init__(
        self,
        settings: Sequence[HeadSettings],
        num_classes: int,
        width: int,
        seed: int,
        device: torch.device,
        class_weights: Tensor | None = None,
        task: type[Task] = SingleLabel,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            linear = torch.nn.Linear(width, num_classes)
        heads = len(settings)
        self.weight = linear.weight.detach().repeat(heads, 1, 1).to(device)  # [H, C, D]
        self.bias = linear.bias.detach().repeat(heads, 1).to(device)  # [H, C]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in (self.weight, self.bias)]
        self.lr, self.decay, self.smoothing = (
            torch.tensor([getattr(setting, name) for setting in settings], device=device)
            for name in ("lr", "weight_decay", "label_smoothing")
        )
        self.steps, self.class_weights, self.task = 0, class_weights, task

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [H, B, C]."""
        heads, classes, width = self.weight.shape
        flat = features @ self.weight.view(heads * classes, width).T
        return flat.view(-1, heads, classes).transpose(0, 1) + self.bias[:, None]

    def step(self, features: Tensor, labels: Tensor, rate: float) -> None:
        """Takes one step for every head, at ``rate`` times its learning rate."""
        error = self.task.errors(self.logits(features), labels, self.smoothing, self.class_weights)
        heads, rows, classes = error.shape
        by_class = error.transpose(1, 2).reshape(heads * classes, rows)
        gradients = (by_class @ features).view_as(self.weight), error.sum(dim=1)
        self.steps += 1
        for parameter, gradient, moments in zip((self.weight, self.bias), gradients, self.moments, strict=True):
            self._adamw(parameter, gradient, moments, rate)

    def _adamw(self, parameter: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], rate: float) -> None:
        shape = (-1,) + (1,) * (parameter.ndim - 1)
        lr = (self.lr * rate).view(shape)
        first, second = moments
        parameter.mul_(1 - lr * self.decay.view(shape))
        first.lerp_(gradient, 1 - BETAS[0])
        second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        corrected = second.sqrt().div_((1 - BETAS[1] ** self.steps) ** 0.5).add_(EPS)
        parameter.sub_(lr / (1 - BETAS[0] ** self.steps) * first / corrected)

    def losses(self, labelled: Labelled) -> Tensor:
        """The mean cross entropy of each head, [H]."""
        total = torch.zeros_like(self.lr)
        for block, truth in labelled.blocks(max(1, ROWS_AT_ONCE // len(total))):
            found = self.task.losses(self.logits(block).flatten(0, 1), torch.cat([truth] * len(total)))
            total += found.view(len(total), -1).sum(dim=1)
        return total / len(labelled)

    def head(self, number: int) -> nn.Linear:
        """A copy of the current state of one head."""
        return as_linear(self.weight[number].clone(), self.bias[number].clone())


@torch.no_grad()
def train_bank(
    settings: Sequence[HeadSettings],
    train: Labelled,
    val: Labelled,
    num_classes: int,
    schedule: Schedule,
    advance: Callable[[int], None] = lambda images: None,
    keep_last: bool = False,
    class_weights: Tensor | None = None,
) -> list[TrainedHead]:
    """Trains one head per setting, as `headstart train` would; returns each at its lowest validation loss.

    With ``keep_last``, returns each after the last epoch, for data that must not select the epoch. Calls ``advance``
    with the number of images after each batch.
    """
    epoch = 0
    loader = FeatureLoader(train, BatchOrder(len(train), schedule.batch_size, schedule.seed, lambda: epoch))
    sample = train.sample()
    task, width = task_of(train.labels), sample.shape[1]
    bank = Bank(settings, num_classes, width, schedule.seed, sample.device, class_weights, task)
    steps = len(loader) * schedule.epochs
    warmup_steps = round(steps * schedule.warmup)
    best: dict[int, TrainedHead] = {}
    for epoch in range(schedule.epochs):
        for features, truth in loader:
            bank.step(features, truth.to(features.device), warmup_cosine(bank.steps, warmup_steps, steps))
            advance(len(truth))
        for number, loss in enumerate(bank.losses(val).tolist()):
            if keep_last or number not in best or loss < best[number].loss:
                best[number] = TrainedHead(bank.head(number), math.nan, loss, epoch)  # scored below, once
    found = [best[number] for number in range(len(settings))]
    return [replace(each, score=score_and_loss(each.head, val)[0]) for each in found]


@torch.no_grad()
def logits_of(head: nn.Module, labelled: Labelled) -> Tensor:
    """The logits of each image, [N, C], on the CPU."""
    head = head.to(labelled.sample().device)
    return torch.cat([head(block).cpu() for block, _ in labelled.blocks(ROWS_AT_ONCE)])


def score_and_loss(head: nn.Linear, labelled: Labelled) -> tuple[float, float]:
    """The headline score, such as accuracy, and the mean cross entropy of a head."""
    logits, task = logits_of(head, labelled), task_of(labelled.labels)
    return task.score(logits, labelled.labels), float(task.losses(logits, labelled.labels).mean())
