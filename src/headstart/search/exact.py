"""The exact optimum of a linear head on a feature matrix."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.features.matrix import Labelled
from headstart.model.heads import as_linear
from headstart.search.bank import ROWS_AT_ONCE, TrainedHead

# L2 penalties, from strong to weak: each fit starts from the previous one.
PENALTIES = [10.0**-power for power in range(7)]
TOLERANCE = 5e-5  # scikit-learn's default is 1e-4


def fit_exact(
    train: Labelled,
    num_classes: int,
    l2: float,
    start: nn.Linear | None = None,
    tolerance: float = TOLERANCE,
    weights: Tensor | None = None,
) -> nn.Linear:
    """Minimizes mean cross entropy + l2 / 2 * |weight|^2 by full-batch L-BFGS; ``weights`` are of the images, [N].

    Equivalent to scikit-learn's ``LogisticRegression(C=1 / (l2 * N))``; the bias has no penalty. The objective is
    convex; the fit stops where no gradient entry exceeds ``tolerance`` in absolute value. Without ``start`` it starts
    at zero.
    """
    sample = train.sample()
    weight = start.weight.detach().clone() if start else sample.new_zeros(num_classes, sample.shape[1])
    bias = start.bias.detach().clone() if start else sample.new_zeros(num_classes)
    optimizer = torch.optim.LBFGS(
        [weight.requires_grad_(), bias.requires_grad_()],
        max_iter=1000,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    weights = torch.ones(len(train)) if weights is None else weights
    shares = torch.split(weights / weights.sum(), ROWS_AT_ONCE)

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty: Tensor = l2 / 2 * weight.square().sum()
        penalty.backward()  # type: ignore[no-untyped-call]
        total = penalty.detach()
        for (block, truth), share in zip(train.blocks(ROWS_AT_ONCE), shares, strict=True):
            logits = functional.linear(block, weight, bias)
            loss = (functional.cross_entropy(logits, truth, reduction="none") * share.to(block.device)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        return total

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return as_linear(weight.detach(), bias.detach())


def best_exact(
    train: Labelled, val: Labelled, num_classes: int, weights: Tensor | None = None
) -> tuple[float, TrainedHead]:
    """The penalty with the best validation, and the exact optimum at it; ``weights`` are of the training images."""
    head: nn.Linear | None = None
    found = []
    for l2 in PENALTIES:
        head = fit_exact(train, num_classes, l2, head, weights=weights)
        found.append((l2, TrainedHead(head, *accuracy_and_loss(head, val))))
    return min(found, key=lambda pair: pair[1].rank)


@torch.no_grad()
def accuracy_and_loss(head: nn.Linear, labelled: Labelled) -> tuple[float, float]:
    """Accuracy and mean cross entropy of a head."""
    right, loss = 0.0, 0.0
    for block, truth in labelled.blocks(ROWS_AT_ONCE):
        logits = head(block)
        right += float((logits.argmax(dim=1) == truth).sum())
        loss += float(functional.cross_entropy(logits, truth, reduction="sum"))
    return right / len(labelled), loss / len(labelled)


@torch.no_grad()
def predicted(head: nn.Linear, labelled: Labelled) -> Tensor:
    """The predicted label of each image, [N]."""
    return torch.cat([head(block).argmax(dim=1).cpu() for block, _ in labelled.blocks(ROWS_AT_ONCE)])
