"""Leaves out one domain at a time: the exact head of the other domains is tested on it and on their own test images.

This is the leave-one-domain-out protocol of Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR
2021, on frozen features; the penalty is chosen on validation images of the training domains, never on the one left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headstart.data.splits import Item, labels_of
from headstart.errors import UserError
from headstart.features.matrix import FeatureMatrix, Labelled
from headstart.report.evaluation import Evaluation
from headstart.search.exact import best_exact


@dataclass(frozen=True)
class LeftOut:
    """A domain, and the head of the others."""

    domain: str
    trained: int  # training images, all of other domains
    l2: float  # the penalty that their validation images chose
    unseen: Evaluation  # all images of the domain
    seen: Evaluation  # the test images of the others


def leave_one_out(
    items: Sequence[Item],
    class_names: list[str],
    matrix: Callable[[Sequence[Item]], FeatureMatrix],
    balance: bool,
    advance: Callable[[int], None],
) -> list[LeftOut]:
    """Leaves out each domain of images that have a split; ``matrix`` gives their features.

    With ``balance``, domains have the same weight in the loss, however many images they have. Calls ``advance`` with 1
    after each domain.
    """
    found = []
    for domain in check_domains(items, class_names):
        unseen = [item for item in items if item.domain == domain]
        # An image or a group that is in several domains is not new there.
        known = {key for item in unseen for key in (item.digest, item.group) if key}
        seen = [item for item in items if item.domain != domain and known.isdisjoint((item.digest, item.group))]
        train, val, test = ([item for item in seen if item.split == split] for split in ("train", "val", "test"))
        _check_classes(train, class_names, domain)
        weights = balanced(train) if balance else None
        l2, head = best_exact(_labelled(train, matrix), _labelled(val, matrix), len(class_names), of_images=weights)
        scored = [_evaluation(head.head, part, class_names, matrix) for part in (unseen, test)]
        found.append(LeftOut(domain, len(train), l2, *scored))
        advance(1)
    return found


def check_domains(items: Sequence[Item], class_names: Sequence[str]) -> list[str]:
    """The names of the domains, at least two, which all images have; else ``UserError``."""
    domains = sorted({item.domain for item in items})
    if len(domains) < 2:
        raise UserError(
            "domains: all images are of one domain; give --data.source=domains for a folder of domains, "
            "or a column domain in --data.csv"
        )
    if "" in domains:
        raise UserError(f"domains: {sum(not item.domain for item in items)} images have no domain; fill in the column")
    return domains


def balanced(items: Sequence[Item]) -> Tensor:
    """The weight of each image, [N], at which all domains weigh the same."""
    counts = Counter(item.domain for item in items)
    return torch.tensor([1 / counts[item.domain] for item in items])


def _check_classes(train: Sequence[Item], class_names: Sequence[str], domain: str) -> None:
    if lacking := sorted(set(range(len(class_names))) - {item.label for item in train}):
        raise UserError(
            f"domains: without {domain!r} no training image of class {class_names[lacking[0]]!r} is left; "
            "add some to another domain, or remove the class"
        )


def _labelled(items: Sequence[Item], matrix: Callable[[Sequence[Item]], FeatureMatrix]) -> Labelled:
    return Labelled([matrix(items)], labels_of(items))


@torch.no_grad()
def _evaluation(
    head: nn.Module, items: Sequence[Item], names: list[str], matrix: Callable[[Sequence[Item]], FeatureMatrix]
) -> Evaluation:
    features, none = matrix(items).whole(), torch.empty(0, dtype=torch.long)
    return Evaluation("test", names, items, labels_of(items), head(features).cpu(), none, features[:0])
