"""The nearest rows of a matrix, and the k-NN head: needs no training, and shows whether the features suit the data."""

import torch
from torch import Tensor
from torch.nn import functional

from headstart.features.matrix import FeatureMatrix, Labelled

ROWS_AT_ONCE = 2048
KS = (1, 3, 5, 10, 20, 50)


def knn_scores(train: Labelled, val: Labelled, test: Labelled | None, num_classes: int) -> dict[str, float]:
    """The number of neighbours ``k`` with the best validation accuracy, and the accuracies at it.

    A training image votes for its class, weighted by its similarity; of equally good values of k, the smallest is used.
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


def nearest(queries: Tensor, matrix: FeatureMatrix, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of a matrix nearest to each query [Q, D], by cosine of features centred on the matrix's mean.

    Similarities [Q, k], nearest first, and row numbers [Q, k].
    """
    sums = [block.sum(dim=0, dtype=torch.float64) for block in matrix.blocks(ROWS_AT_ONCE)]
    mean = (torch.stack(sums).sum(dim=0) / len(matrix)).to(queries)
    unit = functional.normalize(queries - mean, dim=1)
    best, rows, start = unit.new_empty(len(unit), 0), torch.empty(len(unit), 0, dtype=torch.long), 0
    for block in matrix.blocks(ROWS_AT_ONCE):
        found = unit @ functional.normalize(block.to(mean) - mean, dim=1).T
        numbers = torch.arange(start, start + len(block)).expand(len(unit), -1)
        both = torch.cat([best, found], dim=1)
        best, places = both.topk(min(k, both.shape[1]), dim=1)
        rows, start = torch.cat([rows, numbers], dim=1).gather(1, places.cpu()), start + len(block)
    return best.cpu(), rows
