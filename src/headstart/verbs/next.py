"""The `next` command: which unlabelled images to label next."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from headstart.errors import UserError
from headstart.files import csv_bytes, new_path, write_new
from headstart.label.answers import COLUMNS, Answers
from headstart.label.choose import choose
from headstart.label.heap import add_features, folder_of_images, load
from headstart.model.classifier import TransferClassifier
from headstart.parser import parser_of, required
from headstart.ranges import Positive, Seed
from headstart.terminal import quiet_libraries, say


def next(options: Sequence[str]) -> dict[str, int]:
    """Chooses images to label: without labels the most typical ones, else uncertain and diverse ones.

    Returns the number of `images` of different content, of those `labelled`, and of those `chosen`.
    """
    quiet_libraries()
    parser = parser_of("next")
    parser.add_argument("--data.root", type=str | None, help="folder of images, with or without subfolders")
    parser.add_argument(
        "--labels", type=str | None, help="CSV file of path and label, such as that of `headstart label`"
    )
    parser.add_argument("--n", type=Positive, default=50, help="number of images to choose")
    parser.add_argument("--output", type=str, default="next.csv", help="new CSV file of path and an empty label")
    parser.add_argument("--seed", type=Seed, default=0, help="seed of clusters and samples")
    add_features(parser)
    given = parser.parse_args(list(options))
    required(given, "--data.root")
    output = new_path("--output", given.output)
    source = folder_of_images(given.data.root)
    answers = Answers(Path(given.labels)).labels if given.labels else {}
    if given.labels and not answers:
        raise UserError(f"--labels={given.labels}: contains no label; leave it out")
    store, module = load(source, given)
    if module and module.hparams["multilabel"]:
        raise UserError("--ckpt_path: its head gives several labels, but the choice is by the most probable one")
    label_of = {item.digest: answers[path] for item in store.items if (path := source.root / item.path) in answers}
    if answers:
        say(f"labels:   {len(label_of)} images of {source.root} have one of the {len(answers)} labels")
    items = list({item.digest: item for item in store.items}.values())  # one of each content
    names = sorted(set(label_of.values()))
    labels = torch.tensor([names.index(label_of[item.digest]) if item.digest in label_of else -1 for item in items])
    if not (left := int((labels < 0).sum())):
        raise UserError(f"--data.root={given.data.root}: every image is labelled")
    head = partial(_probabilities, module) if module else None
    chosen = choose(store.matrix(items).whole(), labels, min(given.n, left), given.seed, head).tolist()
    paths = [os.path.relpath(source.root / items[row].path, output.parent.resolve()) for row in chosen]
    write_new("--output", output, csv_bytes([COLUMNS, *([Path(path).as_posix(), ""] for path in paths)]))
    say(f"next:     {len(chosen)} of {left} unlabelled images: {output}")
    say(f"label:    headstart label --data.root={given.data.root} --queue={output}")
    return {"images": len(items), "labelled": len(items) - left, "chosen": len(chosen)}


@torch.no_grad()
def _probabilities(module: TransferClassifier, features: Tensor) -> Tensor:
    found: Tensor = module.task.probabilities(module.head(features))
    return found
