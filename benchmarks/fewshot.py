"""Few-shot learning on frozen features: accuracy of every head, times, easyfsl on the same episodes, and a small tool.

    python benchmarks/fewshot.py heads --data.source=omniglot --data.root=small1.zip,small2.zip
    python benchmarks/fewshot.py times --data.source=omniglot --data.root=small1.zip,small2.zip
    python benchmarks/fewshot.py tool [path/to/folder]
    python benchmarks/fewshot.py saved --data.source=folder --data.root=path/to/folder
    python benchmarks/fewshot.py domains path/to/pacs

`times` needs easyfsl (pip install easyfsl). `tool` learns from 5 pictures per class and tests on the others. `saved`
compares what --save learns with scikit-learn; `domains` meta-trains on some domains and tests on another.
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
from headstart.fewshot.heads import Prototype, make_head
from headstart.fewshot.save import fitted
from headstart.search.bank import HeadSettings, Schedule, score_and_loss, train_bank
from headstart.search.intervals import mean_and_half_width
from headstart.terminal import quiet_libraries

DEMO = Path(__file__).parent.parent / "data" / "clipart"
EPISODES = 1000
DRAWS = 10
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


def saved(options):
    """Every head that can be saved, and scikit-learn's on the same features: accuracy on the rest, ten draws.

    Of more than 12 classes, each draw takes 10.
    """
    given = {option.removeprefix("--data.").split("=")[0]: option.split("=")[1] for option in options}
    data = EpisodeData(**given, test_fraction=1.0)
    data.load(FrozenBackbone(), torch.device("cpu"))
    by_class = data.all_support()
    if data.classes.groups != data.class_names and given.get("source") == "domains":  # the domains of a class together
        merged = {}
        for name, rows in zip(data.class_names, by_class, strict=True):
            merged.setdefault(name.split("/")[1], []).append(rows)
        by_class = [torch.cat(rows) for rows in merged.values()]
    found = {}
    shots = [k_shot for k_shot in (1, 5, 10) if k_shot < min(map(len, by_class))]
    for k_shot in shots:
        for draw in range(DRAWS):
            random_ = random.Random(draw)
            chosen = by_class if len(by_class) <= 12 else random_.sample(by_class, 10)
            orders = [torch.tensor(random_.sample(range(len(rows)), len(rows))) for rows in chosen]
            few = [rows[order[:k_shot]] for rows, order in zip(chosen, orders, strict=True)]
            rest = [rows[order[k_shot:]] for rows, order in zip(chosen, orders, strict=True)]
            truth = torch.arange(len(rest)).repeat_interleave(torch.tensor([len(rows) for rows in rest]))
            for name, predicted in _predictions(few, torch.cat(rest)).items():
                found.setdefault((name, k_shot), []).append(float((predicted == truth).float().mean()))
    print(f"| head, pictures per class | {' | '.join(map(str, shots))} |\n|---{'|---' * len(shots)}|")
    for name in dict.fromkeys(name for name, _ in found):
        print(f"| {name} | {' | '.join(f'{sum(found[name, k]) / DRAWS:.3f}' for k in shots)} |")


def _predictions(few, rows):
    """The label of each row by each head that learnt from ``few``, [K, D] per class."""
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
    from sklearn.model_selection import LeaveOneOut
    from sklearn.neighbors import NearestCentroid

    support = torch.cat(few)
    labels = torch.arange(len(few)).repeat_interleave(len(few[0]))
    found = {}
    for name in ("prototype", "ridge", "logistic"):
        for options in ({}, {"centre": True, "l2": True}):
            head = fitted(make_head(name, len(few), support.shape[1], **options), few).head
            found[f"{name}, centred, length 1" if options else name] = head(rows).argmax(dim=1)
    logistic = LogisticRegression(max_iter=1000)
    if len(few[0]) > 1:
        strengths = [10.0**power for power in range(-4, 1)]
        logistic = LogisticRegressionCV(Cs=strengths, cv=LeaveOneOut(), max_iter=1000)
    # Both see the features in an orthonormal basis of their span, which changes no prediction and is fast.
    basis = torch.linalg.qr(support.T)[0]
    for name, model in {"LogisticRegression": logistic, "NearestCentroid": NearestCentroid()}.items():
        model.fit((support @ basis).numpy(), labels.numpy())
        found[f"scikit-learn's {name}"] = torch.from_numpy(model.predict((rows @ basis).numpy()))
    return found


def domains(options):
    """The projection, meta-trained on some domains, on another: gain on the baseline, with and without shrinking."""
    pacs = options[0]
    ways = {
        f"the other domains -> {name}": ["--data.source=domains", f"--data.root={pacs}", f"--data.test_domain={name}"]
        for name in sorted(place.name for place in Path(pacs).iterdir() if place.is_dir())
    }
    third = ["--val_source=folder", f"--val_root={DEMO}"]
    ways["domains -> glyphs"] = ["--data.source=domains", f"--data.root={pacs}", "--test_source=glyphs", *third]
    ways["glyphs -> domains"] = ["--data.source=glyphs", "--test_source=domains", f"--test_root={pacs}", *third]
    ways["glyphs -> domains, no third"] = ways["glyphs -> domains"][:-2]
    print("| meta-trained on -> tested on | shots | baseline | gain |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as logs:
        for way, given in ways.items():
            for k_shot in (1, 5):
                options = ["--head=projection", "--train", f"--k_shot={k_shot}", "--n_query=10", f"--logs={logs}"]
                found = main(["fewshot", *options, "--max_epochs=3", *given])
                gain = f"{found['gain/acc']:+.3f} ± {found['gain/acc_ci95']:.3f}"
                print(f"| {way} | {k_shot} | {found['baseline/acc']:.3f} | {gain} |", flush=True)


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
    return score_and_loss(trained.head, test)[0]


if __name__ == "__main__":
    quiet_libraries()
    {"heads": heads, "times": times, "tool": tool, "saved": saved, "domains": domains}[sys.argv[1]](sys.argv[2:])
