"""Heads that learn a task from its support: (support [B, N, K, D], query [B, N, Q, D]) -> logits [B, N * Q, N].

All are vectorised over the B tasks. Whatever is meta-trained is an ``nn.Parameter``; a head without any needs no
meta-training. What a ``TaskHead`` learns is linear in its prepared features, so it can be saved.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

from headstart.model.heads import Unit, as_linear

HeadName = Literal["prototype", "ridge", "logistic", "anil", "projection"]
LOGISTIC_STEPS = 100


class TaskHead(nn.Module):
    """Learns tasks by ``solve``, from features centred on the support's mean and divided by their length, if so told.

    Centring and length 1 (L2): Wang et al., "SimpleShot", 2019.
    """

    strengths: tuple[float, ...] = ()  # to choose from by leaving one out

    def __init__(self, centre: bool, l2: bool) -> None:
        super().__init__()
        self.centre, self.l2 = centre, l2

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        if self.centre:
            mean = support.mean(dim=(1, 2), keepdim=True)
            support, query = support - mean, query - mean
        if self.l2:
            support, query = functional.normalize(support, dim=-1), functional.normalize(query, dim=-1)
        return self.logits(support, query)

    def logits(self, support: Tensor, query: Tensor) -> Tensor:
        """Prepared support [B, N, K, D] and query [B, N, Q, D] -> logits [B, N * Q, N]."""
        batch, n_way, k_shot, _ = support.shape
        labels = torch.arange(n_way, device=support.device).repeat_interleave(k_shot)
        target = functional.one_hot(labels, n_way).to(support).expand(batch, -1, -1)
        weight, bias = self.solve(support.flatten(1, 2), target)
        return query.flatten(1, 2) @ weight.mT + bias[:, None]

    def solve(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Prepared rows [B, M, D] and one-hot labels [B, M, N] -> weight [B, N, D], bias [B, N]."""
        raise NotImplementedError

    def set_strength(self, strength: float | None) -> None:
        """Takes one of ``strengths``; None: keeps its own."""


class Prototype(TaskHead):
    """The nearest class mean, by squared Euclidean distance or by cosine with a learnt scale.

    Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017. Cosine: Chen et al., "Meta-Baseline",
    ICCV 2021.
    """

    def __init__(
        self, metric: Literal["euclidean", "cosine"] = "euclidean", centre: bool = False, l2: bool = False
    ) -> None:
        super().__init__(centre, l2)
        self.metric = metric
        if metric == "cosine":
            self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def logits(self, support: Tensor, query: Tensor) -> Tensor:
        prototypes, query = support.mean(dim=2), query.flatten(1, 2)
        if self.metric == "cosine":
            likeness = functional.normalize(query, dim=-1) @ functional.normalize(prototypes, dim=-1).mT
            scaled: Tensor = likeness * self.log_scale.exp()
            return scaled
        return -squared_distances(query, prototypes)

    def solve(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        means = class_means(rows, target)
        if self.metric == "cosine":  # of queries of length 1
            return functional.normalize(means, dim=-1) * self.log_scale.exp(), torch.zeros_like(means[..., 0])
        return 2 * means, -means.square().sum(dim=-1)


def class_means(rows: Tensor, target: Tensor) -> Tensor:
    """Rows [B, M, D] and one-hot labels [B, M, N] -> [B, N, D]."""
    return (target / target.sum(dim=1, keepdim=True)).mT @ rows


def squared_distances(query: Tensor, prototypes: Tensor) -> Tensor:
    """[B, M, D], [B, N, D] -> [B, M, N]."""
    cross = query @ prototypes.mT
    return query.square().sum(-1, keepdim=True) - 2 * cross + prototypes.square().sum(-1)[:, None]


class Ridge(TaskHead):
    """Ridge regression on one-hot labels, in closed form; its strength and its scale can be meta-trained.

    Bertinetto et al., "Meta-learning with differentiable closed-form solvers" (R2-D2), ICLR 2019. Features and labels
    are centred on the support, which is an intercept without a penalty. The dual has N * K unknowns. ``strength`` is in
    units of the mean squared length of the centred support.
    """

    strengths = tuple(10 ** (power / 2) for power in range(4, -7, -1))

    def __init__(self, strength: float = 1.0, centre: bool = False, l2: bool = False) -> None:
        super().__init__(centre, l2)
        self.log_strength = nn.Parameter(torch.tensor(strength).log())
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    @torch.no_grad()
    def set_strength(self, strength: float | None) -> None:
        if strength is not None:
            self.log_strength.fill_(math.log(strength))

    def solve(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        mean, share = rows.mean(dim=1, keepdim=True), target.mean(dim=1, keepdim=True)
        centred = rows - mean
        strength = self.log_strength.exp() * centred.square().sum(-1).mean(-1)
        scale = self.log_scale.exp()
        weight = ridge_dual(centred, target - share, strength) * scale
        return weight, share[:, 0] * scale - (weight @ mean.mT)[..., 0]


def ridge_dual(rows: Tensor, target: Tensor, strength: Tensor) -> Tensor:
    """The W that minimises |rows W^T - target|^2 + strength |W|^2: [B, M, D], [B, M, N], [B] -> [B, N, D]."""
    eye = torch.eye(rows.shape[1], device=rows.device, dtype=rows.dtype)
    gram = rows @ rows.mT + strength[:, None, None] * eye
    weight: Tensor = torch.linalg.solve(gram, target).mT @ rows
    return weight


class Logistic(TaskHead):
    """Logistic regression, on features of length 1 by default, as scikit-learn's ``LogisticRegression`` solves it.

    Tian et al., "Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?", ECCV 2020. ``c`` is
    scikit-learn's C, the inverse strength of the L2 penalty; the intercept has none.
    """

    strengths = tuple(10 ** (power / 2) for power in range(-6, 5))

    def __init__(self, c: float = 1.0, centre: bool = False, l2: bool = True) -> None:
        super().__init__(centre, l2)
        self.c = c

    def set_strength(self, strength: float | None) -> None:
        self.c = self.c if strength is None else strength

    def solve(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        mean = rows.mean(dim=1, keepdim=True)  # since the intercept has no penalty, the solution is the same
        coefficients, bias = fit_logistic(rows - mean, target[0].argmax(dim=1), target.shape[2], self.c)
        weight = coefficients.mT @ (rows - mean)
        return weight, bias - (weight @ mean.mT)[..., 0]


def fit_logistic(rows: Tensor, labels: Tensor, n_way: int, c: float) -> tuple[Tensor, Tensor]:
    """Minimises sum of cross entropies + |W|^2 / (2 c) for W = coefficients^T rows, by Nesterov's method.

    Nesterov, "Introductory Lectures on Convex Optimization", 2004, section 2.2, with the step 1 / L of each task.
    Rows [B, M, D] and labels [M] -> coefficients [B, M, N] and bias [B, N].
    """
    target = functional.one_hot(labels, n_way).to(rows.dtype)
    gram = rows @ rows.mT
    # An orthonormal basis of the span turns it into M features: rows = root @ basis.
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    bounded = torch.cat([root, torch.ones_like(root[..., :1])], dim=-1)  # the last feature is the intercept's
    penalty = torch.ones(bounded.shape[-1], 1, dtype=rows.dtype, device=rows.device) / c
    penalty[-1] = 0
    smoothness = 0.5 * torch.linalg.matrix_norm(bounded, ord=2).square()[:, None, None] + 1 / c
    weight = torch.zeros(len(rows), bounded.shape[-1], n_way, dtype=rows.dtype, device=rows.device)
    ahead, momentum = weight, 1.0
    for _ in range(LOGISTIC_STEPS):
        error = (bounded @ ahead).softmax(dim=-1) - target
        following = ahead - (bounded.mT @ error + penalty * ahead) / smoothness
        larger = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = following + (momentum - 1) / larger * (following - weight)
        weight, momentum = following, larger
    inverse = torch.where(values > 1e-6, values, torch.inf).rsqrt()
    return vectors * inverse[:, None] @ weight[:, :-1], weight[:, -1]


class Anil(nn.Module):
    """A linear head after a few gradient steps on the support; its initial weights and the step size are learnt.

    Raghu et al., "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML" (ANIL), ICLR 2020:
    MAML (Finn et al., ICML 2017) whose inner loop changes only the head. Features are centred on the support, whose
    common part would make the steps diverge, and divided by their length. ``inner_lr`` is the initial step size; with 0
    ``inner_steps`` the head keeps its initial weights; ``first_order`` leaves out the second derivatives.
    """

    def __init__(
        self, n_way: int, width: int, inner_lr: float = 10.0, inner_steps: int = 5, first_order: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_way, width))
        self.bias = nn.Parameter(torch.zeros(n_way))
        self.log_inner_lr = nn.Parameter(torch.tensor(inner_lr).log())
        self.inner_steps, self.first_order = inner_steps, first_order

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        mean = support.mean(dim=(1, 2), keepdim=True)
        support, query = functional.normalize(support - mean, dim=-1), functional.normalize(query - mean, dim=-1)
        n_way, k_shot = support.shape[1:3]
        labels = torch.arange(n_way, device=support.device).repeat_interleave(k_shot)
        learn = adaptation(self.inner_steps, self.first_order)
        start = (self.weight, self.bias)
        task = vmap(lambda rows: learn(start, rows, labels, self.log_inner_lr.exp()))
        weight, bias = task(support.flatten(1, 2))
        return query.flatten(1, 2) @ weight.mT + bias[:, None]


Linear = tuple[Tensor, Tensor]


def adaptation(steps: int, first_order: bool) -> Callable[[Linear, Tensor, Tensor, Tensor], Linear]:
    """A function (weight and bias, rows [M, D], labels [M], lr) -> weight and bias after gradient steps."""

    def loss(head: Linear, rows: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(functional.linear(rows, *head), labels)

    def learn(head: Linear, rows: Tensor, labels: Tensor, lr: Tensor) -> Linear:
        for _ in range(steps):
            gradients: Linear = grad(loss)(head, rows, labels)
            if first_order:
                gradients = (gradients[0].detach(), gradients[1].detach())
            head = (head[0] - lr * gradients[0], head[1] - lr * gradients[1])
        return head

    return learn


class Projection(TaskHead):
    """A linear map of the features, meta-trained with the prototype loss; it starts as the identity.

    The loss is Snell et al.'s ("Prototypical Networks", NeurIPS 2017), on squared distances between features that are
    divided by their mean length over the support, with a learnt scale.
    """

    def __init__(self, width: int, centre: bool = False, l2: bool = False) -> None:
        super().__init__(centre, l2)
        self.map = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.map.weight)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def logits(self, support: Tensor, query: Tensor) -> Tensor:
        length = support.norm(dim=-1).mean(dim=(1, 2))[:, None, None]
        prototypes = self.map(support.mean(dim=2)) / length
        distances = squared_distances(self.map(query.flatten(1, 2)) / length, prototypes)
        return -distances * self.log_scale.exp()

    def solve(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        scale = self.log_scale.exp() / rows.norm(dim=-1).mean(dim=1)[:, None, None].square()
        prototypes = self.map(class_means(rows, target))
        return 2 * scale * prototypes @ self.map.weight, -(scale * prototypes.square()).sum(dim=-1)


# To add a head, write a class whose arguments are among MetaLearner's, and add a line here.
HEADS: dict[HeadName, Callable[..., nn.Module]] = {
    "prototype": Prototype,
    "ridge": Ridge,
    "logistic": Logistic,
    "anil": Anil,
    "projection": Projection,
}


def make_head(name: HeadName, n_way: int, width: int, **options: Any) -> nn.Module:
    """Makes the named head, before meta-training; None and options that it does not have are ignored."""
    options |= {"n_way": n_way, "width": width}
    own = inspect.signature(HEADS[name]).parameters
    return HEADS[name](**{key: value for key, value in options.items() if key in own and value is not None})


def learnt(head: TaskHead, classes: Sequence[Tensor]) -> nn.Linear | Unit:
    """What the head learns from one task, for features as they are; ``classes`` are each class's examples, [K, D].

    Squared distances differ from a linear function by a term that all classes share.
    """
    centre = torch.stack([rows.mean(dim=0) for rows in classes]).mean(dim=0) * head.centre
    rows = torch.cat(list(classes)) - centre
    labels = torch.tensor([label for label, own in enumerate(classes) for _ in own])
    target = functional.one_hot(labels, len(classes)).to(rows)
    (weight,), (bias,) = head.solve((functional.normalize(rows) if head.l2 else rows)[None], target[None])
    if not (head.l2 or (isinstance(head, Prototype) and head.metric == "cosine")):
        return as_linear(weight, bias - weight @ centre)
    found = Unit(len(centre), len(classes))
    found.centre, found.linear = centre, as_linear(weight, bias)
    return found
