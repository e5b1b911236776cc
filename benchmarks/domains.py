"""Leave-one-domain-out beside a plain scikit-learn loop on the same features and splits.

usage: python benchmarks/domains.py FOLDER [OPTION ...]     options of `headstart domains`
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from headstart.cli import main
from headstart.data import splits
from headstart.data.sources import open_source
from headstart.data.store import FeatureStore
from headstart.domains.leave_out import check_domains
from headstart.features.matrix import Key
from headstart.model.backbone import FrozenBackbone
from headstart.search.exact import PENALTIES


def plain(root: Path) -> dict[str, float]:
    """Accuracy on each domain by scikit-learn, the penalty chosen on validation images of the others by loss."""
    source = open_source(str(root), None, "domains")
    store = FeatureStore(source)
    store.load(FrozenBackbone(), torch.device("cpu"))
    items = splits.assign(store.items, source.class_names, 0.15, 0.15, 0)
    rows, labels = store.matrix(items).whole().double().numpy(), splits.labels_of(items).numpy()
    domains, part = np.array([item.domain for item in items]), np.array([item.split for item in items])
    digests: list[Key] = [item.digest for item in items]
    found = {}
    for domain in check_domains(items, source.class_names):
        there = {digest for digest, name in zip(digests, domains, strict=True) if name == domain}
        outside = np.array([digest not in there for digest in digests])
        train, val = (outside & (part == name) for name in ("train", "val"))
        scaled = StandardScaler().fit(rows[train]).transform(rows)
        heads = [
            LogisticRegression(C=1 / (l2 * train.sum()), max_iter=5000, tol=1e-5).fit(scaled[train], labels[train])
            for l2 in PENALTIES
        ]
        losses = [-head.predict_log_proba(scaled[val])[np.arange(val.sum()), labels[val]].mean() for head in heads]
        found[domain] = float(heads[int(np.argmin(losses))].score(scaled[domains == domain], labels[domains == domain]))
    return found


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as logs:
        ours = main(["domains", f"--data.root={root}", f"--logs={logs}", *sys.argv[2:]])
    for name, acc in plain(root).items():
        own = next(row["acc"] for row in ours if row["domain"] == name)
        print(f"{name:20} headstart {own:.4f}  scikit-learn {acc:.4f}  difference {own - acc:+.4f}")
