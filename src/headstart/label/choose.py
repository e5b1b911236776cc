"""Which unlabelled images to label next."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from headstart.errors import UserError
from headstart.features.matrix import Labelled
from headstart.search.exact import fit_exact

NEIGHBOURS, MAX_CLUSTERS, SMALL = 20, 500, 5  # as in TypiClust
SAMPLE, PER_SAMPLE = 4096, 1024  # images compared with one another at once, and the most that are chosen among them
STRENGTH = 0.1  # L2 penalty of the head fitted to the labels, times their number


def choose(features: Tensor, labels: Tensor, count: int, seed: int, head: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The rows [count] of features [N, D] to label next, most useful first; labels [N] are -1 where unknown.

    Without two labelled classes or a head (features -> probabilities) the most typical, else the uncertain and diverse.
    """
    unit, known = nn.functional.normalize(features - features.mean(dim=0), dim=1), labels >= 0
    if head is None and len(set(labels[known].tolist())) < 2:
        return typical(unit, known, count, seed)
    best = (head(features) if head else _probabilities(unit, labels)).topk(2, dim=1).values
    return uncertain_and_diverse(unit, known, 1 - (best[:, 0] - best[:, 1]), count, seed)


def typical(unit: Tensor, known: Tensor, count: int, seed: int) -> Tensor:
    """The most typical image of each cluster of unit rows [N, D], starting with large clusters without a known image.

    TypiClust: Hacohen, Dekel and Weinshall, "Active Learning on a Budget", ICML 2022. An image is typical if it is
    similar to its nearest neighbours in the cluster.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise UserError("next: needs scikit-learn: pip install -e '.[label]'") from error
    clusters = min(int(known.sum()) + count, MAX_CLUSTERS, len(unit))
    means = MiniBatchKMeans(clusters, n_init=3, batch_size=4096, random_state=seed)
    cluster = torch.from_numpy(means.fit_predict(unit.numpy())).long()
    generator, ranked = torch.Generator().manual_seed(seed), list[tuple[tuple[bool, int, int], list[int]]]()
    for number in range(clusters):
        members = (cluster == number).nonzero()[:, 0]
        rows = members[torch.randperm(len(members), generator=generator)[:SAMPLE]]
        rows = rows[_typicality(unit[rows]).argsort(descending=True)]
        rank = len(members) < SMALL, int(known[members].sum()), -len(members)
        ranked.append((rank, rows[~known[rows]].tolist()))
    rounds = itertools.zip_longest(*(rows for _, rows in sorted(ranked, key=lambda pair: pair[0])))
    return torch.tensor([row for taken in rounds for row in taken if row is not None][:count])


def _typicality(unit: Tensor) -> Tensor:
    """The mean similarity of each row to its nearest other rows, [N]."""
    near = [(block @ unit.T).topk(min(NEIGHBOURS + 1, len(unit))).values[:, 1:] for block in torch.split(unit, 1024)]
    return torch.cat(near).mean(dim=1)


def _probabilities(unit: Tensor, labels: Tensor) -> Tensor:
    """The probabilities of each row by a head fitted to the known labels."""
    known = labels >= 0
    head = fit_exact(Labelled.of(unit[known], labels[known]), int(labels.max()) + 1, STRENGTH / int(known.sum()))
    found: Tensor = head(unit).softmax(dim=1).detach()
    return found


def uncertain_and_diverse(unit: Tensor, known: Tensor, doubt: Tensor, count: int, seed: int) -> Tensor:
    """Greedily chooses the image that most improves how well all images are covered, weighted by their doubt [N].

    An image is covered by its nearest chosen or known image, by squared similarity: facility location, see
    Wei, Iyer and Bilmes, "Submodularity in Data Subset Selection and Active Learning", ICML 2015. Among more than
    ``SAMPLE`` images it chooses from random samples.
    """
    generator, known, chosen = torch.Generator().manual_seed(seed), known.clone(), list[int]()
    while len(chosen) < count and not known.all():
        unknown = (~known).nonzero()[:, 0]
        rows = unknown[torch.randperm(len(unknown), generator=generator)[:SAMPLE]]
        similar = _similarities(unit[rows], unit[rows])
        covered = _similarities(unit[rows], unit[known]).amax(dim=1) if known.any() else torch.zeros(len(rows))
        for _ in range(min(PER_SAMPLE, count - len(chosen), len(rows))):
            gain = (similar - covered[:, None]).clamp_(min=0).mul_(doubt[rows, None]).sum(dim=0)
            gain[known[rows]] = -1
            best = int(gain.argmax())
            covered = covered.maximum(similar[:, best])
            known[rows[best]] = True
            chosen.append(int(rows[best]))
    return torch.tensor(chosen)


def _similarities(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.T).clamp_(min=0).square_()
