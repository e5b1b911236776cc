"""What `headstart next` is worth, and what it takes.

usage: python benchmarks/label.py [path/to/folder]
       python benchmarks/label.py rows [100000]

The first labels 1, 2, 5 and 10 images per class of a folder of class folders (the name of an image's folder is its
class; default: the demo), each time those that `next` chooses given the labels so far, or random ones; prints the
accuracy of the exact head on all other images: mean and 95 % interval of ten seeds.
The second times `similar`, `next` and `embed` on random rows of 512 features.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional

from headstart import FrozenBackbone
from headstart.data.store import FeatureStore
from headstart.features.matrix import FeatureMatrix, Labelled
from headstart.label.choose import STRENGTH, choose
from headstart.label.heap import folder_of_images
from headstart.label.tables import write_features
from headstart.search.exact import fit_exact
from headstart.search.intervals import mean_and_half_width
from headstart.search.knn import nearest
from headstart.terminal import quiet_libraries

BUDGETS, SEEDS = (1, 2, 5, 10), 10
DEMO = Path(__file__).parent.parent / "data" / "clipart"


def accuracy(features, truth, labels):
    """Of the exact head that the labels give, on the other images."""
    known = labels >= 0
    head = fit_exact(Labelled.of(features[known], labels[known]), int(truth.max()) + 1, STRENGTH / int(known.sum()))
    return float((head(features[~known]).argmax(dim=1) == truth[~known]).float().mean())


def at_random(features, labels, count, seed, head):
    unknown = (labels < 0).nonzero()[:, 0]
    return unknown[torch.randperm(len(unknown), generator=torch.Generator().manual_seed(seed))[:count]]


def accuracies(features, truth, method, seed):
    """At each budget, in images per class."""
    seen = features - features.mean(dim=0)
    seen, classes = seen / seen.norm(dim=1).mean(), int(truth.max()) + 1
    labels, found, before = torch.full_like(truth, -1), [], 0
    for budget in BUDGETS:
        chosen = method(features, labels, (budget - before) * classes, seed, None)
        labels[chosen], before = truth[chosen], budget
        assert int((labels >= 0).sum()) == budget * classes
        found.append(accuracy(seen, truth, labels))
    return found


def compare(root):
    source = folder_of_images(root)
    store = FeatureStore(source)
    store.load(FrozenBackbone(weights="bundled"), torch.device("cpu"))
    items = list({item.digest: item for item in store.items}.values())
    names = sorted({Path(item.path).parent.name for item in items})
    truth = torch.tensor([names.index(Path(item.path).parent.name) for item in items])
    features = store.matrix(items).whole()
    print(f"\n{source.path.name}: {len(items)} images, {len(names)} classes, {SEEDS} seeds\n")
    print(f"| images labelled | {' | '.join(f'{budget} per class' for budget in BUDGETS)} |")
    print("|---" * (len(BUDGETS) + 1) + "|")
    scores = {
        name: torch.tensor([accuracies(features, truth, method, seed) for seed in range(SEEDS)])
        for name, method in (("at random", at_random), ("headstart next", choose))
    }
    scores["difference"] = scores["headstart next"] - scores["at random"]
    for name, found in scores.items():
        cells = (f"{mean:.3f} ± {half:.3f}" for mean, half in map(mean_and_half_width, found.T))
        print(f"| {name} | {' | '.join(cells)} |")


def timed(what, run):
    started = time.perf_counter()
    found = run()
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    print(f"| {what} | {time.perf_counter() - started:.1f} | {int(peak) / 1e6:.2f} |")
    return found


def rows(count):
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(100, 512, generator=generator)
    features = torch.randn(count, 512, generator=generator).mul_(0.3).add_(centres.repeat(-(-count // 100), 1)[:count])
    matrix, queries = FeatureMatrix.of(features), features[:10] + 0.1
    print(f"\n{count} rows of 512 features, {torch.get_num_threads()} threads\n")
    print("| what | seconds | peak memory so far, GB |\n|---|---|---|")
    _, near = timed("`similar`: 20 nearest to each of 10", lambda: nearest(queries, matrix, 20))
    centred = functional.normalize(features - features.mean(dim=0), dim=1)
    brute = functional.normalize(queries - features.mean(dim=0), dim=1) @ centred.T
    assert (brute.topk(20).indices.sort().values == near.sort().values).all()
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{number}.jpg" for number in range(count)]
        timed("`embed`: to Parquet", lambda: write_features(f"{folder}/rows.parquet", paths, matrix))
    labels = torch.full((count,), -1)
    first = timed("`next`: 50 without a label", lambda: choose(features, labels, 50, 0, None))
    labels[first] = first % 100 % 10
    timed("`next`: 50 more, given 50 labels", lambda: choose(features, labels, 50, 0, None))


if __name__ == "__main__":
    quiet_libraries()
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(__doc__)
    if sys.argv[1:2] == ["rows"]:
        rows(int((sys.argv[2:] or ["100000"])[0]))
    else:
        compare((sys.argv[1:] or [str(DEMO)])[0])
