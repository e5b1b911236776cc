"""Share of 20 randomly changed labels that are among the first that `headstart check` lists.

    python benchmarks/labels.py [path/to/folder]

Mean of five seeds; compared with a ranking by the loss of plain features over five folds, and with chance.
"""

import argparse
from pathlib import Path

import torch

from headstart import FrozenBackbone, ImageFolderData
from headstart.audit.findings import near_groups
from headstart.audit.labels import FOLDS, losses, out_of_fold
from headstart.features.matrix import Labelled
from headstart.search.exact import fit_exact
from headstart.search.neighbours import NEAR, neighbours, rooted
from headstart.terminal import quiet_libraries

CHANGED, SEEDS, FIRST = 20, 5, (20, 40, 60)
DEMO = Path(__file__).parent.parent / "data" / "clipart"


def plain_losses(matrix, labels, classes):
    """Out-of-fold losses of heads fitted once on five folds, at scikit-learn's default strength (C = 1)."""
    folds = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % FOLDS
    found = torch.zeros(len(labels), classes)
    for fold in range(FOLDS):
        inside, outside = (folds != fold).nonzero()[:, 0], (folds == fold).nonzero()[:, 0]
        head = fit_exact(Labelled([matrix.take(inside)], labels[inside]), classes, 1 / len(inside))
        found[outside] = head(matrix.gather(outside)).log_softmax(dim=1)
    return losses(found, labels)


def main():
    quiet_libraries()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", default=str(DEMO))
    data = ImageFolderData(parser.parse_args().root)
    data.load(FrozenBackbone(), torch.device("cpu"))
    matrix, classes = data.store.matrix(data.items), len(data.class_names)
    features = rooted(matrix.whole())
    truth = torch.tensor([item.label for item in data.items])
    digests = [item.digest for item in data.items]
    near = near_groups(neighbours(features, digests, k=1, threshold=NEAR).pairs, digests)
    groups = torch.arange(len(truth))
    for group in near:
        groups[group] = min(group)
    shares = {"headstart check": [], "loss of five folds": []}
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        changed = torch.randperm(len(truth), generator=generator)[:CHANGED]
        labels = truth.clone()
        labels[changed] = (labels[changed] + torch.randint(1, classes, (CHANGED,), generator=generator)) % classes
        rankings = {
            "headstart check": losses(out_of_fold(features, labels, classes, groups), labels),
            "loss of five folds": plain_losses(matrix, labels, classes),
        }
        for name, doubt in rankings.items():
            order = doubt.argsort(descending=True)
            shares[name].append([float(torch.isin(changed, order[:first]).float().mean()) for first in FIRST])
    print(f"| ranking | {' | '.join(f'first {first}' for first in FIRST)} |\n|---|---|---|---|")
    for name, found in shares.items():
        print(f"| {name} | {' | '.join(f'{share:.2f}' for share in torch.tensor(found).mean(dim=0).tolist())} |")
    print(f"| chance | {' | '.join(f'{first / len(truth):.2f}' for first in FIRST)} |")


if __name__ == "__main__":
    main()
