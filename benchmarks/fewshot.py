"""Few-shot learning on frozen features: accuracy of every head, times, easyfsl on the same episodes, and a small tool.

    python benchmarks/fewshot.py heads --data.source=omniglot --data.root=small1.zip,small2.zip
    python benchmarks/fewshot.py times --data.source=omniglot --data.root=small1.zip,small2.zip
    python benchmarks/fewshot.py tool [path/to/folder]

`times` needs easyfsl (pip install easyfsl). `tool` learns from 5 pictures per class and tests on the others.
"""

import csv
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from headstart import FrozenBackbone, ImageFolderData
from headstart.cli import main
from headstart.data.splits import labels_of
from headstart.features.matrix import Labelled
from headstart.fewshot.compare import accuracies
from headstart.fewshot.data import EpisodeData
from headstart.fewshot.episodes import TaskSize
from headstart.fewshot.heads import Prototype
from headstart.search.bank import HeadSettings, Schedule, train_bank
from headstart.search.exact import accuracy_and_loss
from headstart.search.intervals import mean_and_half_width
from headstart.terminal import quiet_libraries

DEMO = Path(__file__).parent.parent / "data" / "clipart"
EPISODES = 1000
PICTURES = 5


def heads(options):
    """Every head before and after meta-training, trained and tested with the same number of examples."""
    found = {}
    with tempfile.TemporaryDirectory() as logs:
        for k_shot in (1, 5):
            name = f"--name=shots{k_shot}"
            main(["fewshot", "--head=all", "--train", f"--k_shot={k_shot}", f"--logs={logs}", name, *options])
            (table,) = Path(logs).glob(f"shots{k_shot}/*/heads.csv")
            with table.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["k_shot"]) == k_shot]
            found |= {(row["head"], k_shot): {name: row[name] for name in row if name != "head"} for row in rows}
    print("| head | 1-shot | gain on the baseline | 5-shot | gain on the baseline |\n|---|---|---|---|---|")
    for name in dict.fromkeys(head for head, _ in found):
        cells = []
        for k_shot in (1, 5):
            row = {key: float(value) for key, value in found[name, k_shot].items()}
            cells.append(f"{row['acc']:.3f} ± {row['ci95']:.3f}")
            cells.append("" if name == "prototype" else f"{row['gain']:+.3f} ± {row['gain_ci95']:.3f}")
        print(f"| {name} | {' | '.join(cells)} |")


def times(options):
    """Prototypes on 1,000 episodes, compared with easyfsl on the same; ANIL over 2,000 training episodes."""
    from easyfsl.methods import PrototypicalNetworks

    data = EpisodeData(**{option.removeprefix("--data.").split("=")[0]: option.split("=")[1] for option in options})
    data.load(FrozenBackbone(), torch.device("cpu"))
    sampler = data.sampler("test", TaskSize(5, 5, 10))
    ours, theirs, own, other = [], [], torch.empty(0), torch.empty(0)
    for _ in range(3):  # in turn, since the machine is shared
        started = time.perf_counter()
        own = accuracies(Prototype(), sampler, EPISODES)
        ours.append(time.perf_counter() - started)
        episodes = [sampler.batch([number]) for number in range(EPISODES)]
        model = PrototypicalNetworks(torch.nn.Identity()).eval()
        started = time.perf_counter()
        with torch.no_grad():
            other = torch.stack([_easyfsl(model, episode) for episode in episodes])
        theirs.append(time.perf_counter() - started)
    print(f"headstart, sampling included: {min(ours):.3f} s, accuracy {mean_and_half_width(own)[0]:.4f}")
    print(f"easyfsl, without sampling:    {min(theirs):.3f} s, accuracy {mean_and_half_width(other)[0]:.4f}")
    print(f"{min(theirs) / min(ours):.1f} times faster; episodes that differ in accuracy: {int((own != other).sum())}")
    with tempfile.TemporaryDirectory() as logs:
        epochs = ["--max_epochs=2", "--data.train_episodes=1000", "--k_shot=5", f"--logs={logs}"]
        result = main(["fewshot", "--head=anil", "--train", *epochs, *options])
    print(f"ANIL, 2,000 training episodes, validations and test: {result['seconds']['total']:.1f} s in all")


def _easyfsl(model, episode):
    n_way, k_shot = episode.support.shape[1:3]
    model.process_support_set(episode.support[0].flatten(0, 1), torch.arange(n_way).repeat_interleave(k_shot))
    return (model(episode.query[0].flatten(0, 1)).argmax(dim=1) == episode.labels).float().mean()


def tool(options):
    """5 pictures per class: saved as a checkpoint and evaluated, compared with a trained linear head."""
    root = Path(options[0]) if options else DEMO
    print("| head | seconds, with all imports of torch done | accuracy on the other pictures |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        few, rest = Path(folder) / "few", Path(folder) / "rest"
        for place in sorted(path for path in root.iterdir() if path.is_dir()):
            paths = sorted(place.iterdir())
            chosen = set(random.Random(0).sample(paths, PICTURES))
            for path in paths:
                target = (few if path in chosen else rest) / place.name
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        for head in ("prototype", "ridge"):
            checkpoint = f"{folder}/{head}.ckpt"
            started = time.perf_counter()
            main(["fewshot", f"--head={head}", f"--data.root={few}", f"--save={checkpoint}"])
            saved = time.perf_counter() - started
            options = [f"--data.root={rest}", f"--logs={folder}/logs", "--report=false"]
            acc = main(["evaluate", f"--ckpt_path={checkpoint}", *options])["test/acc"]
            print(f"| {head} | {saved:.2f} | {acc:.3f} |")
        print(f"| linear, AdamW, 25 epochs | | {_linear(few, rest):.3f} |")


def _linear(few, rest):
    backbone, device = FrozenBackbone(), torch.device("cpu")
    loaded = []
    for folder in (few, rest):
        data = ImageFolderData(str(folder))
        data.load(backbone, device)
        loaded.append(Labelled([data.store.matrix(data.items)], labels_of(data.items)))
    train, test = loaded
    settings = HeadSettings(lr=0.003, weight_decay=0.01, label_smoothing=0.1)
    schedule = Schedule(epochs=25, batch_size=32, warmup=0.04, seed=0)
    (trained,) = train_bank([settings], train, test, int(train.labels.max()) + 1, schedule, keep_last=True)
    return accuracy_and_loss(trained.head, test)[0]


if __name__ == "__main__":
    quiet_libraries()
    {"heads": heads, "times": times, "tool": tool}[sys.argv[1]](sys.argv[2:])
