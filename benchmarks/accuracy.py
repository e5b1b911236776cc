"""Test accuracy of the demo over five splits: the bundled backbone, and a random one on the same splits.

usage: python benchmarks/accuracy.py [--splits=5] [OPTION ...]

Options of `train` may follow and apply to both. Runs are written to a temporary folder.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from headstart.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent


def accuracies(weights: str, splits: int, options: list[str]) -> list[float]:
    """`test/acc` of a default run for each split seed."""
    with tempfile.TemporaryDirectory() as logs:
        found = []
        for seed in range(splits):
            fixed = [f"--model.weights={weights}", f"--data.split_seed={seed}", f"--logs={logs}"]
            found.append(main(["train", *options, *fixed], root=REPOSITORY / "data" / "clipart")["test/acc"])
    return found


if __name__ == "__main__":
    splits = next((int(a.split("=")[1]) for a in sys.argv[1:] if a.startswith("--splits=")), 5)
    given = [a for a in sys.argv[1:] if not a.startswith("--splits=")]
    table = {weights: accuracies(weights, splits, given) for weights in ("bundled", "random")}
    print(f"\n| weights | test accuracy, mean of {splits} splits | each split |\n|---|---|---|")
    for weights, found in table.items():
        each = ", ".join(f"{value:.3f}" for value in found)
        print(f"| {weights} | {statistics.mean(found):.3f} | {each} |")
