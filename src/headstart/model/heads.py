"""The heads: modules that map features [B, width] to logits [B, num_classes].

Another head is a class with these two arguments and a line in ``HEADS``; its name is an option, ``--model.head``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.errors import UserError


class MLP(nn.Module):
    """One hidden layer with ReLU."""

    def __init__(self, width: int, num_classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.out(self.hidden(features).relu())
        return logits


class Cosine(nn.Module):
    """Cosine similarity to a learnt vector per class, times a learnt scale.

    Gidaris and Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018.
    """

    def __init__(self, width: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as nn.Linear's
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def forward(self, features: Tensor) -> Tensor:
        likeness = functional.linear(functional.normalize(features), functional.normalize(self.weight))
        return likeness * self.log_scale.exp()


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "mlp": MLP,
    "cosine": Cosine,
}


def make_head(name: str, width: int, num_classes: int) -> nn.Module:
    """The head of that name.

    Raises:
        UserError: there is none.
    """
    if name not in HEADS:
        raise UserError(f"--model.head={name}: no such head; there are {', '.join(HEADS)}")
    return HEADS[name](width, num_classes)


def linear_head(head: nn.Module) -> nn.Linear:
    """The head, for what only a linear one can do; another kind is a ``UserError``."""
    if not isinstance(head, nn.Linear):
        raise UserError(f"this needs a linear head, and the checkpoint's is a {type(head).__name__}")
    return head


def as_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear head of weight [num_classes, D] and bias [num_classes]; draws no random numbers."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    head.weight, head.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return head
