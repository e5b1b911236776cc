"""Likely wrong labels, by out-of-fold probabilities."""

import torch
from torch import Tensor

from headstart.features.matrix import Labelled
from headstart.model.multilabel import MultiLabel
from headstart.search.exact import fit_exact
from headstart.terminal import images_bar

FOLDS, REPEATS = 5, 3
PENALTIES = (0.1, 0.03, 0.01, 0.003)
# With more images, the probabilities come from one round at one penalty.
MAX_IMAGES_REPEATED, DEFAULT_PENALTY = 10_000, 0.01
DOUBTED_SHARE = 0.05
TOLERANCE = 1e-3  # enough for probabilities that are averaged


def out_of_fold(features: Tensor, labels: Tensor, num_classes: int, groups: Tensor) -> Tensor:
    """Log probabilities [N, C] of each image, logits of several labels, by heads that were not trained on it.

    5-fold cross-validation of exact heads gives the L2 penalty with the lowest loss, and the 5 % of the images with the
    highest. Heads trained without those, averaged over 3 partitions, give the probabilities. The features [N, D] are
    rooted; images of one group share a fold.
    """
    features = features / features.square().mean().sqrt()
    everything = torch.ones(len(labels), dtype=torch.bool)
    large = len(labels) > MAX_IMAGES_REPEATED
    with images_bar("labels", (1 if large else len(PENALTIES) + REPEATS) * len(labels)) as advance:

        def one_round(l2: float, seed: int, kept: Tensor) -> Tensor:
            folds, found = _folds(labels, groups, seed), torch.zeros(len(labels), num_classes)
            for fold in range(FOLDS):
                inside, outside = (folds != fold) & kept, folds == fold
                head = fit_exact(Labelled.of(features[inside], labels[inside]), num_classes, l2, tolerance=TOLERANCE)
                logits = head(features[outside])
                found[outside] = logits if labels.ndim == 2 else logits.log_softmax(dim=1)
                advance(int(outside.sum()))
            return found

        if large:
            return one_round(DEFAULT_PENALTY, 0, everything)
        tried = {l2: one_round(l2, 0, everything) for l2 in PENALTIES}
        l2 = min(tried, key=lambda l2: float(losses(tried[l2], labels).mean()))
        kept = everything.clone()
        kept[losses(tried[l2], labels).argsort(descending=True)[: int(DOUBTED_SHARE * len(labels))]] = False
        return torch.stack([one_round(l2, seed, kept) for seed in range(REPEATS)]).mean(dim=0)


def losses(found: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each image, [N], from what ``out_of_fold`` gives; high where the label does not fit."""
    if labels.ndim == 2:
        return MultiLabel.losses(found, labels)
    return -found.gather(1, labels[:, None])[:, 0]


def _folds(labels: Tensor, groups: Tensor, seed: int) -> Tensor:
    """The fold of each image: groups stay together, and classes spread evenly, [N]."""
    leaders = (groups == torch.arange(len(groups))).nonzero()[:, 0]
    shuffled = leaders[torch.randperm(len(leaders), generator=torch.Generator().manual_seed(seed))]
    by_class = shuffled if labels.ndim == 2 else shuffled[labels[shuffled].argsort(stable=True)]
    folds = torch.zeros(len(labels), dtype=torch.long)
    folds[by_class] = torch.arange(len(by_class)) % FOLDS
    return folds[groups]
