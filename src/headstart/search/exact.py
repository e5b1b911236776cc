"""The exact optimum of a linear head on a feature matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.features.matrix import Labelled
from headstart.model.heads import as_linear
from headstart.model.multilabel import task_of
from headstart.search.bank import ROWS_AT_ONCE, TrainedHead, logits_of, score_and_loss

# L2 penalties of standardised features, from strong to weak: each fit starts from the previous one.
PENALTIES = [10.0 ** (-power / 2) for power in range(9)]
TOLERANCE = 5e-5  # scikit-learn's default is 1e-4
UNLIMITED = 10**9

# The place of a head among others from its validation logits [N, C] and labels [N]: the lowest is the best.
# The second number is a loss: it decides between equals and ends the search for a penalty.
Rank = Callable[[Tensor, Tensor], tuple[float, float]]


class TooManyPasses(Exception):
    """The fits would take more passes over the matrix than allowed."""


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of each training feature, [D] each; constant features have deviation 1."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, train: Labelled) -> "Scale":
        """Reads the matrix twice."""
        zero = torch.zeros_like(train.sample()[0])
        mean = sum((block.sum(dim=0) for block, _ in train.blocks(ROWS_AT_ONCE)), zero) / len(train)
        squares = ((block - mean).square().sum(dim=0) for block, _ in train.blocks(ROWS_AT_ONCE))
        deviation = (sum(squares, zero) / len(train)).sqrt()
        return cls(mean, deviation.where(deviation > 1e-6 * (1 + mean.abs()), torch.ones_like(mean)))

    def fold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [C, D] and bias [C] for features as they are, from those for standardised features."""
        weight = weight / self.deviation
        return weight, bias - weight @ self.mean


def fit_exact(train: Labelled, num_classes: int, l2: float, tolerance: float = TOLERANCE) -> nn.Linear:
    """Minimizes mean cross entropy, summed over several labels, + l2 / 2 * |weight|^2 by full-batch L-BFGS.

    Equivalent to scikit-learn's ``LogisticRegression(C=1 / (l2 * N))``; the bias has no penalty. The objective is
    convex; the fit stops where no gradient entry exceeds ``tolerance`` in absolute value.
    """
    weight, bias = _zeros(train, num_classes)
    _minimize(train, weight, bias, l2, tolerance)
    return as_linear(weight, bias)


def by_loss(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Ranks by cross entropy."""
    loss = float(task_of(labels).losses(logits, labels).mean())
    return loss, loss


def best_exact(
    train: Labelled,
    val: Labelled,
    num_classes: int,
    weights: Tensor | None = None,
    rank: Rank = by_loss,
    tolerance: float = TOLERANCE,
    passes: int = UNLIMITED,
    of_images: Tensor | None = None,
) -> tuple[float, TrainedHead]:
    """The L2 penalty of standardised features that validates best, and the optimum, for features as they are.

    Weaker and weaker penalties are tried until the validation loss rises. ``weights`` are those of the classes, [C], or
    ``of_images``, [N].

    Raises:
        TooManyPasses: it takes more than ``passes`` passes over the training images.
    """
    scale, (weight, bias) = Scale.of(train), _zeros(train, num_classes)
    found: list[tuple[tuple[float, float], float, nn.Linear]] = []
    for l2 in PENALTIES:
        passes -= _minimize(train, weight, bias, l2, tolerance, scale, weights, passes, of_images)
        if passes <= 0:
            raise TooManyPasses
        head = as_linear(*scale.fold(weight, bias))
        found.append((rank(logits_of(head, val), val.labels), l2, head))
        if len(found) > 1 and found[-1][0][1] > found[-2][0][1]:
            break
    _, l2, head = min(found, key=lambda each: each[0])
    return l2, TrainedHead(head, *score_and_loss(head, val))


def _zeros(train: Labelled, num_classes: int) -> tuple[Tensor, Tensor]:
    sample = train.sample()
    return sample.new_zeros(num_classes, sample.shape[1]), sample.new_zeros(num_classes)


def _minimize(
    train: Labelled,
    weight: Tensor,
    bias: Tensor,
    l2: float,
    tolerance: float,
    scale: Scale | None = None,
    weights: Tensor | None = None,
    passes: int = UNLIMITED,
    of_images: Tensor | None = None,
) -> int:
    """Moves weight [C, D] and bias [C] to the optimum; returns the passes taken, at least ``passes`` if it gave up."""
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=1000,
        max_eval=passes,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    task, device = task_of(train.labels), weight.device
    share_of = task.shares(train.labels, weights) if of_images is None else of_images / of_images.sum()
    shares = torch.split(share_of * task.problems(train.labels), ROWS_AT_ONCE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty: Tensor = l2 / 2 * weight.square().sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        total = penalty.detach()
        for (block, truth), share in zip(train.blocks(ROWS_AT_ONCE), shares, strict=True):
            logits = functional.linear(block, *(scale.fold(weight, bias) if scale else parameters))
            loss = (task.losses(logits, truth, weights) * share.to(device)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    taken: int = optimizer.state[weight]["func_evals"]
    for parameter in parameters:
        parameter.requires_grad_(False)
    return taken


def predicted(head: nn.Linear, labelled: Labelled) -> Tensor:
    """The predicted label of each image, [N]."""
    return logits_of(head, labelled).argmax(dim=1)
