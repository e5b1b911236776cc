"""Problems in a folder of images: damaged files, duplicates, likely wrong labels, outliers, small classes."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from headstart.audit.labels import FOLDS, losses, out_of_fold
from headstart.data.sources import Source
from headstart.data.splits import Item, counts_of
from headstart.search.neighbours import NEAR, neighbours

NEIGHBOURS = 5
# Robust standard deviations below the median similarity to the neighbours.
OUTLYING = 3.5
FEW_IMAGES = 20
LARGEST_GROUP = 10
KINDS = {
    "damaged": "cannot be read",
    "duplicate": "identical to others",
    "near-duplicate": "almost identical to others",
    "label": "labels to check, worst first",
    "outlier": "unlike all others",
    "small class": f"classes of fewer than {FEW_IMAGES} images",
}


@dataclass(frozen=True)
class Finding:
    """A likely problem."""

    kind: str  # a key of ``KINDS``
    path: str  # the image's path, or the name of a small class
    class_name: str  # the image's class
    split: str = ""  # the image's split in `train`
    note: str = ""  # the reason, or a suggestion
    score: float = 1.0  # larger: more certain; for near-duplicates, the similarity
    group: int = 0  # number of the group of duplicates; 0: none
    near: tuple[str, ...] = ()  # for a label to check, the paths of the most similar images


def find(source: Source, skipped: Mapping[str, str], items: Sequence[Item], features: Tensor) -> Iterator[Finding]:
    """Yields all findings, kind by kind, most certain first.

    ``skipped`` has the reasons for unreadable images, by path; ``features`` [N, D] are those of the others, ``rooted``.
    """
    names = source.class_names
    labels = source.labels_of(items)
    scanned = {item.path: item for item in source.scanned if item.path in skipped}
    for path, reason in skipped.items():
        yield Finding("damaged", path, scanned[path].named(names), note=reason)
    identical = _groups([item.digest for item in items])
    yield from _group_findings("duplicate", identical, items, names, [1.0] * len(items))
    found = neighbours(features, [item.digest for item in items], NEIGHBOURS, NEAR)
    near, isolation = near_groups(found.pairs, [item.digest for item in items]), isolations(found.similarities)
    yield from _group_findings("near-duplicate", near, items, names, found.similarities[:, 0].tolist())
    if len(torch.unique(labels, dim=0)) > 1 and len(items) >= 2 * FOLDS:
        together = [min(group) for group in _membership(near, identical, len(items))]
        logits = out_of_fold(features, labels, len(names), torch.tensor(together))
        doubts = _doubts_of_labels if source.multilabel else _label_findings
        yield from doubts(items, labels, logits, names, found.nearest)
    for number in isolation.argsort(descending=True).tolist():
        if isolation[number] > OUTLYING:
            item = items[number]
            score = float(isolation[number])
            note = f"{score:.1f} robust deviations below the usual similarity"
            yield Finding("outlier", item.path, item.named(names), item.split or "", note, score)
    counts = counts_of(labels, len(names)).tolist()
    for name, count in sorted(zip(names, counts, strict=True), key=lambda pair: pair[1]):
        if count < FEW_IMAGES:
            yield Finding("small class", name, name, note=f"{count} images", score=float(FEW_IMAGES - count))


def isolations(similarities: Tensor) -> Tensor:
    """Isolation of each image, [N]: robust deviations of its mean similarity to k neighbours below the median.

    Ramaswamy et al., "Efficient Algorithms for Mining Outliers from Large Data Sets", SIGMOD 2000.
    """
    mean = similarities.mean(dim=1)
    spread = 1.4826 * (mean - mean.median()).abs().median()
    return (mean.median() - mean) / spread.clamp(min=1e-6)


def near_groups(pairs: Tensor, digests: Sequence[bytes]) -> list[list[int]]:
    """Groups of positions connected by near-duplicate pairs [P, 2], without groups of identical files only."""
    from scipy.sparse import coo_array  # imported here, since scipy is slow to import
    from scipy.sparse.csgraph import connected_components

    ones, size = torch.ones(len(pairs)).numpy(), len(digests)
    _, component = connected_components(coo_array((ones, pairs.T.numpy()), shape=(size, size)), directed=False)
    groups: dict[int, list[int]] = defaultdict(list)
    for position, number in enumerate(component.tolist()):
        groups[number].append(position)
    return [group for group in groups.values() if len({digests[position] for position in group}) > 1]


def _label_findings(
    items: Sequence[Item], labels: Tensor, logits: Tensor, names: Sequence[str], nearest: Tensor
) -> Iterator[Finding]:
    """Yields images for which another class is at least as probable as on average for images of that class.

    Northcutt et al., "Confident Learning", JAIR 2021; ordered by the out-of-fold loss.
    """
    probabilities, doubt = logits.exp(), losses(logits, labels)
    own = probabilities.gather(1, labels[:, None])[:, 0]
    present = torch.bincount(labels, minlength=len(names))
    usual = torch.bincount(labels, own, len(names)) / present.clamp(min=1)
    usual[present == 0] = math.inf
    best, suggested = probabilities.where(probabilities >= usual, -1).max(dim=1)
    doubtful = (best > own) & (suggested != labels)
    for number in doubt.argsort(descending=True).tolist():
        if doubtful[number]:
            name = names[int(suggested[number])]
            note = f"looks like {name} ({float(best[number]):.2f}, its own class {float(own[number]):.2f})"
            yield _doubtful(items, number, names, note, float(doubt[number]), nearest)


def _doubts_of_labels(
    items: Sequence[Item], labels: Tensor, logits: Tensor, names: Sequence[str], nearest: Tensor
) -> Iterator[Finding]:
    """Yields single labels that an image has but probably should not, or lacks but probably should have.

    A missing label is at least as probable as on average for images that have it; a wrong one is at most as probable as
    on average for images without it.
    """
    given, probabilities = labels.bool(), logits.sigmoid()
    usual = [(probabilities * chosen).sum(dim=0) / chosen.sum(dim=0).clamp(min=1) for chosen in (given, ~given)]
    doubtful = torch.where(given, probabilities <= usual[1], probabilities >= usual[0]) & (given.sum(dim=0) > 0)
    doubt = torch.where(given, -logsigmoid(logits), -logsigmoid(-logits))
    pairs = doubtful.nonzero()
    for row, label in pairs[doubt[doubtful].argsort(descending=True)].tolist():
        share = float(probabilities[row, label])
        note = f"looks {'unlike' if given[row, label] else 'like'} {names[label]} ({share:.2f})"
        yield _doubtful(items, row, names, note, float(doubt[row, label]), nearest)


def _doubtful(
    items: Sequence[Item], number: int, names: Sequence[str], note: str, score: float, nearest: Tensor
) -> Finding:
    """The finding that a label of an image may be wrong."""
    item, near = items[number], tuple(items[place].path for place in nearest[number].tolist())
    return Finding("label", item.path, item.named(names), item.split or "", note, score, near=near)


def _groups(digests: Sequence[bytes]) -> list[list[int]]:
    """Groups of two or more positions with identical content."""
    positions: dict[bytes, list[int]] = defaultdict(list)
    for position, digest in enumerate(digests):
        positions[digest].append(position)
    return [group for group in positions.values() if len(group) > 1]


def _membership(near: Sequence[list[int]], identical: Sequence[list[int]], size: int) -> list[list[int]]:
    """The group of each position: near-duplicates (with their identical copies), identical copies, or itself.

    Large groups may be divided: a class within a single fold could not be learnt from the others.
    """
    member = [[position] for position in range(size)]
    for group in [*identical, *near]:
        for position in group if len(group) <= LARGEST_GROUP else []:
            member[position] = group
    return member


def _group_findings(
    kind: str, groups: Sequence[list[int]], items: Sequence[Item], names: Sequence[str], scores: Sequence[float]
) -> Iterator[Finding]:
    order = sorted(groups, key=lambda group: -max(scores[position] for position in group))
    for number, group in enumerate(order, 1):
        splits = sorted({items[position].split or "" for position in group})
        classes = sorted({items[position].named(names) for position in group})
        notes = [f"across {', '.join(splits)}"] if len(splits) > 1 else []
        notes += [f"in {len(classes)} classes: {', '.join(classes)}"] if len(classes) > 1 else []
        for position in group:
            item = items[position]
            name, note = item.named(names), "; ".join(notes)
            yield Finding(kind, item.path, name, item.split or "", note, scores[position], number)


def csv_rows(findings: Sequence[Finding]) -> Iterator[list[Any]]:
    """The rows of ``check.csv``."""
    yield ["problem", "path", "class", "split", "note", "score", "group"]
    for found in findings:
        at = found.kind, found.path, found.class_name, found.split, found.note
        yield [*at, f"{found.score:.4f}", found.group or ""]
