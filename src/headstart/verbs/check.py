"""The verb `check`: what is wrong with a folder of photos, from their cached features."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from headstart.data.module import ImageData, ImageFolderData
from headstart.data.splits import Item
from headstart.errors import UserError
from headstart.features.cache import FeatureMatrix
from headstart.files import csv_bytes, write_atomically
from headstart.model.classifier import TransferClassifier
from headstart.parser import OptionParser, add_options, parser_of
from headstart.runs.folder import claim
from headstart.search.bank import fit_exact
from headstart.terminal import be_calm, images_bar, say
from headstart.verbs.predict import device_of

# Cosine of centred, rooted features. Recompressed, resized and slightly cropped photographs lie above it (0.92 to
# 0.99 at the 5 % quantile on ants and bees, in which no other pair reaches 0.8).
NEAR = 0.9
NEIGHBOURS = 5
# Robust standard deviations below the median similarity to the neighbours.
OUTLYING = 3.5
FEW_IMAGES = 20
FOLDS, REPEATS, LARGEST_GROUP = 5, 3, 10
STRENGTHS = (0.1, 0.03, 0.01, 0.003)
# Above so many images out-of-fold probabilities come from one round at one strength.
MAX_IMAGES_REPEATED, DEFAULT_STRENGTH = 10_000, 0.01
DOUBTED_SHARE = 0.05
TOLERANCE = 1e-3  # enough for probabilities that are averaged
ROWS_AT_ONCE = 2048
SHOWN = 10
KINDS = {
    "damaged": "cannot be read",
    "duplicate": "identical to others",
    "near-duplicate": "almost identical to others",
    "label": "labels to look at, the worst first",
    "outlier": "unlike all others",
    "small class": f"classes of fewer than {FEW_IMAGES} images",
}
GROUPED = ("duplicate", "near-duplicate")
DATA_OPTIONS = (
    *("num_workers", "cache_dir", "feature_precision", "max_pixels"),
    *("val_fraction", "test_fraction", "split_seed", "splits"),
)


@dataclass(frozen=True)
class Finding:
    """Something to look at.

    Attributes:
        kind: of ``KINDS``.
        path: of the image; of a small class, its name.
        class_name: that it is in.
        split: that it would be in.
        note: why, or what it should be.
        score: the larger, the surer; of near-duplicates, the similarity.
        group: the images that belong together; 0: none.
    """

    kind: str
    path: str
    class_name: str
    split: str = ""
    note: str = ""
    score: float = 1.0
    group: int = 0


class CheckedFolder(ImageFolderData):
    """A folder that is read as `train` would, but whose faults are findings and do not stop anything."""

    fault = ""

    def listed(self) -> list[Item]:
        """As of any folder; remembers the class of each image, also of one that cannot be read."""
        found = super().listed()
        self.class_of = {item.path: self.class_names[item.label] for item in found}
        return found

    def _check_skips(self, items: Sequence[Item]) -> None:
        """Unreadable images are findings."""

    def _split(self, items: Sequence[Item]) -> list[Item]:
        if not items:
            raise UserError(f"{self.source}: no readable image; {len(self.skipped)} files cannot be read")
        try:
            return super()._split(items)
        except UserError as error:
            self.fault = str(error)
            return [Item(item.path, item.label, item.digest, item.split or "train") for item in items]

    def _say_counts(self) -> None:
        """The findings say more."""


def check(options: Sequence[str]) -> dict[str, int]:
    """Looks for duplicates, likely wrong labels, outliers, small classes and damaged files; changes nothing.

    Args:
        options: of the command line.

    Returns:
        How many findings of each kind.

    Raises:
        UserError: a mistake in the options, or the folder is no folder of classes.
    """
    be_calm()
    parser = _parser()
    given = parser.parse_args(list(options))
    data = CheckedFolder(**vars(given.data))
    module = TransferClassifier(data.class_names, **vars(given.model))
    data.load(module.backbone, device_of(given.accelerator))
    features = rooted(data.features_of(data.items).gather(torch.arange(len(data.items))).cpu())
    findings = list(find(data, features))
    folder = claim(Path(given.logs), f"{data.source.stem}-check")
    write_atomically(folder / "check.csv", csv_bytes(_rows(findings)))
    counts = Counter(finding.kind for finding in findings)
    _say_findings(findings, counts, len(data.items))
    if data.fault:
        say(f"train:    would stop: {data.fault}")
    say(f"findings: {folder / 'check.csv'}    (nothing was changed)")
    return {kind: counts[kind] for kind in KINDS}


def find(data: CheckedFolder, features: Tensor) -> Iterator[Finding]:
    """All findings, kind by kind, the surest first.

    Args:
        data: loaded.
        features: of its images, rooted, [N, D].
    """
    items, names = data.items, data.class_names
    labels = torch.tensor([item.label for item in items])
    for path, reason in data.skipped.items():
        yield Finding("damaged", path, data.class_of[path], note=reason)
    identical = _groups([item.digest for item in items])
    yield from _group_findings("duplicate", identical, items, names, [1.0] * len(items))
    near, similarity, isolation = neighbours(features, [item.digest for item in items])
    yield from _group_findings("near-duplicate", near, items, names, similarity)
    if len(set(labels.tolist())) > 1 and len(items) >= 2 * FOLDS:
        together = [min(group) for group in _membership(near, identical, len(items))]
        logits = out_of_fold(features, labels, len(names), torch.tensor(together))
        yield from _label_findings(items, labels, logits, names)
    for number in isolation.argsort(descending=True).tolist():
        if isolation[number] > OUTLYING:
            item = items[number]
            score = float(isolation[number])
            note = f"{score:.1f} robust deviations from the usual likeness"
            yield Finding("outlier", item.path, names[item.label], item.split or "", note, score)
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    for name, count in sorted(zip(names, counts, strict=True), key=lambda pair: pair[1]):
        if count < FEW_IMAGES:
            yield Finding("small class", name, name, note=f"{count} images", score=float(FEW_IMAGES - count))


def rooted(features: Tensor) -> Tensor:
    """The signed square root of features, [N, D]: large values count less, as in the Hellinger kernel.

    Arandjelović and Zisserman, "Three things everyone should know to improve object retrieval", CVPR 2012.
    """
    return features.sign() * features.abs().sqrt()


def neighbours(features: Tensor, digests: Sequence[bytes]) -> tuple[list[list[int]], list[float], Tensor]:
    """Groups of near-duplicates, each image's highest similarity to another content, and how isolated it is.

    Args:
        features: rooted, [N, D].
        digests: of the contents; identical ones are no near-duplicates.

    Returns:
        Groups of positions; similarities by position; robust deviations of the mean similarity to the 5 nearest images
        below the median, [N] (Ramaswamy et al., "Efficient Algorithms for Mining Outliers", SIGMOD 2000).
    """
    first = {digest: position for position, digest in reversed(list(enumerate(digests)))}
    content = torch.tensor([first[digest] for digest in digests])
    unit = functional.normalize(features - features.mean(dim=0), dim=1)
    parent = list(range(len(unit)))

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = parent[parent[position]]
            position = parent[position]
        return position

    nearest, likeness = [], []
    with images_bar("comparing", len(unit)) as advance:
        for start in range(0, len(unit), ROWS_AT_ONCE):
            block = unit[start : start + ROWS_AT_ONCE] @ unit.T
            rows = torch.arange(start, start + len(block))
            block[content[rows][:, None] == content] = -1
            best = block.topk(min(NEIGHBOURS, len(unit) - 1), dim=1).values
            nearest.append(best[:, 0])
            likeness.append(best.mean(dim=1))
            for row, other in (block >= NEAR).nonzero().tolist():
                parent[root(start + row)] = root(other)
            advance(len(block))
    groups: dict[int, list[int]] = defaultdict(list)
    for position in range(len(unit)):
        groups[root(position)].append(position)
    mean = torch.cat(likeness)
    spread = 1.4826 * (mean - mean.median()).abs().median()
    isolation = (mean.median() - mean) / spread.clamp(min=1e-6)
    similar = [group for group in groups.values() if len({digests[position] for position in group}) > 1]
    return similar, torch.cat(nearest).tolist(), isolation


def out_of_fold(features: Tensor, labels: Tensor, num_classes: int, groups: Tensor) -> Tensor:
    """Log probabilities of each image by heads that did not see it, [N, C].

    Exact heads over 5 folds give the L2 strength with the lowest loss, and the 5 % of the images that fit worst. Heads
    that were not taught by those, averaged over 3 partitions, give the probabilities.

    Args:
        features: rooted, [N, D].
        labels: [N].
        num_classes: C.
        groups: images of one group share a fold, [N].
    """
    features = features / features.square().mean().sqrt()
    everything = torch.ones(len(labels), dtype=torch.bool)
    if len(labels) > MAX_IMAGES_REPEATED:
        with images_bar("labels", len(labels)) as advance:
            return _one_round(features, labels, num_classes, groups, DEFAULT_STRENGTH, 0, everything, advance)
    rounds = len(STRENGTHS) + REPEATS
    with images_bar("labels", rounds * len(labels)) as advance:

        def one_round(strength: float, seed: int, kept: Tensor) -> Tensor:
            return _one_round(features, labels, num_classes, groups, strength, seed, kept, advance)

        tried = {strength: one_round(strength, 0, everything) for strength in STRENGTHS}
        strength = min(tried, key=lambda strength: float(losses(tried[strength], labels).mean()))
        kept = everything.clone()
        kept[losses(tried[strength], labels).argsort(descending=True)[: int(DOUBTED_SHARE * len(labels))]] = False
        return torch.stack([one_round(strength, seed, kept) for seed in range(REPEATS)]).mean(dim=0)


def losses(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each image, [N]: the higher, the less its label fits."""
    return -log_probabilities.gather(1, labels[:, None])[:, 0]


def _one_round(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    groups: Tensor,
    strength: float,
    seed: int,
    kept: Tensor,
    advance: Callable[[int], None],
) -> Tensor:
    folds = _folds(labels, groups, seed)
    found = torch.zeros(len(labels), num_classes)
    for fold in range(FOLDS):
        inside, outside = (folds != fold) & kept, folds == fold
        head = fit_exact(FeatureMatrix.of(features[inside]), labels[inside], num_classes, strength, tolerance=TOLERANCE)
        found[outside] = functional.linear(features[outside], head.weight, head.bias).log_softmax(dim=1)
        advance(int(outside.sum()))
    return found


def _folds(labels: Tensor, groups: Tensor, seed: int) -> Tensor:
    """The fold of each image: groups stay together, and classes spread evenly, [N]."""
    leaders = (groups == torch.arange(len(groups))).nonzero()[:, 0]
    shuffled = leaders[torch.randperm(len(leaders), generator=torch.Generator().manual_seed(seed))]
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    folds = torch.zeros(len(labels), dtype=torch.long)
    folds[by_class] = torch.arange(len(by_class)) % FOLDS
    return folds[groups]


def _label_findings(items: Sequence[Item], labels: Tensor, logits: Tensor, names: Sequence[str]) -> Iterator[Finding]:
    """Images of which another class is as probable as it is, on average, for images of that class.

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
            item, name = items[number], names[int(suggested[number])]
            note = f"looks like {name} ({float(best[number]):.2f}, its own class {float(own[number]):.2f})"
            yield Finding("label", item.path, names[item.label], item.split or "", note, float(doubt[number]))


def _groups(digests: Sequence[bytes]) -> list[list[int]]:
    """The positions of identical contents, where there are several."""
    positions: dict[bytes, list[int]] = defaultdict(list)
    for position, digest in enumerate(digests):
        positions[digest].append(position)
    return [group for group in positions.values() if len(group) > 1]


def _membership(near: Sequence[list[int]], identical: Sequence[list[int]], size: int) -> list[list[int]]:
    """The group of each position: near-duplicates (which hold their identical copies too), identical ones, itself.

    A large group is no longer held together: a class in one fold could not be learnt by the others.
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
        classes = sorted({names[items[position].label] for position in group})
        notes = [f"across {', '.join(splits)}"] if len(splits) > 1 else []
        notes += [f"in {len(classes)} classes: {', '.join(classes)}"] if len(classes) > 1 else []
        for position in group:
            item = items[position]
            name, note = names[item.label], "; ".join(notes)
            yield Finding(kind, item.path, name, item.split or "", note, scores[position], number)


def _parser() -> OptionParser:
    parser = parser_of("check")
    parser.add_argument("--data.root", type=str | None, help="a folder of class folders")
    parser.add_argument("--data.csv", type=str | None, help="a list of images, instead of a folder")
    add_options(parser, ImageData, "data", DATA_OPTIONS)
    add_options(parser, TransferClassifier, "model", ("backbone", "weights", "image_size"))
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, cuda or auto")
    parser.add_argument("--logs", type=str, default="logs", help="where the folder with check.csv goes")
    return parser


def _rows(findings: Sequence[Finding]) -> Iterator[list[Any]]:
    yield ["problem", "path", "class", "split", "note", "score", "group"]
    for found in findings:
        at = found.kind, found.path, found.class_name, found.split, found.note
        yield [*at, f"{found.score:.4f}", found.group or ""]


def _say_findings(findings: Sequence[Finding], counts: Counter[str], images: int) -> None:
    table = Table("problem", "count", "the first", title=f"{images} images")
    for kind, meaning in KINDS.items():
        lines: dict[object, list[Finding]] = defaultdict(list)
        for found in findings:
            if found.kind == kind:
                lines[found.group or found.path].append(found)
        count = f"{counts[kind]}{f' in {len(lines)} groups' if kind in GROUPED and lines else ''}"
        table.add_row(meaning, count, "\n".join(_line(together) for together in list(lines.values())[:SHOWN]))
    say(table)


def _line(together: Sequence[Finding]) -> str:
    note = together[0].note
    return f"{', '.join(found.path for found in together)}{f' ({note})' if note else ''}"
