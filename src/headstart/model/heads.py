"""Heads: modules that map features [B, width] to logits [B, num_classes].

To add a head, write a class with the arguments width and num_classes, and a line in ``HEADS`` for ``--model.head``.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from headstart.errors import UserError


class MLP(nn.Module):
    """A multilayer perceptron with one hidden layer and ReLU."""

    def __init__(self, width: int, num_classes: int, hidden: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.out(self.hidden(features).relu())
        return logits


class Cosine(nn.Module):
    """Cosine similarity to a learned vector per class, times a learned scale.

    Gidaris and Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018.
    """

    def __init__(self, width: int, num_classes: int, scale: float = 10.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)  # as in nn.Linear
        self.log_scale = nn.Parameter(torch.tensor(scale).log())

    def forward(self, features: Tensor) -> Tensor:
        likeness = functional.linear(functional.normalize(features), functional.normalize(self.weight))
        return likeness * self.log_scale.exp()


class Unit(nn.Module):
    """A linear map of features that are centred on a fixed point, and then divided by their length."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.centre: Tensor
        self.register_buffer("centre", torch.zeros(width))
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(functional.normalize(features - self.centre))
        return logits


HEADS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "mlp": MLP,
    "cosine": Cosine,
    "unit": Unit,
}


def make_head(name: str, width: int, num_classes: int) -> nn.Module:
    """Creates a head by its name in ``HEADS``.

    Raises:
        UserError: no such head.
    """
    if name not in HEADS:
        raise UserError(f"--model.head={name}: no such head; choose from {', '.join(HEADS)}")
    return HEADS[name](width, num_classes)


def linear_head(head: nn.Module) -> nn.Linear:
    """Returns the head if it is linear, else raises ``UserError``."""
    if not isinstance(head, nn.Linear):
        raise UserError(f"this needs --model.head=linear, but the checkpoint has a {type(head).__name__}")
    return head


def as_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear head with weight [num_classes, D] and bias [num_classes]; draws no random numbers."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    head.weight, head.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return head


def class_weights(given: str | Mapping[str, float], names: Sequence[str], balanced: Tensor) -> Tensor | None:
    """The weight of each class in a loss, [num_classes]: those that are ``balanced``, or by name, else 1."""
    if isinstance(given, str):
        return None if given == "none" else balanced
    return torch.tensor([given.get(name, 1.0) for name in names], device=balanced.device)


def check_classes(names: Sequence[str], weights: str | Mapping[str, float]) -> None:
    """Raises ``UserError`` for a repeated name, and for a weight that belongs to no class or is not positive."""
    if len(set(names)) < len(names):
        raise UserError(f"class_names: {len(names)} names, only {len(set(names))} distinct")
    for name, weight in weights.items() if isinstance(weights, Mapping) else []:
        if name not in names:
            near = ", ".join(difflib.get_close_matches(name, names) or names[:5])
            raise UserError(f"--model.class_weights: {name}: no such class; the nearest names are {near}")
        if not weight > 0:
            raise UserError(f"--model.class_weights: {name}: {weight}: must be a number >0")
