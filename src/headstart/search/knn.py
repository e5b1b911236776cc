"""The k-NN head: needs no training, and shows whether the features fit."""

import torch

from headstart.features.matrix import Labelled
from headstart.search.neighbours import ROWS_AT_ONCE, nearest

KS = (1, 3, 5, 10, 20, 50)


def knn_scores(train: Labelled, val: Labelled, test: Labelled | None, num_classes: int) -> dict[str, float]:
    """The number of neighbours ``k`` with the best validation accuracy, and the accuracies at it.

    A training image votes for its class by its similarity; the smallest of equally good numbers is taken.
    """
    accuracies = _accuracies(train, val, KS, num_classes)
    k = max(KS, key=lambda k: accuracies[k])
    scores = {"k": k, "val/acc": accuracies[k]}
    return scores | ({"test/acc": _accuracies(train, test, (k,), num_classes)[k]} if test else {})


def _accuracies(train: Labelled, labelled: Labelled, ks: tuple[int, ...], num_classes: int) -> dict[int, float]:
    right = dict.fromkeys(ks, 0)
    for block, truth in labelled.blocks(ROWS_AT_ONCE):
        similarities, rows = (found.T[..., None] for found in nearest(block, train.views[0], max(ks)))
        votes = torch.zeros(len(truth), num_classes)
        for k, (similarity, row) in enumerate(zip(similarities, rows, strict=True), start=1):
            votes.scatter_add_(1, train.labels[row], similarity.clamp(min=0))
            if k in right:
                right[k] += int((votes.argmax(dim=1) == truth.cpu()).sum())
    return {k: hits / len(labelled) for k, hits in right.items()}
