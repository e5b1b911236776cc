"""The `tune` command: trains a grid of heads at once, fits the exact optimum, then runs the winner."""

import itertools
import json
import math
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pytorch_lightning.cli import LightningArgumentParser
from rich.table import Table

from headstart.data.splits import check_training, folds_of
from headstart.errors import UserError
from headstart.features.matrix import Labelled
from headstart.files import csv_bytes, write_atomically
from headstart.fit.cli import TrainCLI
from headstart.fit.rival import exact_rival
from headstart.fit.run import finish, fit, report, test
from headstart.model.backbone import FrozenBackbone
from headstart.model.weights import DEMO
from headstart.ranges import Fraction, NonNegative, Positive, Rate
from headstart.runs.folder import new_run_folder
from headstart.search.backbones import Heads, Trial, best_of, check_backbones, compare, name_and_weights, reported
from headstart.search.bank import HeadSettings, Schedule, score_and_loss, train_bank
from headstart.search.intervals import mean_and_half_width
from headstart.search.knn import knn_scores
from headstart.terminal import SCORES, Seconds, images_bar, program, quiet_libraries, rank, say

LRS = [0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03]
WEIGHT_DECAYS = [0.0, 0.01, 0.1, 1.0]
LABEL_SMOOTHINGS = [0.0, 0.1]
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
            help="number of settings to draw at random within the grid's range; None: use the grid",
        )
        parser.add_argument(
            "--backbones",
            type=str | None,
            help="backbones to compare, such as resnet18,resnet50@random, instead of --model.backbone; None: that one",
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
        self.named: list[tuple[str, str]] = []  # the backbones to compare, with their weights
        if self.config.backbones is not None:
            self.named = [
                (name, self._weights_of(name, weights)) for name, weights in name_and_weights(self.config.backbones)
            ]
            self.config.model.backbone, self.config.model.weights = self.named[0]

    def backbones(self) -> Iterator[FrozenBackbone]:
        """The backbones to compare, one at a time."""
        yield self.model.backbone
        yield from (self.backbone(*named) for named in self.named[1:])

    def backbone(self, name: str, weights: str) -> FrozenBackbone:
        """Another backbone with the options of the first."""
        options = {name: self.model.hparams[name] for name in ("image_size", "fit", "layers", "mirror")}
        return FrozenBackbone(name, weights, **options)

    @property
    def device(self) -> torch.device:
        """Where features are computed, and heads trained."""
        device: torch.device = self.trainer.strategy.root_device
        return device

    @property
    def schedule(self) -> Schedule:
        """The training schedule of every head."""
        epochs, warmup = int(self.config.trainer.max_epochs), float(self.config.model.warmup)
        return Schedule(epochs, self.datamodule.batch_size, warmup, int(self.config.seed_everything))


def tune(options: Sequence[str], root: Path | None = None) -> dict[str, Any]:
    """Trains the grid at once, fits the exact optimum, and trains the winner in a run.

    Returns `settings` (one per head, best first), `exact`, `knn`, `folds`, the rows of `backbones` that were compared,
    the winner's `recipe`, and its `result`.
    """
    quiet_libraries()
    if rank() > 0:  # a further process of the final run, which Lightning starts with the same command line
        if TUNED not in os.environ:
            raise UserError("tune: the search runs in one process; use --trainer.devices instead of torchrun")
        return {"result": _train_winner(json.loads(os.environ[TUNED]), root)}
    root = root or DEMO
    cli = TuneCLI(options, root)
    _check(cli)
    _load(cli)
    trials = compare(cli.datamodule, cli.backbones(), cli.device, lambda: _fit_heads(cli)) if cli.named else []
    best = best_of(trials) if trials else None
    heads = best.heads if best else _fit_heads(cli)
    folds = _cross_validate(cli, heads, best) if cli.config.folds else []
    folder = new_run_folder(cli.logs, f"{cli.name}-tune", cli.datamodule.source.path)
    common, recipe = _write(folder, cli, heads, best)
    rows = reported(trials, folder) if trials else []
    _say_table(heads, folds, folder, cli.model.task.headline)
    winner = [f"--config={common}", f"--config={recipe}"]
    os.environ[TUNED] = json.dumps(winner)
    result, score = _train_winner(winner, root), cli.model.task.headline
    del os.environ[TUNED]
    say(f"recipe:   {recipe}    ({program('train')} --config={recipe})")
    return {
        "settings": [
            vars(settings) | {f"val/{score}": head.score, "val/loss": head.loss} for settings, head in heads.ranked
        ],
        "exact": heads.exact_scores,
        "knn": heads.knn,
        "folds": folds,
        "backbones": rows,
        "recipe": str(recipe),
        "result": result,
    }


def _check(cli: TuneCLI) -> None:
    """Refuses, before any work, what the search cannot do."""
    data, config = cli.datamodule, cli.config
    if not data.store.cache:
        raise UserError("--data.cache=false: the search needs cached features; leave the cache on")
    if config.model.head != "linear":
        raise UserError(f"--model.head={config.model.head}: the search trains linear heads only; leave it out")
    if empty := [name for name in ("lr", "weight_decay", "label_smoothing") if not config.tune[name]]:
        raise UserError(f"--tune.{empty[0]}=[]: give at least one value, or leave it out")
    if config.folds == 1:
        raise UserError("--folds=1: give 2 or more")
    if cli.named:
        check_backbones(cli.backbones())


def _load(cli: TuneCLI) -> None:
    """Loads the data for the first backbone, or the only one; the search needs training and validation images."""
    data = cli.datamodule
    data.load(cli.model.backbone, cli.device)
    check_training(data.items, data.class_names)
    if not data.items_in("val"):
        raise UserError(
            "tune: there is no validation image, but the search chooses by validation; add some to that split"
        )
    cli.model.to(cli.device).weigh_classes(data.counts("train"), len(data.items_in("train")))


def _train_winner(options: Sequence[str], root: Path | None) -> dict[str, Any]:
    """Trains the winner, as `train` does."""
    seconds, cli = Seconds(), TrainCLI(options, root)
    fit(cli, seconds)
    scores = test(cli, seconds)
    report(cli, scores, seconds)
    return finish(cli, scores, seconds)


def _settings(grid: Any, seed: int) -> list[HeadSettings]:
    """The grid, or random draws within its range: log-uniform, or uniform from a low end of 0."""
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


def _fit_heads(cli: TuneCLI) -> Heads:
    """Trains the grid on the loaded features, and fits the exact optimum."""
    data, settings = cli.datamodule, _settings(cli.config.tune, int(cli.config.seed_everything))
    train, val, classes = data.labelled("train"), data.labelled("val"), len(data.class_names)
    with images_bar(f"{len(settings)} heads", len(train) * cli.schedule.epochs) as advance:
        weights = cli.model.loss_weights
        trained = train_bank(settings, train, val, classes, cli.schedule, advance, class_weights=weights)
    ranked = sorted(zip(settings, trained, strict=True), key=lambda pair: pair[1].rank)
    l2, exact = exact_rival(cli.model, data)
    test = data.labelled("test") if data.items_in("test") else None
    score = cli.model.task.headline
    scores = {"l2": l2, f"val/{score}": exact.score, "val/loss": exact.loss}
    scores |= {f"test/{score}": score_and_loss(exact.head, test)[0]} if test else {}
    return Heads(ranked, exact, scores, {} if data.multilabel else knn_scores(train, val, test, classes))


def _cross_validate(cli: TuneCLI, heads: Heads, best: Trial | None) -> list[float]:
    """The headline score of the winner's settings on each fold of the training and validation images."""
    data, folds, settings = cli.datamodule, cli.config.folds, heads.ranked[0][0]
    if best:  # of several backbones the last is loaded
        data.load(cli.backbone(best.backbone, best.weights), cli.device)
    items = data.items_in("train") + data.items_in("val")
    numbers = folds_of(items, folds)
    parts = [[item for item, number in zip(items, numbers, strict=True) if number == part] for part in range(folds)]
    if not all(parts):
        raise UserError(f"--folds={folds}: a fold has no image; give fewer")
    scores = []
    for part in parts:
        outside = set(part)
        inside = [item for item in items if item not in outside]
        train, val = (Labelled([data.store.matrix(found)], data.source.labels_of(found)) for found in (inside, part))
        arguments = [settings], train, val, len(data.class_names), cli.schedule
        (trained,) = train_bank(*arguments, keep_last=True, class_weights=cli.model.loss_weights)
        scores.append(trained.score)
    return scores


def _write(folder: Path, cli: TuneCLI, heads: Heads, best: Trial | None) -> tuple[Path, Path]:
    """Writes the table, the configuration, and the winner's recipe; TensorBoard shows the winner's run."""
    ranked = heads.ranked
    columns = [*vars(ranked[0][0]), f"val/{cli.model.task.headline}", "val/loss", "epoch"]
    rows = ([*vars(settings).values(), found.score, found.loss, found.epoch] for settings, found in ranked)
    write_atomically(folder / "heads.csv", csv_bytes([columns, *rows]))
    config = yaml.safe_load(cli.resolved_config())
    common = {name: value for name, value in config.items() if name not in ("tune", "folds", "backbones")}
    backbone = {"backbone": best.backbone, "weights": best.weights} if best else {}
    recipe = {"model": backbone | vars(ranked[0][0])}
    for name, content in (("config.yaml", common), ("winner.yaml", recipe)):
        write_atomically(folder / name, yaml.safe_dump(content, sort_keys=False).encode())
    return folder / "config.yaml", folder / "winner.yaml"


def _say_table(heads: Heads, folds: Sequence[float], folder: Path, score: str) -> None:
    ranked, exact = heads.ranked, heads.exact_scores
    title = f"the best {min(SHOWN, len(ranked))} of {len(ranked)} heads, by validation"
    table = Table("lr", "weight decay", "label smoothing", f"val/{score}", "val/loss", "epoch", title=title)
    for settings, found in ranked[:SHOWN]:
        values = [f"{value:.3g}" for value in vars(settings).values()]
        table.add_row(*values, f"{found.score:.3f}", f"{found.loss:.3f}", str(found.epoch))
    say(table)
    shown = {name: f"{name} {value:.3f}" for name, value in exact.items() if name.endswith(score)}
    say(f"exact:    L2 penalty {exact['l2']:g}, {', '.join(shown.values())} (L-BFGS, no steps to tune)")
    if near := heads.knn:
        tested = f", test/acc {near['test/acc']:.3f}" if "test/acc" in near else ""
        say(f"k-NN:     k {near['k']}, val/acc {near['val/acc']:.3f}{tested} (by similarity, no training)")
    if folds:
        mean, half_width = mean_and_half_width(folds)
        say(f"folds:    the winner's {SCORES[score]} is {mean:.3f} +- {half_width:.3f} (95 %, {len(folds)} folds)")
    say(f"heads:    {folder / 'heads.csv'}")
