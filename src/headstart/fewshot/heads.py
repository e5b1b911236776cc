"""Heads that learn a task from its support: (support [B, N, K, D], query [B, N, Q, D]) -> logits [B, N * Q, N].

All are vectorised over the B tasks. What is meta-trained is an ``nn.Parameter``; a head without any needs no
meta-training.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional

HeadName = Literal["prototype", "ridge", "logistic", "anil", "projection"]
LOGISTIC_STEPS = 100


class Prototype(nn.Module):
    """The nearest class mean, by squared Euclidean distance or by cosine with a learnt scale.

    Snell et al., "Prototypical Networks for Few-shot Learning", NeurIPS 2017. Cosine: Chen et al., "Meta-Baseline",
    ICCV 2021. Centring and L2 (length 1): Wang et al., "SimpleShot", 2019; the centre is the support's mean.
    """

    def __init__(
        self, metric: Literal["euclidean", "cosine"] = "euclidean", centre: bool = False, l2: bool = False
    ) -> None:
        super().__init__()
        self.metric, self.centre, self.l2 = metric, centre, l2
        if metric == "cosine":
            self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        if self.centre:
            mean = support.mean(dim=(1, 2), keepdim=True)
            support, query = support - mean, query - mean
        if self.l2:
            support, query = functional.normalize(support, dim=-1), functional.normalize(query, dim=-1)
        prototypes, query = support.mean(dim=2), query.flatten(1, 2)
        if self.metric == "cosine":
            likeness = functional.normalize(query, dim=-1) @ functional.normalize(prototypes, dim=-1).mT
            scaled: Tensor = likeness * self.log_scale.exp()
            return scaled
        return -squared_distances(query, prototypes)


def squared_distances(query: Tensor, prototypes: Tensor) -> Tensor:
    """[B, M, D], [B, N, D] -> [B, M, N]."""
    cross = query @ prototypes.mT
    return query.square().sum(-1, keepdim=True) - 2 * cross + prototypes.square().sum(-1)[:, None]


class Ridge(nn.Module):
    """Ridge regression on one-hot labels, in closed form; its strength and its scale can be meta-trained.

    Bertinetto et al., "Meta-learning with differentiable closed-form solvers" (R2-D2), ICLR 2019. Features and labels
    are centred on the support, which is an intercept without a penalty. The dual has N * K unknowns. ``strength`` is in
    units of the mean squared length of the centred support.
    """

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.log_strength = nn.Parameter(torch.tensor(strength).log())
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        weight, bias = self.linear(support)
        return query.flatten(1, 2) @ weight.mT + bias[:, None]

    def linear(self, support: Tensor) -> tuple[Tensor, Tensor]:
        """The solution of each task as a linear head: weight [B, N, D], bias [B, N]."""
        batch, n_way, k_shot, _ = support.shape
        labels = torch.arange(n_way, device=support.device).repeat_interleave(k_shot)
        return self.solve(support.flatten(1, 2), functional.one_hot(labels, n_way).to(support).expand(batch, -1, -1))

    def solve(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [B, M, D] and one-hot labels [B, M, N] -> weight [B, N, D], bias [B, N]."""
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


class Logistic(nn.Module):
    """Logistic regression on features of length 1, as scikit-learn's ``LogisticRegression`` solves it.

    Tian et al., "Rethinking Few-Shot Image Classification: a Good Embedding Is All You Need?", ECCV 2020. ``c`` is
    scikit-learn's C, the inverse strength of the L2 penalty; the intercept has none.
    """

    def __init__(self, c: float = 1.0) -> None:
        super().__init__()
        self.c = c

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        support, query = functional.normalize(support, dim=-1), functional.normalize(query, dim=-1)
        n_way, k_shot = support.shape[1:3]
        labels = torch.arange(n_way, device=support.device).repeat_interleave(k_shot)
        coefficients, bias = fit_logistic(support.flatten(1, 2), labels, n_way, self.c)
        # The weight is in the span of the support, so the Gram matrix suffices.
        return query.flatten(1, 2) @ support.flatten(1, 2).mT @ coefficients + bias[:, None]


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
    MAML (Finn et al., ICML 2017) whose inner loop changes the head alone. Features are centred on the support, whose
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


class Projection(nn.Module):
    """A linear map of the features, meta-trained with the prototype loss; it starts as the identity.

    The loss is Snell et al.'s ("Prototypical Networks", NeurIPS 2017), on squared distances between features that are
    divided by their mean length over the support, with a learnt scale.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.map.weight)
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        length = support.norm(dim=-1).mean(dim=(1, 2))[:, None, None]
        prototypes = self.map(support.mean(dim=2)) / length
        distances = squared_distances(self.map(query.flatten(1, 2)) / length, prototypes)
        return -distances * self.log_scale.exp()


# To add a head, write a class whose arguments are among MetaLearner's, and add a line here.
HEADS: dict[HeadName, Callable[..., nn.Module]] = {
    "prototype": Prototype,
    "ridge": Ridge,
    "logistic": Logistic,
    "anil": Anil,
    "projection": Projection,
}


def make_head(name: HeadName, n_way: int, width: int, **options: Any) -> nn.Module:
    """Makes the named head, before meta-training; options of ``MetaLearner`` that it does not have are ignored."""
    options |= {"n_way": n_way, "width": width}
    own = inspect.signature(HEADS[name]).parameters
    return HEADS[name](**{option: value for option, value in options.items() if option in own})


def learnt(head: nn.Module, classes: Sequence[Tensor]) -> Linear:
    """What a prototype or ridge head learns from one task, as a linear head: weight [N, D] and bias [N].

    ``classes`` are the features of each class's examples, [K, D] each. A prototype must be euclidean and without L2:
    its distances then differ from a linear function by a term that all classes share.
    """
    if isinstance(head, Ridge):
        labels = torch.tensor([label for label, rows in enumerate(classes) for _ in rows])
        target = functional.one_hot(labels, len(classes)).to(classes[0])
        weight, bias = head.solve(torch.cat(list(classes))[None], target[None])
        return weight[0], bias[0]
    assert isinstance(head, Prototype)
    assert head.metric == "euclidean"
    assert not head.l2
    prototypes = torch.stack([rows.mean(dim=0) for rows in classes])
    # Distances are invariant to translation, so centring changes nothing here.
    return 2 * prototypes, -prototypes.square().sum(dim=1)
