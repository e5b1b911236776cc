"""Exact nearest neighbours of features, computed in blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from headstart.terminal import images_bar

ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class Neighbours:
    """The nearest neighbours of each image, by cosine similarity of centred features."""

    similarities: Tensor  # to the k nearest images of other content, nearest first, [N, k]
    pairs: Tensor  # positions of images of different content whose similarity is at least the threshold, [P, 2]


def neighbours(features: Tensor, digests: Sequence[bytes], k: int, threshold: float) -> Neighbours:
    """The ``k`` nearest images of other content for each, and the pairs at or above ``threshold``; features [N, D]."""
    first = {digest: position for position, digest in reversed(list(enumerate(digests)))}
    content = torch.tensor([first[digest] for digest in digests])
    unit = functional.normalize(features - features.mean(dim=0), dim=1)
    similarities, pairs = [], []
    with images_bar("comparing", len(unit)) as advance:
        for start in range(0, len(unit), ROWS_AT_ONCE):
            block = unit[start : start + ROWS_AT_ONCE] @ unit.T
            own = content[start : start + len(block), None]
            block[own == content] = -1
            similarities.append(block.topk(min(k, len(unit) - 1), dim=1).values)
            pairs.append((block >= threshold).nonzero() + torch.tensor([start, 0]))
            advance(len(block))
    return Neighbours(torch.cat(similarities), torch.cat(pairs))
