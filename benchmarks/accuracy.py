"""Test accuracy of default runs: the demo over five splits and, if given, the tutorial's ants and bees.

usage: python benchmarks/accuracy.py [--splits=5] [--hymenoptera=FOLDER] [--lite0=FILE] [OPTION ...]

Each row is a backbone. FOLDER holds hymenoptera's train and val; its accuracy is that on val. FILE holds the ImageNet
weights of timm's tf_efficientnet_lite0 (docs/backbones.md says where they are). Options of `train` may follow and apply
to all. Runs are written to a temporary folder.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from headstart.cli import main

DEMO = Path(__file__).resolve().parent.parent / "data" / "clipart"
BACKBONES = {
    "resnet18, random": ["--model.weights=random", "--model.image_size=128"],
    "resnet18, bundled": ["--model.weights=bundled"],
    "resnet18, bundled, `layers=all`": ["--model.weights=bundled", "--model.layers=all"],
}


def run(root: Path, *options: str) -> dict[str, Any]:
    """The result of a run without a report."""
    with tempfile.TemporaryDirectory() as logs:
        result: dict[str, Any] = main(["train", f"--data.root={root}", "--report=false", f"--logs={logs}", *options])
        return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--hymenoptera", type=Path)
    parser.add_argument("--lite0")
    given, options = parser.parse_known_args()
    if given.lite0:
        lite0 = ["--model.backbone=timm/tf_efficientnet_lite0", f"--model.weights={given.lite0}"]
        BACKBONES["timm/tf_efficientnet_lite0, ImageNet"] = lite0
    rows = []
    for name, chosen in BACKBONES.items():
        seeds = [f"--data.split_seed={seed}" for seed in range(given.splits)]
        found = [run(DEMO, *options, *chosen, seed)["test/acc"] for seed in seeds]
        each = ", ".join(f"{value:.3f}" for value in found)
        bees = f"{run(given.hymenoptera, *options, *chosen)['val/acc']:.3f}" if given.hymenoptera else "-"
        rows.append(f"| {name} | {statistics.mean(found):.3f} ({each}) | {bees} |")
    print(f"\n| backbone | demo, mean of {given.splits} splits (each) | hymenoptera's val |\n|---|---|---|")
    print("\n".join(rows))
