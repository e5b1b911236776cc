"""Are validation or test images near-duplicates of training images? Their scores would be too good."""

import re

import torch

from headstart.data.module import ImageData
from headstart.data.splits import SPLITS
from headstart.search.neighbours import NEAR, neighbours, rooted

MAX_IMAGES = 4000  # with more, the comparison is no longer a matter of a moment
FRAMES = re.compile(r"([^/]+?)[-_ ]?\d+\.\w+$")  # the name before the number of a frame or a slice


def leaks_of(data: ImageData) -> str:
    """A sentence on validation and test images that are almost identical to training images; empty if there are none.

    The data must be loaded; without a cache, and with more than 4,000 images, nothing is compared.
    """
    items = [item for split in SPLITS for item in data.items_in(split)]
    if not data.store.cache or not items or len(items) > MAX_IMAGES:
        return ""
    features = torch.cat([data.labelled(split).views[0].whole().cpu() for split in SPLITS if data.items_in(split)])
    pairs = neighbours(rooted(features), [item.digest for item in items], 1, NEAR).pairs.tolist()
    trained = [item.split == "train" for item in items]
    leaked = {held: own for own, held in pairs if trained[own] and not trained[held]}
    if not leaked:
        return ""
    scenes = [found[1] if (found := FRAMES.search(item.path)) else item.path for item in items]
    numbered = sum(scenes[held] == scenes[own] for held, own in leaked.items()) > len(leaked) / 2
    several = 3 * len(data.class_names) <= len(set(scenes)) <= len(items) / 2  # of more than one image, for each split
    remedy = f"--data.group='{FRAMES.pattern}'" if numbered and several else "the column group of --data.csv"
    held, own = next(iter(leaked.items()))
    return (
        f"{len(leaked)} validation or test image(s) look almost identical to training images ({items[held].path} to "
        f"{items[own].path}); copies inflate scores, so keep them in one split, by {remedy}"
    )
