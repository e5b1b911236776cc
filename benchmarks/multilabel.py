"""Several labels per image: mean average precision beside scikit-learn's one-vs-rest logistic regression.

usage: python benchmarks/multilabel.py path/to/pacs [--splits=5] [OPTION ...]

FOLDER holds a folder per domain with a folder per class; each picture has two labels, its class and its domain.
scikit-learn gets the same features, standardised on the training images, and the same splits; C is chosen on the
validation images by the loss. OPTIONs are those of `train`.
"""

import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, log_loss
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler

from headstart import FrozenBackbone, ImageFolderData
from headstart.cli import main
from headstart.data.folders import images

PENALTIES = [10.0 ** (-power / 2) for power in range(9)]  # as headstart's


def listed(root, file):
    """Writes a CSV file with two labels per picture."""
    paths = (path for path in images(root) if len(path.relative_to(root).parts) == 3)
    rows = [[path, "|".join(path.relative_to(root).parts[:2])] for path in paths]
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([["path", "label"], *rows])
    return file


def theirs(data, backbone):
    """scikit-learn's mean average precision on the test images, and its seconds."""
    train, val, test = (data.numpy(split, backbone)[:2] for split in ("train", "val", "test"))
    started = time.perf_counter()
    scale = StandardScaler().fit(train[0])
    found = []
    for l2 in PENALTIES:
        each = LogisticRegression(C=1 / (l2 * len(train[0])), max_iter=2000)
        head = OneVsRestClassifier(each).fit(scale.transform(train[0]), train[1])
        loss = log_loss(val[1].ravel(), head.predict_proba(scale.transform(val[0])).ravel())
        found.append((loss, average_precision_score(test[1], head.decision_function(scale.transform(test[0])))))
    return min(found)[1], time.perf_counter() - started


if __name__ == "__main__":
    splits = next((int(a.split("=")[1]) for a in sys.argv[2:] if a.startswith("--splits=")), 5)
    options = [a for a in sys.argv[2:] if not a.startswith("--splits=")]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = listed(Path(sys.argv[1]).resolve(), Path(folder) / "pacs.csv")
        for seed in range(splits):
            common = [f"--data.csv={file}", f"--data.split_seed={seed}", f"--logs={folder}", "--report=false"]
            own = main(["train", *common, "--model.weights=bundled", *options])
            data = ImageFolderData(csv=str(file), split_seed=seed)
            rows.append((own["test/map"], own["test/f1"], own["seconds"]["fit"], *theirs(data, FrozenBackbone())))
    mean = [statistics.mean(column) for column in zip(*rows, strict=True)]
    print("\n| mean of splits | headstart | scikit-learn |\n|---|---|---|")
    print(f"| test/map | {mean[0]:.3f} | {mean[3]:.3f} |\n| seconds for the heads | {mean[2]:.1f} | {mean[4]:.1f} |")
    print(f"| test/f1 at the thresholds | {mean[1]:.3f} | |")
    print("each split, headstart - scikit-learn:", ", ".join(f"{row[0] - row[3]:+.4f}" for row in rows))
