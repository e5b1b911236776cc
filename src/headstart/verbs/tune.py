"""The `tune` command: trains a grid of heads at once, fits the exact optimum, then runs the winner."""

import itertools
import json
import math
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from headstart.data.splits import check_training, folds_of, labels_of
from headstart.errors import UserError
from headstart.features.matrix import Labelled
from headstart.files import csv_bytes, write_atomically
from headstart.fit.cli import TrainCLI
from headstart.fit.run import finish, fit, report, test
from headstart.ranges import Fraction, NonNegative, Positive, Rate
from headstart.runs.folder import new_run_folder
from headstart.search.bank import HeadSettings, Schedule, TrainedHead, train_bank
from headstart.search.exact import accuracy_and_loss, fit_exact
from headstart.search.intervals import mean_and_half_width
from headstart.terminal import Seconds, images_bar, program, quiet_libraries, rank, say

LRS = [0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03]
WEIGHT_DECAYS = [0.0, 0.01, 0.1, 1.0]
LABEL_SMOOTHINGS = [0.0, 0.1]
# Penalties of the exact optimum, from strong to weak: each fit starts from the previous one.
PENALTIES = [10.0**-power for power in range(7)]
SHOWN = 10
TUNED = "HEADSTART_TUNED"  # environment variable that passes the final run's options to its other processes


class TuneCLI(TrainCLI):
    """The options of `train`, and those of the search."""

    usage = "headstart tune [options]"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--tune.lr", type=list[Rate], default=LRS, help="learning rates of the grid")
        parser.add_argument(
            "--tune.weight_decay", type=list[NonNegative], default=WEIGHT_DECAYS, help="weight decays of the grid"
        )
        parser.add_argument(
            "--tune.label_smoothing", type=list[Fraction], default=LABEL_SMOOTHINGS, help="label smoothings of the grid"
        )
        parser.add_argument(
            "--tune.draws",
            type=Positive | None,
            help="settings to draw between the grid's ends; None: use the grid",
        )
        parser.add_argument("--folds", type=Positive | None, help="number of folds to cross-validate the winner")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Rejects a checkpoint: a search takes seconds and is repeated; its final run is one of ``train``."""
        super().parse_arguments(parser, args)
        if self.checkpoint:
            raise UserError(
                "--ckpt_path: a search cannot be resumed; repeat it, or resume its final run with "
                f"{program('train')} --ckpt_path=last"
            )

    @property
    def schedule(self) -> Schedule:
        """The training schedule of every head."""
        epochs, warmup = int(self.config.trainer.max_epochs), float(self.config.model.warmup)
        return Schedule(epochs, self.datamodule.batch_size, warmup, int(self.config.seed_everything))


def tune(options: Sequence[str], root: Path | None = None) -> dict[str, Any]:
    """Trains the grid at once, fits the exact optimum, and trains the winner in a run.

    Returns `settings` (one per head, best first), `exact`, `folds`, the winner's `recipe`, and its `result`.
    """
    quiet_libraries()
    if rank() > 0:  # a further process of the final run, which Lightning starts with the same command line
        if TUNED not in os.environ:
            raise UserError("tune: the search runs in one process; use --trainer.devices instead of torchrun")
        return {"result": _train_winner(json.loads(os.environ[TUNED]), root)}
    cli = TuneCLI(options, root)
    data, config = cli.datamodule, cli.config
    if not data.store.cache:
        raise UserError("--data.cache=false: the search needs cached features; leave the cache on")
    if config.model.head != "linear":
        raise UserError(f"--model.head={config.model.head}: the search trains linear heads only; leave it out")
    if empty := [name for name in ("lr", "weight_decay", "label_smoothing") if not config.tune[name]]:
        raise UserError(f"--tune.{empty[0]}=[]: give at least one value, or leave it out")
    if config.folds == 1:
        raise UserError("--folds=1: give 2 or more")
    data.load(cli.model.backbone, cli.trainer.strategy.root_device)
    check_training(data.items, data.class_names)
    if not data.items_in("val"):
        raise UserError(
            "tune: there is no validation image, but the search chooses by validation; add some to that split"
        )
    ranked = _train_grid(cli, _settings(config.tune, int(config.seed_everything)))
    exact = _fit_exact(cli)
    folds = _cross_validate(cli, ranked[0][0], config.folds) if config.folds else []
    folder = new_run_folder(cli.logs, f"{cli.name}-tune")
    common, recipe = _write(folder, cli, ranked)
    _say_table(ranked, exact, folds, folder)
    winner = [f"--config={common}", f"--config={recipe}"]
    os.environ[TUNED] = json.dumps(winner)
    result = _train_winner(winner, root)
    say(f"recipe:   {recipe}    ({program('train')} --config={recipe})")
    return {
        "settings": [vars(settings) | {"val/acc": found.acc, "val/loss": found.loss} for settings, found in ranked],
        "exact": exact,
        "folds": folds,
        "recipe": str(recipe),
        "result": result,
    }


def _train_winner(options: Sequence[str], root: Path | None) -> dict[str, Any]:
    """Trains the winner, as `train` does."""
    seconds, cli = Seconds(), TrainCLI(options, root)
    fit(cli, seconds)
    scores = test(cli, seconds)
    report(cli, scores, seconds)
    return finish(cli, scores, seconds)


def _settings(grid: Any, seed: int) -> list[HeadSettings]:
    """The grid, or random draws between its ends: log-uniform, or uniform from a low end of 0."""
    if grid.draws is None:
        product = itertools.product(grid.lr, grid.weight_decay, grid.label_smoothing)
        return [HeadSettings(*map(float, values)) for values in product]
    generator = random.Random(seed)

    def draw(values: Sequence[float]) -> float:
        low, high = min(values), max(values)
        if low > 0:
            return math.exp(generator.uniform(math.log(low), math.log(high)))
        return generator.uniform(low, high)

    return [HeadSettings(draw(grid.lr), draw(grid.weight_decay), draw(grid.label_smoothing)) for _ in range(grid.draws)]


def _train_grid(cli: TuneCLI, settings: Sequence[HeadSettings]) -> list[tuple[HeadSettings, TrainedHead]]:
    """Trains all settings; returns them with their heads, best first by validation accuracy, then by loss."""
    data = cli.datamodule
    train, val = data.labelled("train"), data.labelled("val")
    with images_bar(f"{len(settings)} heads", len(train) * cli.schedule.epochs) as advance:
        found = train_bank(settings, train, val, len(data.class_names), cli.schedule, advance)
    return sorted(zip(settings, found, strict=True), key=lambda pair: (-pair[1].acc, pair[1].loss))


def _fit_exact(cli: TuneCLI) -> dict[str, float]:
    """Scores of the exact optimum at the L2 penalty with the best validation."""
    data = cli.datamodule
    train, val = data.labelled("train"), data.labelled("val")
    head: nn.Linear | None = None
    best: tuple[tuple[float, float], float, nn.Linear] | None = None
    for l2 in PENALTIES:
        head = fit_exact(train, len(data.class_names), l2, head)
        acc, loss = accuracy_and_loss(head, val)
        if best is None or (acc, -loss) > best[0]:
            best = (acc, -loss), l2, head
    assert best
    (acc, negative), l2, head = best
    found = {"l2": l2, "val/acc": acc, "val/loss": -negative}
    if data.items_in("test"):
        found["test/acc"] = accuracy_and_loss(head, data.labelled("test"))[0]
    return found


def _cross_validate(cli: TuneCLI, settings: HeadSettings, folds: int) -> list[float]:
    """Accuracy of the settings on each fold of the training and validation images."""
    data = cli.datamodule
    items = data.items_in("train") + data.items_in("val")
    numbers = folds_of(items, folds)
    parts = [[item for item, number in zip(items, numbers, strict=True) if number == part] for part in range(folds)]
    if not all(parts):
        raise UserError(f"--folds={folds}: a fold has no image; give fewer")
    accuracies = []
    for part in parts:
        outside = set(part)
        inside = [item for item in items if item not in outside]
        train, val = (Labelled([data.store.matrix(found)], labels_of(found)) for found in (inside, part))
        (trained,) = train_bank([settings], train, val, len(data.class_names), cli.schedule, keep_last=True)
        accuracies.append(trained.acc)
    return accuracies


def _write(folder: Path, cli: TuneCLI, ranked: Sequence[tuple[HeadSettings, TrainedHead]]) -> tuple[Path, Path]:
    """Writes the table, a run per head for the HParams tab, the configuration, and the winner's recipe."""
    columns = [*vars(ranked[0][0]), "val/acc", "val/loss", "epoch"]
    rows = ([*vars(settings).values(), found.acc, found.loss, found.epoch] for settings, found in ranked)
    write_atomically(folder / "heads.csv", csv_bytes([columns, *rows]))
    with SummaryWriter(str(folder)) as events:
        for number, (settings, found) in enumerate(ranked):
            scores = {"hp/val_acc": found.acc, "hp/val_loss": found.loss}
            events.add_hparams(vars(settings), scores, run_name=f"head{number:03}")
    config = yaml.safe_load(cli.resolved_config())
    common = {name: value for name, value in config.items() if name not in ("tune", "folds")}
    recipe = {"model": vars(ranked[0][0])}
    for name, content in (("config.yaml", common), ("winner.yaml", recipe)):
        write_atomically(folder / name, yaml.safe_dump(content, sort_keys=False).encode())
    return folder / "config.yaml", folder / "winner.yaml"


def _say_table(
    ranked: Sequence[tuple[HeadSettings, TrainedHead]], exact: dict[str, float], folds: Sequence[float], folder: Path
) -> None:
    title = f"the best {min(SHOWN, len(ranked))} of {len(ranked)} heads, by validation"
    table = Table("lr", "weight decay", "label smoothing", "val/acc", "val/loss", "epoch", title=title)
    for settings, found in ranked[:SHOWN]:
        values = [f"{value:.3g}" for value in vars(settings).values()]
        table.add_row(*values, f"{found.acc:.3f}", f"{found.loss:.3f}", str(found.epoch))
    say(table)
    tested = f", test/acc {exact['test/acc']:.3f}" if "test/acc" in exact else ""
    say(f"exact:    L2 penalty {exact['l2']:g}, val/acc {exact['val/acc']:.3f}{tested} (L-BFGS, no steps to tune)")
    if folds:
        mean, half_width = mean_and_half_width(folds)
        say(f"folds:    the winner's accuracy is {mean:.3f} +- {half_width:.3f} (95 %, {len(folds)} folds)")
    say(f"heads:    {folder / 'heads.csv'}")
