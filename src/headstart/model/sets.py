"""Sets of classes that contain the true one as often as promised: split conformal prediction."""

import math

from torch import Tensor

PROMISED = 0.9  # for the scores in a run's result


def true_probabilities(probabilities: Tensor, labels: Tensor) -> Tensor:
    """The probability of each image's true class, ascending, [N] float32: from probabilities [N, C], labels [N]."""
    return probabilities.gather(1, labels[:, None])[:, 0].float().sort().values.cpu()


def images_needed(coverage: float) -> int:
    """The smallest number of validation images for which a set smaller than all classes can be promised."""
    return math.ceil(coverage / (1 - coverage) - 1e-9)


def threshold(validation: Tensor, coverage: float) -> float:
    """The probability from which on a class is in the set, from ``true_probabilities`` of N >= ``images_needed``.

    With the score 1 - p, the threshold is its ceil((N + 1) coverage)-th smallest value: Vovk et al., "Algorithmic
    Learning in a Random World", 2005; the sets of this score are the smallest on average: Sadinle et al., "Least
    Ambiguous Set-Valued Classifiers with Bounded Error Levels", JASA 2019.
    """
    rank = math.ceil((len(validation) + 1) * coverage - 1e-9)
    return float(validation[len(validation) - rank])


def sets_of(probabilities: Tensor, least: float) -> Tensor:
    """Whether each class is in each image's set, [N, C] bool; the most probable class always is, so none is empty."""
    return (probabilities >= least) | (probabilities >= probabilities.amax(dim=1, keepdim=True))


def set_scores(validation: Tensor, probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """The share of sets that hold the truth, and their mean size; empty if there are too few validation images.

    ``validation``: ``true_probabilities`` of the validation images; the others, [N, C] and [N], are those of the test.
    """
    if len(validation) < images_needed(PROMISED):
        return {}
    sets = sets_of(probabilities, threshold(validation, PROMISED))
    held, size = sets.gather(1, labels[:, None]).float().mean(), sets.sum(dim=1).float().mean()
    return {"test/coverage_90": float(held), "test/set_size_90": float(size)}
