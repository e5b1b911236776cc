"""The default run and `tune` beside scikit-learn's logistic regression on the same features and splits.

usage: python benchmarks/heads.py [NAME=FOLDER ...]

The demo, and each NAME of hymenoptera (with train and val, which are split anew), pacs (domain/class), cifar10 (train
and test, of which 1,000 and 200 images per class are taken) and omniglot (its small sets; a class per character). The
demo and hymenoptera: five splits. LogisticRegression has standardised features, is fitted on the training images alone,
and its C, from 1e-3 to 0.3, is chosen on the validation images, by loss or by accuracy. Runs go to a temporary folder.
"""

import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from headstart import FrozenBackbone, ImageFolderData
from headstart.cli import main

DEMO = Path(__file__).resolve().parent.parent / "data" / "clipart"
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
SPLITS = {"demo": 5, "hymenoptera": 5}
COLUMNS = ("default", "tune", "scikit-learn by loss", "scikit-learn by accuracy")


def rows_of(name: str, folder: Path) -> Iterator[tuple[Path, str, str]]:
    """The path, class and split of each image; an empty split is assigned by headstart."""
    if name == "cifar10":
        for split, count in (("train", 1000), ("test", 200)):
            for group in sorted((folder / split).iterdir()):
                for number, path in enumerate(sorted(group.iterdir())[:count]):
                    yield path, group.name, "val" if split == "train" and number >= 850 else split
        return
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")):
        yield path, "/".join(path.parts[-3:-1]) if name == "omniglot" else path.parent.name, ""


def listed(name: str, folder: Path, where: Path) -> Path:
    """A CSV file that lists the images of a data set."""
    file = where / f"{name}.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("path", "label", "split"), *rows_of(name, folder.resolve())])
    return file


def plain(data: ImageFolderData) -> list[float]:
    """Test accuracies of scikit-learn's heads, chosen by validation loss and by validation accuracy."""
    data.load(FrozenBackbone(), torch.device("cpu"))
    parts = [(part.views[0].whole(), part.labels) for part in map(data.labelled, ("train", "val", "test"))]
    scale = StandardScaler().fit(parts[0][0])
    (train, labels), *others = [(scale.transform(rows), truth.numpy()) for rows, truth in parts]
    found = []
    for strength in STRENGTHS:
        head = LogisticRegression(C=strength, max_iter=1000).fit(train, labels)
        val, test = (head.score(*part) for part in others)
        loss = log_loss(others[0][1], head.predict_proba(others[0][0]), labels=head.classes_)
        found.append((loss, -val, test))
    return [min(found)[2], min(found, key=lambda each: (each[1], each[0]))[2]]


def compare(given: dict[str, str | int], logs: str) -> tuple[list[float], str]:
    """Test accuracies in the order of ``COLUMNS`` for the options of the data, and the head of the default run."""
    options = [*(f"--data.{name}={value}" for name, value in given.items()), f"--logs={logs}", "--report=false"]
    options += ["--model.weights=bundled", "--trainer.enable_progress_bar=false"]
    result = main(["train", *options])
    tuned = main(["tune", *options])["result"]
    return [result["test/acc"], tuned["test/acc"], *plain(ImageFolderData(**given))], result["head"]


if __name__ == "__main__":
    lines, means = [], []
    with tempfile.TemporaryDirectory() as logs:
        sets = {"demo": {"root": str(DEMO)}}
        for name, _, folder in (argument.partition("=") for argument in sys.argv[1:]):
            sets[name] = {"csv": str(listed(name, Path(folder), Path(logs)))}
        for name, given in sets.items():
            runs = [compare({**given, "split_seed": seed}, logs) for seed in range(SPLITS.get(name, 1))]
            means.append([mean(column) for column in zip(*(scores for scores, _ in runs), strict=True)])
            exact = sum(head.startswith("exact") for _, head in runs)
            scores = " | ".join(f"{value:.3f}" for value in means[-1])
            lines.append(f"| {name} | {scores} | {exact} of {len(runs)} |")
    overall = [mean(column) for column in zip(*means, strict=True)]
    print(f"\n| test accuracy | {' | '.join(COLUMNS)} | exact heads |\n{'|---' * 6}|\n" + "\n".join(lines))
    print(f"| mean | {' | '.join(f'{value:.3f}' for value in overall)} | |")
    for own in (0, 1):
        differences = [f"{100 * (overall[own] - overall[other]):+.2f} points to {COLUMNS[other]}" for other in (2, 3)]
        print(f"{COLUMNS[own]}: {', '.join(differences)}")
