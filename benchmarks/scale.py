"""Sixty thousand images, and a million rows.

usage: python benchmarks/scale.py cifar FOLDER [OPTION ...]
       python benchmarks/scale.py rows [1000000] [20]
       python benchmarks/scale.py files [1300000] [FOLDER]
       python benchmarks/scale.py heads

cifar: FOLDER holds train/ and test/ with CIFAR-10's images. Computes all features with the bundled backbone, then
       compares AdamW, the winner of `tune`, L-BFGS, and scikit-learn's LogisticRegression on the same matrix
       (`pip install scikit-learn`).
rows:  writes the given number of random rows of 512 features, of so many classes, as a cache, and trains a 10-epoch
       head on them through the data module; prints the time and the peak anonymous memory (Linux).
files: scans a tree of so many small files in 1,000 class folders, made of links in FOLDER (default: a temporary one),
       without and with its index; prints the processor's seconds and the peak anonymous memory (Linux).
heads: trains 64 heads at once and one alone on the demo's features, 25 epochs, without a Trainer.
"""

import ctypes
import hashlib
import itertools
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from pytorch_lightning import Trainer

from headstart import FrozenBackbone, ImageFolderData, TransferClassifier
from headstart.cli import main
from headstart.data.module import ImageData
from headstart.data.sources import FolderSource, Source
from headstart.data.splits import Item
from headstart.decoding import decode
from headstart.features.arithmetic import BATCH, chosen, dtype_of
from headstart.features.cache import FeatureCache, cache_key
from headstart.features.matrix import Shard
from headstart.images import preprocess
from headstart.search.bank import HeadSettings, Schedule, score_and_loss, train_bank
from headstart.search.exact import fit_exact
from headstart.verbs.tune import LABEL_SMOOTHINGS, LRS, WEIGHT_DECAYS


class Memory:
    """The peak of this process's anonymous memory, sampled."""

    def __init__(self) -> None:
        self.peak, self._running = 0, True
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while self._running:
            self.peak = max(self.peak, self.now())
            time.sleep(0.05)

    @staticmethod
    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Rows(Source):
    """Images that exist only as rows of the cache."""

    classes = 20

    def __init__(self, count: int) -> None:
        self.count, self.path = count, Path("rows")
        self.class_names = [str(label) for label in range(self.classes)]

    def scan(self, remembered: Path | None) -> tuple[list[Item], dict[str, str]]:
        return [Item(str(number), number % self.classes, row(number)) for number in range(self.count)], {}

    def read(self, item: Item, shorter_side: int, max_pixels: int) -> Image.Image:
        raise AssertionError(f"{item}: every row is in the cache")


def row(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()


def cache_of(data: ImageData, backbone: FrozenBackbone) -> FeatureCache:
    cpu, store = torch.device("cpu"), data.store
    backbone.preprocessing.bits = 16  # as for data without images of more bits
    arithmetic = chosen(store.feature_precision, backbone, cpu, 10**6, store.cache_dir)
    key = cache_key(backbone, cpu, dtype_of(arithmetic), store.max_pixels, {"policy": "none"})
    return FeatureCache(store.cache_dir, key)


def write_rows(cache: FeatureCache, count: int, piece: int = 4096) -> None:
    centres = torch.randn(Rows.classes, 512, generator=torch.Generator().manual_seed(0))
    (cache.folder / "locks").mkdir(parents=True)
    for start in range(0, count, piece):
        numbers = range(start, min(count, start + piece))
        generator = torch.Generator().manual_seed(start + 1)
        noise = torch.randn(len(numbers), 512, generator=generator)
        features = centres[[number % Rows.classes for number in numbers]] + 4 * noise
        data = Shard([row(number) for number in numbers], features, {}, 0.0).to_bytes()
        name = f"{start:024x}-{hashlib.sha256(data).hexdigest()}.safetensors"
        (cache.folder / name).write_bytes(data)


def rows(count: int) -> None:
    FeatureCache._agree = lambda *_: True  # there are no images to compare these rows with
    with tempfile.TemporaryDirectory() as folder:
        data = ImageData(Rows(count), cache_dir=folder, batch_size=1024)
        model = TransferClassifier(data.class_names)
        write_rows(cache_of(data, model.backbone), count)
        ctypes.CDLL(None).malloc_trim(0)  # what writing them took is given back
        before, memory, started = Memory.now(), Memory(), time.perf_counter()
        trainer = Trainer(
            max_epochs=10,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(model, datamodule=data)
        seconds = time.perf_counter() - started
        acc = trainer.test(model, datamodule=data, verbose=False)[0]["test/acc"]
    parts = ", ".join(f"{name} {value:.1f} s" for name, value in data.store.seconds.items())
    print(f"{count:,} rows of {Rows.classes} classes: {seconds:.1f} s for 10 epochs ({parts}), test/acc {acc:.3f}")
    print(f"peak anonymous memory {memory.peak / 1e9:.2f} GB ({before / 1e9:.2f} GB of it before the data)")


def cifar(root: str, options: list[str]) -> None:
    os.environ.setdefault("HEADSTART_CACHE", tempfile.mkdtemp())
    common = [f"--data.root={root}", "--data.batch_size=256", *options]
    result = main(["train", *common])
    data = ImageFolderData(root, batch_size=256)
    backbone = FrozenBackbone()
    data.load(backbone, torch.device("cpu"))
    shards = [Shard.open(path) for path in cache_of(data, backbone).folder.glob("*.safetensors")]
    images = sum(len(shard.rows) for shard in shards)
    extraction = sum(shard.seconds for shard in shards)
    print(f"extraction: {images:,} images at {images / extraction:.0f} images/s, limit {limit(data, backbone):.0f}")
    print(f"AdamW: test/acc {result['test/acc']:.4f}, fit {result['seconds']['fit']:.1f} s")
    started = time.perf_counter()
    tuned = main(["tune", *common])
    print(f"tune: test/acc {tuned['result']['test/acc']:.4f}, {len(tuned['settings'])} heads and the optimum")
    seconds, last = time.perf_counter() - started, tuned["result"]["seconds"]["fit"]
    print(f"tune took {seconds:.1f} s in all, its last run {last:.1f} s")
    compare(data, tuned["exact"]["l2"])


def limit(data: ImageFolderData, backbone: FrozenBackbone, count: int = 3200) -> float:
    """Images per second of decoding with one thread per core, then one forward pass, on ``count`` images."""
    from concurrent.futures import ThreadPoolExecutor

    cpu = torch.device("cpu")
    fast = backbone.for_extraction(dtype_of(chosen("auto", backbone, cpu, 10**6, data.store.cache_dir)), cpu)
    paths = [data.source.path / item.path for item in random.Random(0).sample(data.items, count)]

    def pixels(path: Path) -> torch.Tensor:
        return preprocess(decode(path.read_bytes(), backbone.preprocessing), backbone.preprocessing)

    started = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.no_grad():
        images = list(pool.map(pixels, paths))
        for start in range(0, count, BATCH):
            fast(torch.stack(images[start : start + BATCH]))
    return count / (time.perf_counter() - started)


def compare(data: ImageFolderData, l2: float) -> None:
    from sklearn.linear_model import LogisticRegression

    train, test = data.labelled("train"), data.labelled("test")
    started = time.perf_counter()
    head = fit_exact(train, len(data.class_names), l2)
    print(f"L-BFGS: test/acc {score_and_loss(head, test)[0]:.4f}, {time.perf_counter() - started:.1f} s, L2 {l2:g}")
    whole = [labelled.views[0].whole().numpy() for labelled in (train, test)]
    started = time.perf_counter()
    model = LogisticRegression(C=1 / (l2 * len(train)), max_iter=2000).fit(whole[0], train.labels.numpy())
    acc = model.score(whole[1], test.labels.numpy())
    print(f"scikit-learn: test/acc {acc:.4f}, {time.perf_counter() - started:.1f} s, the same L2")


def files(count: int, folder: Path) -> None:
    pictures, root = [folder / f"{number}.png" for number in range(50)], folder / "tree"
    for number, path in enumerate(pictures):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    for label in range(1000):
        (root / f"class{label:04}").mkdir(parents=True)
        for number in range(count // 1000):
            os.link(pictures[(label + number) % 50], root / f"class{label:04}" / f"image_{number:06}.png")
    time.sleep(3)  # a file changed just now may change again unnoticed, and is not kept in the index
    before, memory = Memory.now(), Memory()
    for way in ("without", "with"):
        started = time.process_time()
        items, _ = FolderSource(str(root)).scan(folder / "index")
        print(f"{len(items):,} files, {way} an index: {time.process_time() - started:.1f} s of a processor")
        del items
    print(f"peak anonymous memory {memory.peak / 1e9:.2f} GB ({before / 1e9:.2f} GB of it before the scan)")


def heads() -> None:
    data = ImageFolderData(str(Path(__file__).resolve().parent.parent / "data" / "clipart"))
    data.load(FrozenBackbone(), torch.device("cpu"))
    grid = [HeadSettings(*values) for values in itertools.product(LRS, WEIGHT_DECAYS, LABEL_SMOOTHINGS)]
    schedule = Schedule(epochs=25, batch_size=32, warmup=0.04, seed=0)
    seconds = []
    for settings in ([grid[0]], grid, [grid[0]], grid):
        started = time.perf_counter()
        train_bank(settings, data.labelled("train"), data.labelled("val"), len(data.class_names), schedule)
        seconds.append(time.perf_counter() - started)
        print(f"{len(settings)} heads: {seconds[-1]:.2f} s")
    print(f"{len(grid)} heads take {seconds[3] / seconds[2]:.1f} times as long as one")


if __name__ == "__main__":
    if sys.argv[1] == "rows":
        Rows.classes = int(sys.argv[3]) if len(sys.argv) > 3 else 20
        rows(int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000)
    elif sys.argv[1] == "files":
        with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as made:
            files(int(sys.argv[2]) if len(sys.argv) > 2 else 1_300_000, Path(made))
    elif sys.argv[1] == "heads":
        heads()
    else:
        cifar(str(Path(sys.argv[2]).resolve()), sys.argv[3:])
