"""int8 beside fp32: test accuracy over splits, and which networks can be quantised.

    python benchmarks/int8.py accuracy NAME=FOLDER … [--lite0=FILE] [--splits=5]
    python benchmarks/int8.py networks [NAME …]

accuracy: the exact head, whose penalty the validation images choose, on features in fp32 and in int8, on the same
splits. `demo` is always there; folders with train/ and val/ are put together and split anew, and of a folder of more
than 1,500 images per class the first 1,500 are taken. FILE holds EfficientNet-Lite0's weights under timm's names.
networks: the cosine of the features with those in fp32, on 200 pictures of the demo, by which int8 is taken or refused.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch

from headstart import FrozenBackbone, ImageFolderData
from headstart.data.folders import images, of_splits, subfolders
from headstart.decoding import decode
from headstart.features import int8
from headstart.images import preprocess
from headstart.search.bank import score_and_loss
from headstart.search.exact import best_exact

DEMO = Path(__file__).parent.parent / "data/clipart"
NETWORKS = ("resnet18", "resnet50", "efficientnet_b0", "mobilenet_v3_large", "vit_b_16")
MOST, PICTURES = 1500, 200


def first(root, folder):
    """One folder per class with links to at most ``MOST`` images."""
    for part in of_splits(root):
        for name in subfolders(part):
            (folder / name).mkdir(exist_ok=True)
            for path in images(part / name)[: MOST - len(list((folder / name).iterdir()))]:
                (folder / name / f"{part.name}-{path.name}").symlink_to(path.resolve())
    return folder


def scores(root, backbone, precision, splits):
    """Test accuracies of the exact head, one per split."""
    found = []
    for seed in range(splits):
        data = ImageFolderData(str(root), split_seed=seed, feature_precision=precision)
        data.load(backbone, torch.device("cpu"))
        _, head = best_exact(data.labelled("train"), data.labelled("val"), len(data.class_names), tolerance=1e-3)
        found.append(score_and_loss(head.head, data.labelled("test"))[0])
    return found


def accuracy(folders, lite0, splits):
    backbones = {"resnet18, bundled": lambda: FrozenBackbone("resnet18", "bundled")}
    if lite0:
        backbones["EfficientNet-Lite0"] = lambda: FrozenBackbone("timm/tf_efficientnet_lite0", lite0)
    rows = []
    for name, make in backbones.items():
        for title, root in folders.items():
            with tempfile.TemporaryDirectory() as folder:
                root = first(root, Path(folder))
                fp32, in_int8 = (scores(root, make(), precision, splits) for precision in ("fp32", "int8"))
            each = [100 * (after - before) for before, after in zip(fp32, in_int8, strict=True)]
            rows.append((name, title, statistics.mean(fp32), statistics.mean(in_int8), each))
    print(f"\n| backbone | images | fp32 | int8 | points, each of {splits} splits |\n|---|---|---|---|---|")
    for name, title, before, after, each in rows:
        print(f"| {name} | {title} | {before:.4f} | {after:.4f} | {', '.join(f'{value:+.2f}' for value in each)} |")
    print(f"mean difference: {statistics.mean(100 * (row[3] - row[2]) for row in rows):+.2f} points")


def networks(names):
    print("| network, random weights | cosine | |\n|---|---|---|")
    for name in names or NETWORKS:
        torch.manual_seed(0)
        backbone = FrozenBackbone(name, "random")
        model, cosine = int8.quantise(backbone)
        paths = images(DEMO)[:: max(1, len(images(DEMO)) // PICTURES)][:PICTURES]
        settings = backbone.preprocessing
        pixels = torch.stack([preprocess(decode(path.read_bytes(), settings), settings) for path in paths])
        plain = int8.to_onnx(backbone, pixels[:1], ("images", "features")).SerializeToString()
        found = int8._cosine(int8.session(plain), int8.session(model), pixels)
        print(f"| {name} | {found:.4f} (calibration {cosine:.4f}) | {'taken' if cosine >= int8.FLOOR else 'refused'} |")


if __name__ == "__main__":
    mode, *rest = sys.argv[1:]
    given = dict(word.removeprefix("--").split("=", 1) for word in rest if "=" in word)
    if mode == "networks":
        networks([word for word in rest if "=" not in word])
    else:
        lite0, splits = given.pop("lite0", None), int(given.pop("splits", 5))
        accuracy({"demo": DEMO, **{name: Path(root) for name, root in given.items()}}, lite0, splits)
