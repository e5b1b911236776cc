"""Linear heads fitted to a matrix of features without a Trainer: a bank of them at once, and the exact optimum."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headstart.data.loaders import EpochOrder, FeatureLoader
from headstart.features.cache import FeatureMatrix
from headstart.model.classifier import warmup_cosine

ROWS_AT_ONCE = 65_536
TOLERANCE = 5e-5  # scikit-learn's own is 1e-4
BETAS, EPS = (0.9, 0.999), 1e-8  # torch.optim.AdamW's own


@dataclass(frozen=True)
class Setting:
    """What one head of a bank is trained with; the fields are ``TransferClassifier``'s."""

    lr: float
    weight_decay: float
    label_smoothing: float


@dataclass(frozen=True)
class Head:
    """A linear head: logits = features @ weight.T + bias.

    Attributes:
        weight: [num_classes, D].
        bias: [num_classes].
    """

    weight: Tensor
    bias: Tensor


class Bank:
    """H linear heads on the same features, each with AdamW settings of its own, trained in one pass.

    Every head ends where ``torch.optim.AdamW`` would bring it alone with the same initial values and batches: gradients
    of the summed loss do not mix heads, and AdamW works element by element.

    Args:
        settings: one a head.
        num_classes: of each.
        width: of the features.
        seed: of the initial values, which all heads share.
        device: where the heads are.
    """

    def __init__(
        self, settings: Sequence[Setting], num_classes: int, width: int, seed: int, device: torch.device
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
        self.steps = 0

    def logits(self, features: Tensor) -> Tensor:
        """[B, D] -> [H, B, C]."""
        heads, classes, width = self.weight.shape
        flat = features @ self.weight.view(heads * classes, width).T
        return flat.view(-1, heads, classes).transpose(0, 1) + self.bias[:, None]

    def step(self, features: Tensor, labels: Tensor, rate: float) -> None:
        """One step of every head at ``rate`` times its learning rate."""
        logits = self.logits(features)
        heads, rows, classes = logits.shape
        # The gradient of cross entropy with smoothed labels, by hand: softmax minus target.
        uniform = (self.smoothing / classes)[:, None, None].expand(heads, rows, classes)
        target = uniform + (1 - self.smoothing)[:, None, None] * functional.one_hot(labels, classes)
        error = (logits.softmax(dim=2) - target) / rows  # [H, B, C]
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

    def scores(self, features: FeatureMatrix, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Accuracy and mean cross entropy of each head -> [H], [H]."""
        right, loss = torch.zeros_like(self.lr), torch.zeros_like(self.lr)
        rows_at_once = max(1, ROWS_AT_ONCE // len(self.lr))
        for block, truth in _blocks(features, labels, rows_at_once):
            logits = self.logits(block)
            right += (logits.argmax(dim=2) == truth).sum(dim=1)
            loss -= logits.log_softmax(dim=2)[:, torch.arange(len(truth)), truth].sum(dim=1)
        return right / len(labels), loss / len(labels)

    def head(self, number: int) -> Head:
        """A copy of one head as it is now."""
        return Head(self.weight[number].clone(), self.bias[number].clone())


def _blocks(features: FeatureMatrix, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Features and labels, a block at a time, on the features' device."""
    for block, truth in zip(features.blocks(size), torch.split(labels, size), strict=True):
        yield block, truth.to(block.device)


@dataclass(frozen=True)
class Scored:
    """A head and its validation.

    Attributes:
        head: as it was at its best.
        acc: of validation.
        loss: of validation, unsmoothed.
        epoch: in which the loss was lowest, from 0.
    """

    head: Head
    acc: float
    loss: float
    epoch: int = 0


@torch.no_grad()
def train_bank(
    settings: Sequence[Setting],
    views: Sequence[FeatureMatrix],
    labels: Tensor,
    val: tuple[FeatureMatrix, Tensor],
    num_classes: int,
    epochs: int,
    batch_size: int,
    warmup: float,
    seed: int,
    advance: Callable[[int], None] = lambda images: None,
    keep_last: bool = False,
) -> list[Scored]:
    """Trains a head a setting, as ``train`` would train each alone, and keeps each at its lowest validation loss.

    Args:
        settings: one a head.
        views: of the training images; an epoch takes one.
        labels: of the training images, [N].
        val: features and labels that choose the epoch.
        num_classes: of the labels.
        epochs: to train.
        batch_size: images a step.
        warmup: share of the steps in which the learning rate rises.
        seed: of the initial values and of the order.
        advance: told the images done.
        keep_last: keep each head as it ends, for data that must not choose the epoch too.
    """
    epoch = 0
    loader = FeatureLoader(views, labels, EpochOrder(len(labels), batch_size, seed, lambda: epoch))
    sample = views[0].gather(torch.arange(1))
    bank = Bank(settings, num_classes, sample.shape[1], seed, sample.device)
    steps = len(loader) * epochs
    best: list[Scored | None] = [None] * len(settings)
    for epoch in range(epochs):
        for features, truth in loader:
            bank.step(features, truth.to(features.device), warmup_cosine(bank.steps, round(steps * warmup), steps))
            advance(len(truth))
        for number, (acc, loss) in enumerate(zip(*(score.tolist() for score in bank.scores(*val)), strict=True)):
            before = best[number]
            if before is None or keep_last or loss < before.loss:
                best[number] = Scored(bank.head(number), acc, loss, epoch)
    return [scored for scored in best if scored is not None]


def fit_exact(
    features: FeatureMatrix,
    labels: Tensor,
    num_classes: int,
    strength: float,
    start: Head | None = None,
    tolerance: float = TOLERANCE,
) -> Head:
    """The minimum of mean cross entropy + strength / 2 * |weight|^2, by full-batch L-BFGS.

    It is scikit-learn's ``LogisticRegression(C=1 / (strength * N))``. The objective is convex, so the minimum is one.

    Args:
        features: of N images.
        labels: [N].
        num_classes: of the labels.
        strength: of the L2 penalty, above 0; the bias is not penalised.
        start: where to start; None: at zero.
        tolerance: the largest gradient, of the mean loss, at which it is the minimum.
    """
    sample = features.gather(torch.arange(1))
    weight = start.weight.clone() if start else sample.new_zeros(num_classes, sample.shape[1])
    bias = start.bias.clone() if start else sample.new_zeros(num_classes)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=1000,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty: Tensor = strength / 2 * weight.square().sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        total = penalty.detach()
        for block, truth in _blocks(features, labels, ROWS_AT_ONCE):
            logits = functional.linear(block, weight, bias)
            loss = functional.cross_entropy(logits, truth, reduction="sum") / len(labels)
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Head(weight.detach(), bias.detach())


@torch.no_grad()
def score(head: Head, features: FeatureMatrix, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross entropy of a head."""
    right, loss = 0.0, 0.0
    for block, truth in _blocks(features, labels, ROWS_AT_ONCE):
        logits = functional.linear(block, head.weight, head.bias)
        right += float((logits.argmax(dim=1) == truth).sum())
        loss += float(functional.cross_entropy(logits, truth, reduction="sum"))
    return right / len(labels), loss / len(labels)
