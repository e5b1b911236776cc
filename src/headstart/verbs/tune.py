"""The verb `tune`: a grid of heads trained at once, the exact optimum, then one run with the winner."""

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from headstart.data.splits import Item
from headstart.errors import UserError
from headstart.files import csv_bytes, write_atomically
from headstart.fit.cli import TrainCLI, program, train
from headstart.ranges import Fraction, NonNegative, Positive, Rate
from headstart.runs.folder import claim
from headstart.search.bank import Head, Scored, Setting, fit_exact, score, train_bank
from headstart.terminal import be_calm, images_bar, say

LRS = [0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03]
WEIGHT_DECAYS = [0.0, 0.01, 0.1, 1.0]
LABEL_SMOOTHINGS = [0.0, 0.1]
# Of the exact optimum, from strong to weak: each starts where the one before ended.
STRENGTHS = [10.0**-power for power in range(7)]
# Two-sided 95 % quantiles of Student's t, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SHOWN = 10


class TuneCLI(TrainCLI):
    """The options of `train`, and those of the search."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--tune.lr", type=list[Rate], default=LRS, help="learning rates of the grid")
        parser.add_argument("--tune.weight_decay", type=list[NonNegative], default=WEIGHT_DECAYS, help="of the grid")
        parser.add_argument("--tune.label_smoothing", type=list[Fraction], default=LABEL_SMOOTHINGS, help="of the grid")
        parser.add_argument(
            "--tune.draws", type=Positive | None, help="draw so many settings between the grid's ends; None: the grid"
        )
        parser.add_argument("--folds", type=Positive | None, help="cross-validate the winner on so many folds, 2 to 10")


def tune(options: Sequence[str], root: Path | None = None) -> dict[str, Any]:
    """Trains the grid at once, fits the exact optimum, and trains once more with the winner.

    Args:
        options: of the command line; those of `train` hold for every head.
        root: the data's root where none is given.

    Returns:
        `settings` (one a head, best first), `exact`, `folds`, the winner's `recipe`, and `result` of the final run.

    Raises:
        UserError: a mistake in the options or the data.
    """
    be_calm()
    cli = TuneCLI(options, root)
    data, config = cli.datamodule, cli.config
    if not data.cache:
        raise UserError("--data.cache=false: the search is on cached features; leave the cache on")
    if config.folds is not None and config.folds - 1 not in T95:
        raise UserError(f"--folds={config.folds}: give 2 to {max(T95) + 1}")
    data.load(cli.model.backbone, cli.trainer.strategy.root_device)
    settings = _settings(config.tune, int(config.seed_everything))
    ranked = _train_grid(cli, settings)
    exact = _fit_exact(cli)
    folds = _cross_validate(cli, ranked[0][0], config.folds) if config.folds else []
    folder = claim(cli.logs, f"{cli.name}-tune")
    common, recipe = _write(folder, cli, ranked)
    _say_table(ranked, exact, folds, folder)
    result = train([f"--config={common}", f"--config={recipe}"], root)
    say(f"recipe:   {recipe}    ({program()} --config={recipe})")
    return {
        "settings": [vars(setting) | {"val/acc": found.acc, "val/loss": found.loss} for setting, found in ranked],
        "exact": exact,
        "folds": folds,
        "recipe": str(recipe),
        "result": result,
    }


def _settings(grid: Any, seed: int) -> list[Setting]:
    """The grid; or draws between its ends, uniform in the logarithm where that exists."""
    if grid.draws is None:
        product = itertools.product(grid.lr, grid.weight_decay, grid.label_smoothing)
        return [Setting(*map(float, values)) for values in product]
    generator = random.Random(seed)

    def draw(values: Sequence[float]) -> float:
        low, high = min(values), max(values)
        if low > 0:
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        return generator.uniform(low, high)

    return [Setting(draw(grid.lr), draw(grid.weight_decay), draw(grid.label_smoothing)) for _ in range(grid.draws)]


def _train_grid(cli: TuneCLI, settings: Sequence[Setting]) -> list[tuple[Setting, Scored]]:
    """Every setting and its head's validation, the best first: by accuracy, among equals by the loss."""
    data, epochs = cli.datamodule, int(cli.config.trainer.max_epochs)
    labels = data.labels("train")
    with images_bar(f"{len(settings)} heads", len(labels) * epochs) as advance:
        found = train_bank(
            settings,
            data.views_of("train"),
            labels,
            (data.features("val"), data.labels("val")),
            len(data.class_names),
            epochs,
            data.batch_size,
            float(cli.config.model.warmup),
            int(cli.config.seed_everything),
            advance,
        )
    return sorted(zip(settings, found, strict=True), key=lambda pair: (-pair[1].acc, pair[1].loss))


def _fit_exact(cli: TuneCLI) -> dict[str, float]:
    """The exact optimum at the strength that validates best, and its test."""
    data = cli.datamodule
    head: Head | None = None
    best: tuple[tuple[float, float], float, Head] | None = None
    for strength in STRENGTHS:
        head = fit_exact(data.features("train"), data.labels("train"), len(data.class_names), strength, head)
        acc, loss = score(head, data.features("val"), data.labels("val"))
        if best is None or (acc, -loss) > best[0]:
            best = (acc, -loss), strength, head
    assert best
    (acc, negative), strength, head = best
    found = {"l2": strength, "val/acc": acc, "val/loss": -negative}
    if data.of("test"):
        found["test/acc"] = score(head, data.features("test"), data.labels("test"))[0]
    return found


def _cross_validate(cli: TuneCLI, setting: Setting, folds: int) -> list[float]:
    """Accuracy of the setting on each fold of the training and validation images; identical images share a fold."""
    data = cli.datamodule
    items = data.of("train") + data.of("val")
    parts = [[item for item in items if item.digest[-1] % folds == number] for number in range(folds)]
    if not all(parts):
        raise UserError(f"--folds={folds}: a fold has no image; give fewer")
    accuracies = []
    for part in parts:
        outside = set(part)
        inside = [item for item in items if item not in outside]
        trained = train_bank(
            [setting],
            [data.features_of(inside)],
            _labels(inside),
            (data.features_of(part), _labels(part)),
            len(data.class_names),
            int(cli.config.trainer.max_epochs),
            data.batch_size,
            float(cli.config.model.warmup),
            int(cli.config.seed_everything),
            keep_last=True,
        )
        accuracies.append(trained[0].acc)
    return accuracies


def _labels(items: Sequence[Item]) -> Tensor:
    return torch.tensor([item.label for item in items])


def interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % t-interval."""
    return T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))


def _write(folder: Path, cli: TuneCLI, ranked: Sequence[tuple[Setting, Scored]]) -> tuple[Path, Path]:
    """The table, a run a head for the HParams tab, the search's configuration, and the winner's as a recipe."""
    columns = [*vars(ranked[0][0]), "val/acc", "val/loss", "epoch"]
    rows = ([*vars(setting).values(), found.acc, found.loss, found.epoch] for setting, found in ranked)
    write_atomically(folder / "heads.csv", csv_bytes([columns, *rows]))
    with SummaryWriter(str(folder)) as events:
        for number, (setting, found) in enumerate(ranked):
            scores = {"hp/val_acc": found.acc, "hp/val_loss": found.loss}
            events.add_hparams(vars(setting), scores, run_name=f"head{number:03}")
    config = yaml.safe_load(cli.resolved_config())
    common = {name: value for name, value in config.items() if name not in ("tune", "folds")}
    write_atomically(folder / "config.yaml", yaml.safe_dump(common, sort_keys=False).encode())
    recipe = {"model": vars(ranked[0][0])}
    write_atomically(folder / "winner.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())
    return folder / "config.yaml", folder / "winner.yaml"


def _say_table(
    ranked: Sequence[tuple[Setting, Scored]], exact: dict[str, float], folds: Sequence[float], folder: Path
) -> None:
    title = f"the best {min(SHOWN, len(ranked))} of {len(ranked)} heads, by validation"
    table = Table("lr", "weight decay", "label smoothing", "val/acc", "val/loss", "epoch", title=title)
    for setting, found in ranked[:SHOWN]:
        values = [f"{value:.3g}" for value in vars(setting).values()]
        table.add_row(*values, f"{found.acc:.3f}", f"{found.loss:.3f}", str(found.epoch))
    say(table)
    tested = f", test/acc {exact['test/acc']:.3f}" if "test/acc" in exact else ""
    say(f"exact:    L2 strength {exact['l2']:g}, val/acc {exact['val/acc']:.3f}{tested} (L-BFGS, no steps to tune)")
    if folds:
        mean = statistics.mean(folds)
        say(f"folds:    the winner's accuracy is {mean:.3f} +- {interval(folds):.3f} (95 %, {len(folds)} folds)")
    say(f"heads:    {folder / 'heads.csv'}")
