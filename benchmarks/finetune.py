"""The head alone, fine-tuned layers, a whole network from random weights: test accuracy over five splits, and times.

usage: python benchmarks/finetune.py [FOLDER] [--splits=5] [--scratch=false] [OPTION ...]

FOLDER defaults to the demo; train/ and val/ are merged and split again. Options of `finetune` may follow and apply to
all fine-tuned networks. --scratch=false leaves out the
network from random weights, which takes most of the time. Runs are written to a temporary folder.
"""

import statistics
import sys
import tempfile
from pathlib import Path

from headstart.cli import main
from headstart.data.folders import images, of_splits, subfolders

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE = 128  # the size for which the bundled weights were trained; random ones would use 224
ONLINE = ["--data.cache=false", "--data.augment=light"]
SCRATCH = ["--batch_norm=train", "--model.lr=0.001", "--trainer.max_epochs=30"]
# Name -> weights, and options of `finetune`.
WAYS = {
    "layer4": ("bundled", ["--unfreeze=layer4"]),
    "all layers": ("bundled", ["--unfreeze=all", *ONLINE]),
    "whole network from random weights": ("random", ["--unfreeze=all", *ONLINE, *SCRATCH]),
}


def merged(root: Path, folder: Path) -> Path:
    """One folder per class, with links to the images of every split."""
    for part in of_splits(root):
        for name in subfolders(part):
            (folder / name).mkdir(exist_ok=True)
            for path in images(part / name):
                (folder / name / f"{part.name}-{path.name}").symlink_to(path)
    return folder


def measure(root: Path, seed: int, options: list[str], logs: str, scratch: bool) -> dict[str, tuple[float, float]]:
    """Test accuracy and seconds of each way, on one split."""
    common = [f"--logs={logs}", "--report=false"]
    split = [f"--data.root={root}", f"--data.split_seed={seed}", f"--model.image_size={SIZE}"]
    found = {}
    for weights in ("bundled", "random") if scratch else ("bundled",):
        head = main(["train", *split, f"--model.weights={weights}", f"--name={weights}-{seed}", *common])
        if weights == "bundled":
            found["head alone"] = head["test/acc"], head["seconds"]["total"]
        (checkpoint,) = Path(logs).glob(f"{weights}-{seed}/*/checkpoints/best.ckpt")
        for name, (of, way) in WAYS.items():
            if of == weights:
                result = main(["finetune", f"--ckpt_path={checkpoint}", *way, *common, *options])
                found[name] = result["test/acc"], result["seconds"]["total"]
    return found


if __name__ == "__main__":
    splits = next((int(a.split("=")[1]) for a in sys.argv[1:] if a.startswith("--splits=")), 5)
    scratch = "--scratch=false" not in sys.argv
    given = [a for a in sys.argv[1:] if a.startswith("--") and not a.startswith(("--splits=", "--scratch="))]
    root = next((Path(a).resolve() for a in sys.argv[1:] if not a.startswith("--")), REPOSITORY / "data/clipart")
    with tempfile.TemporaryDirectory() as logs, tempfile.TemporaryDirectory() as folder:
        data = merged(root, Path(folder))
        table = [measure(data, seed, given, logs, scratch) for seed in range(splits)]
    print(f"\n| {root.name} | test accuracy, mean of {splits} splits | each split | seconds |\n|---|---|---|---|")
    for name in table[0]:
        accuracies, seconds = zip(*(row[name] for row in table), strict=True)
        each = ", ".join(f"{value:.3f}" for value in accuracies)
        print(f"| {name} | {statistics.mean(accuracies):.3f} | {each} | {statistics.mean(seconds):.1f} |")
