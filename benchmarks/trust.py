"""What a head knows, and what its sets of classes hold, against what is promised.

    python benchmarks/trust.py [path/to/folder] [--omniglot=small1.zip] [--splits=500] [--others=200]
        [--backbone=resnet18] [--weights=auto]

Unknown: two classes at a time are left out of the training and of `known`; then none is, and the unknown images are
characters and noise. Beside it, the same distance by scikit-learn and scipy, and, where it is installed (pip install
pytorch-ood), three of its detectors on the same features. Sets: the images that did not train the head are split at
random, many times, into a validation and a test part. The first 40 characters of Omniglot are many classes with few
images.
"""

import argparse
import math
import tempfile
import zipfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from scipy.stats import betabinom
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from headstart import FrozenBackbone
from headstart.data.module import ImageData
from headstart.data.sources import open_source
from headstart.features.hashes import cache_folder
from headstart.features.stream import FileStream
from headstart.model.calibration import fit_temperature
from headstart.model.known import Known, unknown_scores
from headstart.model.schedule import warmup_cosine
from headstart.model.sets import sets_of, threshold, true_probabilities
from headstart.report.evaluation import evenly_spaced
from headstart.terminal import quiet_libraries

DEMO = Path(__file__).parent.parent / "data" / "clipart"
REFUSED, COVERAGES, EPOCHS, BATCH, CHARACTERS = 0.05, (0.8, 0.9, 0.95), 25, 32, 40


def loaded(source, backbone):
    """The images of a source with their features, labels and splits."""
    data = ImageData(source)
    data.load(backbone, torch.device("cpu"))
    splits = [item.split for item in data.items]
    labels = torch.tensor([item.label for item in data.items])
    return data, data.store.matrix(data.items).whole(), labels, np.array(splits)


def first_characters(archive, folder):
    """Unpacks Omniglot's first characters, a class folder each."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png") and "__MACOSX" not in name)
        classes = dict.fromkeys(tuple(name.split("/")[-3:-1]) for name in names)
        for number, of_class in enumerate(list(classes)[:CHARACTERS]):
            for name in (name for name in names if tuple(name.split("/")[-3:-1]) == of_class):
                target = folder / f"{number:02}" / Path(name).name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(file.read(name))


def oracle(features, labels, others):
    """Mahalanobis distances by scikit-learn and scipy, in float64."""
    features, labels = features.double().numpy(), np.unique(labels, return_inverse=True)[1]
    means = np.stack([features[labels == label].mean(axis=0) for label in range(labels.max() + 1)])
    precision = np.linalg.inv(LedoitWolf(assume_centered=True).fit(features - means[labels]).covariance_)
    return [cdist(each.double().numpy(), means, "mahalanobis", VI=precision).min(axis=1) for each in others]


def detectors():
    """pytorch-ood's, by name; none where it is not installed."""
    try:
        from pytorch_ood.detector import KNN, RMD, Mahalanobis
    except ImportError:
        return {}
    return {"Mahalanobis": lambda: Mahalanobis(None), "RMD": lambda: RMD(None), "KNN": lambda: KNN(None, k=5)}


def auroc(own, unknown):
    return roc_auc_score([0] * len(own) + [1] * len(unknown), [*map(float, own), *map(float, unknown)])


def unknown_row(name, features, labels, splits, unknown):
    """A row of the table: ``features`` are of known classes in three splits, ``unknown`` of none."""
    train, val, test = (torch.from_numpy(splits == split) for split in ("train", "val", "test"))
    known = Known.fit(features[train], labels[train], features[val]).double()
    own = features[test]
    scores = unknown_scores(*(known.distance(each) for each in (own, unknown)))
    wanted = auroc(*oracle(features[train], labels[train], (own, unknown)))
    places = torch.unique(labels[train], return_inverse=True)[1]  # pytorch-ood wants 0, 1, … without a gap
    others = []
    for make in detectors().values():
        detector = make().fit_features(features[train], places)
        others.append(f"{auroc(*(detector.predict_features(each) for each in (own, unknown))):.3f}")
    refused, images = int((known(own) <= REFUSED).sum()), len(own)
    allowed = math.floor(REFUSED * (1 + int(val.sum())))
    low, high = betabinom(images, allowed, 1 + int(val.sum()) - allowed).interval(0.95) if allowed else (0, 0)
    cells = f"{scores['unknown/auroc']:.3f}", f"{scores['unknown/auroc'] - wanted:+.0e}", *others
    fpr = f"{scores['unknown/fpr95']:.3f}"
    print(f"| {name} | {' | '.join(cells)} | {fpr} | {refused} of {images} ({low:.0f} to {high:.0f}) |")
    return scores["unknown/auroc"], *map(float, others), low <= refused <= high


def strangers(folder, count, store):
    """Features of characters and of noise, by name."""
    kinds = {"noise": []}
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (128, 128, 3), np.uint8)
        kinds["noise"].append(folder / f"{number}.png")
        Image.fromarray(pixels).save(kinds["noise"][-1])
    if find_spec("headstart.fewshot"):  # the wing may have been taken off
        from headstart.fewshot.glyphs import glyphs

        drawings = sorted(glyphs(cache_folder()).rglob("*.png"))
        kinds["characters"] = [drawings[place] for place in evenly_spaced(len(drawings), count).tolist()]
    stream = FileStream(store.backbone, torch.device("cpu"), store.arithmetic)
    return {name: torch.cat([part.features for part in stream(map(str, paths))]) for name, paths in kinds.items()}


def unknown(data, features, labels, splits, count):
    print(f"| unknown | AUROC | minus the oracle's | {''.join(f'{name} | ' for name in detectors())}", end="")
    print(f"FPR95 | refused of the test at {REFUSED} (95 % band) |\n|{'---|' * (5 + len(detectors()))}")
    names, rows = data.class_names, []
    for first in range(0, len(names) - 1, 2):
        out = torch.isin(labels, torch.tensor([first, first + 1]))
        kept = features[~out], labels[~out], splits[~out.numpy()]
        rows.append(unknown_row(f"{names[first]}, {names[first + 1]}", *kept, features[out]))
    means = [f"{np.mean(column):.3f}" for column in list(zip(*rows, strict=True))[:-1]]
    print(f"| mean of the pairs | {means[0]} | | {''.join(f'{mean} | ' for mean in means[1:])}| |")
    if count:
        with tempfile.TemporaryDirectory() as folder:
            for name, found in strangers(Path(folder), count, data.store).items():
                rows.append(unknown_row(name, features, labels, splits, found))
    print(f"refusals within the band: {sum(row[-1] for row in rows)} of {len(rows)} rows")


def logits_by_epoch(features, labels, pool):
    """The logits of the pool after each epoch of a head with default settings, [EPOCHS, N, C]."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(features.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.003, weight_decay=0.01)
    steps = EPOCHS * math.ceil(len(labels) / BATCH)
    rate = partial(warmup_cosine, warmup_steps=round(0.04 * steps), steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    found = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(head(features[rows]), labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
        found.append(head(pool).detach())
    return torch.stack(found)


def covered(logits, labels, calibrated, tested, coverage):
    """Whether the sets of the tested images hold the truth, and their sizes."""
    temperature = fit_temperature(logits[calibrated], labels[calibrated])
    probabilities = (logits / temperature).softmax(dim=1)
    least = threshold(true_probabilities(probabilities[calibrated], labels[calibrated]), coverage)
    sets = sets_of(probabilities[tested], least)
    return sets.gather(1, labels[tested, None])[:, 0], sets.sum(dim=1).double()


def sets(name, logits, labels, validation, splits):
    """Rows of the table: logits [EPOCHS, N, C] of N images that did not train the head."""
    test, accuracy = len(labels) - validation, float((logits[-1].argmax(dim=1) == labels).double().mean())
    name = f"{name}: {logits.shape[2]} classes, {validation} and {test} images, accuracy {accuracy:.2f}"
    for coverage in COVERAGES:
        rank = math.ceil((validation + 1) * coverage - 1e-9)
        low, high = betabinom(test, rank, validation + 1 - rank).interval(0.95)
        held, chosen, sizes = [], [], []
        for seed in range(splits):
            calibrated, tested = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).split(
                [validation, test]
            )
            right, size = covered(logits[-1], labels, calibrated, tested, coverage)
            held.append(int(right.sum()))
            sizes.append(float(size.mean()))
            losses = [float(functional.cross_entropy(epoch[calibrated], labels[calibrated])) for epoch in logits]
            chosen.append(int(covered(logits[int(np.argmin(losses))], labels, calibrated, tested, coverage)[0].sum()))
        wanted, error = rank / (validation + 1), 2 * np.std(held) / test / math.sqrt(splits)
        within = np.mean([low <= count <= high for count in held])
        cells = f"{np.mean(held) / test:.3f}", f"{np.mean(chosen) / test:.3f}", f"{within:.1%}", f"{np.mean(sizes):.1f}"
        print(f"| {name} | {coverage} | {wanted:.3f} ± {error:.3f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    quiet_libraries()
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("root", nargs="?", default=str(DEMO))
    parser.add_argument("--omniglot")
    parser.add_argument("--splits", type=int, default=500)
    parser.add_argument("--others", type=int, default=200)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="auto")
    given = parser.parse_args()
    backbone = FrozenBackbone(given.backbone, given.weights)
    data, features, labels, splits = loaded(open_source(given.root, None, None), backbone)
    unknown(data, features, labels, splits, given.others)
    print("\n| images | promised | expected | held | if they also chose the epoch | splits within the band | size |")
    print(f"|{'---|' * 7}")
    torch.manual_seed(0)
    trained = torch.from_numpy(splits == "train")
    logits = logits_by_epoch(features[trained], labels[trained], features[~trained])
    sets(Path(given.root).name, logits, labels[~trained], int((~trained).sum()) // 2, given.splits)
    if given.omniglot:
        with tempfile.TemporaryDirectory() as folder:
            first_characters(Path(given.omniglot), Path(folder))
            _, features, labels, _ = loaded(open_source(folder, None, None), backbone)
        few, pool = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tensor_split([200])
        sets("omniglot", logits_by_epoch(features[few], labels[few], features[pool]), labels[pool], 60, given.splits)
