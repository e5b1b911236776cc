"""The verb `fewshot`: few-shot tasks on the frozen backbone, meta-training, comparison, a tool from few pictures."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pytorch_lightning import seed_everything
from rich.table import Table
from torch import nn

from headstart.errors import UserError
from headstart.fewshot.compare import BASELINE, Compared, accuracies, compare, shots_figure, to_csv
from headstart.fewshot.data import EpisodeData
from headstart.fewshot.episodes import Shape
from headstart.fewshot.heads import HeadName, make_head
from headstart.fewshot.intervals import mean_and_half_width
from headstart.fewshot.module import MetaLearner
from headstart.fewshot.save import save
from headstart.fewshot.sources import SourceName
from headstart.fewshot.training import Schedule, make_trainer, meta_train
from headstart.files import write_atomically
from headstart.model.backbone import FrozenBackbone, check_frozen, tensor_digests
from headstart.model.classifier import TransferClassifier
from headstart.parser import OptionParser, add_options, parser_of
from headstart.ranges import Count, Positive
from headstart.report.figures import pixels, png
from headstart.runs.folder import RunFolder, RunLogger, claim, command_line, newest_unfinished, result_of, write_result
from headstart.terminal import be_calm, say
from headstart.verbs.predict import device_of

HEADS: tuple[HeadName, ...] = ("prototype", "ridge", "logistic", "anil", "projection")
# What is meta-trained in a comparison; the prototype is the baseline without training.
TRAINED: tuple[HeadName, ...] = ("ridge", "anil", "projection")
SHOTS, COMPARED_QUERIES = (1, 5, 10), 10
DATA_OPTIONS = (
    *("source", "root", "val_episodes", "train_episodes", "batch_size", "val_fraction", "test_fraction"),
    *("split_seed", "episode_seed", "num_workers", "cache_dir", "feature_precision", "max_pixels"),
)
HEAD_OPTIONS = ("lr", "metric", "centre", "l2", "inner_lr", "inner_steps", "first_order")
SIZE_OPTIONS = ("n_way", "k_shot", "n_query", "episodes")


def fewshot(options: Sequence[str]) -> dict[str, Any]:
    """Tests a head on few-shot tasks, after meta-training if asked; or compares all; or saves one of few pictures.

    Args:
        options: of the command line.

    Returns:
        The content of `result.json`; of `--save`, the checkpoint and its accuracy.

    Raises:
        UserError: a mistake in the options or the data.
    """
    be_calm()
    parser = _parser()
    given = parser.parse_args(list(options))
    resumed: Path | None = None
    checkpoint = Path(given.ckpt_path) if given.ckpt_path else None
    if given.ckpt_path == "last":
        checkpoint = newest_unfinished(Path(given.logs), _name(given))
        resumed = checkpoint.parent.parent
        given = parser.parse_args([f"--config={resumed / 'config.yaml'}", *options])
    return _Verb(parser, given, resumed, checkpoint).run()


class _Verb:
    """One call of the verb: its options, its backbone and its data."""

    def __init__(self, parser: OptionParser, given: Any, resumed: Path | None, checkpoint: Path | None) -> None:
        self.parser, self.given, self.resumed, self.checkpoint = parser, given, resumed, checkpoint
        self.started = time.perf_counter()
        self.device = device_of(given.accelerator)
        self.backbone = FrozenBackbone(given.model.backbone, given.model.weights, given.model.image_size)
        self.digests = tensor_digests(self.backbone)

    def run(self) -> dict[str, Any]:
        if self.given.save:
            return self._save()
        data = self._data(self.given.data.source, self.given.data.root)
        tested = data
        if self.given.test_source:
            tested = self._data(self.given.test_source, self.given.test_root, test_fraction=1.0)
        seed_everything(int(self.given.seed_everything), workers=True, verbose=False)
        result = self._compare(data, tested) if self.given.head == "all" else self._one(data, tested)
        check_frozen(self.backbone, self.digests)
        return result

    def _data(self, source: SourceName, root: str | None, **changed: Any) -> EpisodeData:
        given = vars(self.given.data) | {name: self.given[name] for name in SIZE_OPTIONS}
        data = EpisodeData(**given | {"source": source, "root": root} | changed)
        data.load(self.backbone, self.device)
        return data

    def _module(self, head: HeadName, data: EpisodeData) -> MetaLearner:
        values = {name: self.given.model[name] for name in HEAD_OPTIONS}
        return MetaLearner(self.given.n_way, data.width, head, **values)

    def _schedule(self) -> Schedule:
        given = self.given
        return Schedule(int(given.max_epochs), int(given.patience), int(given.seed_everything))

    def _run_folder(self, name: str) -> RunFolder:
        config = self.given.clone()
        config.ckpt_path = None
        text = self.parser.dump(config, skip_none=False)
        values = yaml.safe_load(text)
        settings = {name: value for name, value in values.items() if not isinstance(value, dict)}
        settings |= {f"{group}.{key}": value for group in ("data", "model") for key, value in values[group].items()}
        return RunFolder(Path(self.given.logs), name, text, settings, command_line(), self.resumed)

    def _one(self, data: EpisodeData, tested: EpisodeData) -> dict[str, Any]:
        """Tests one head, and the baseline on the same episodes."""
        module = self._module(self.given.head, data)
        name, scores = _name(self.given), {}
        if self.given.train:
            if not module.learns:
                raise UserError(f"--train: {self.given.head} has nothing to meta-train; projection, anil and ridge do")
            run_folder = self._run_folder(name)
            trainer, before = meta_train(
                module, data, self._schedule(), self.given.accelerator, run_folder, self.checkpoint
            )
            assert run_folder.folder
            folder, logger = run_folder.folder, trainer.logger
            scores = {"val/acc_before": before}
            trainer = make_trainer(self.given.accelerator, logger, enable_checkpointing=False)
        else:
            logger = RunLogger()
            trainer = make_trainer(self.given.accelerator, logger, enable_checkpointing=False)
            folder = logger.folder = claim(Path(self.given.logs), name)
        scores |= {name: float(value) for name, value in trainer.test(module, tested, verbose=False)[0].items()}
        own = torch.cat(module.accuracies).cpu()
        baseline = accuracies(make_head(BASELINE, self.given.n_way, data.width), tested.sampler("test"), len(own))
        scores["baseline/acc"], scores["baseline/acc_ci95"] = mean_and_half_width(baseline)
        scores["gain/acc"], scores["gain/acc_ci95"] = mean_and_half_width(own - baseline)
        result = self._finish(folder, tested, scores)
        shape = tested.shape
        say(f"fewshot: {len(own)} episodes of {shape.n_way}-way {shape.k_shot}-shot, {shape.n_query} queries a class")
        say(f"{self.given.head + ':':12}{_interval(scores['test/acc'], scores['test/acc_ci95'])}")
        if scores["gain/acc_ci95"]:  # else it is the baseline
            say(f"baseline:   {_interval(scores['baseline/acc'], scores['baseline/acc_ci95'])} (prototype, untrained)")
            say(f"gain:       {_interval(scores['gain/acc'], scores['gain/acc_ci95'])} (paired, 95 %)")
        self._say_next(folder)
        return result

    def _compare(self, data: EpisodeData, tested: EpisodeData) -> dict[str, Any]:
        """All heads at 1, 5 and 10 shots, before meta-training and after it."""
        heads: dict[str, nn.Module] = {name: self._module(name, data).head for name in HEADS}
        folder = claim(Path(self.given.logs), _name(self.given))
        if self.given.train:
            for name in TRAINED:
                module = self._module(name, data)
                run_folder = self._run_folder(f"{_name(self.given)}-{name}")
                meta_train(module, data, self._schedule(), self.given.accelerator, run_folder)
                heads[f"{name} (trained)"] = module.head
        heads = {name: head.to(self.device) for name, head in heads.items()}
        samplers = {
            shots: tested.sampler("test", Shape(self.given.n_way, shots, COMPARED_QUERIES))
            for shots in SHOTS
            if tested.rows_of("test", shots + COMPARED_QUERIES)
        }
        rows = compare(heads, samplers, int(self.given.episodes))
        write_atomically(folder / "heads.csv", to_csv(rows))
        picture = png(shots_figure(rows))
        write_atomically(folder / "heads.png", picture)
        logger = RunLogger()
        logger.folder = folder
        logger.experiment.add_image("accuracy_by_shots", pixels(picture), dataformats="HWC")
        logger.experiment.close()
        _say_comparison(rows)
        scores = {f"{row.head}/{row.k_shot}-shot": row.acc for row in rows}
        result = self._finish(folder, tested, scores)
        say(f"table:    {folder / 'heads.csv'}")
        say(f"plot:     {folder / 'heads.png'}")
        return result

    def _save(self) -> dict[str, Any]:
        """A checkpoint of all pictures of a folder."""
        head = self.given.head
        if head not in ("prototype", "ridge") or self.given.model.metric != "euclidean" or self.given.model.l2:
            raise UserError("--save: stores a linear head: --head=prototype (euclidean, without l2) or --head=ridge")
        if self.given.data.root is None:
            raise UserError("--data.root is missing: --save learns from a folder of class folders")
        data = self._data("folder", self.given.data.root, test_fraction=1.0)
        given = self.given.model
        module = TransferClassifier(data.class_names, given.backbone, given.weights, given.image_size)
        path = Path(self.given.save).expanduser()
        acc = save(path, module, self._module(head, data).head, data.all_support())
        say(f"fewshot: {len(data.items)} pictures of {len(data.class_names)} classes, {acc:.3f} right when left out")
        say(f"head:     {path}")
        say(f"next:     headstart predict --ckpt_path={path} path/to/files")
        return {"checkpoint": str(path), "left_out/acc": acc, "images": len(data.items)}

    def _finish(self, folder: Path, data: EpisodeData, scores: dict[str, float]) -> dict[str, Any]:
        seconds = data.seconds | {"total": time.perf_counter() - self.started}
        result = result_of(self.backbone, data, scores, seconds, command_line())
        result |= {"head": self.given.head, **{name: int(self.given[name]) for name in SIZE_OPTIONS}}
        write_result(folder, result)
        return result

    def _say_next(self, folder: Path) -> None:
        say(f"run:      {folder}")
        say(f"inspect:  tensorboard --logdir {self.given.logs}")
        if not self.given.train:
            say("next:     headstart fewshot --head=projection --train    (meta-trains on other classes first)")


def _name(given: Any) -> str:
    return str(given.name or f"fewshot-{given.data.source}-{given.head}")


def _interval(mean: float, half_width: float) -> str:
    return f"{mean:.4f} ± {half_width:.4f}"


def _parser() -> OptionParser:
    parser = parser_of("fewshot")
    parser.add_argument(
        "--head",
        type=Literal["prototype", "ridge", "logistic", "anil", "projection", "all"],
        default="prototype",
        help="what learns a task; all: compare them at 1, 5 and 10 shots",
    )
    parser.add_argument("--train", action="store_true", help="meta-train the head first, on other classes")
    parser.add_argument("--n_way", type=Positive, default=5, help="classes a task")
    parser.add_argument("--k_shot", type=Positive, default=1, help="examples a class")
    parser.add_argument("--n_query", type=Positive, default=15, help="images to classify a class")
    parser.add_argument("--episodes", type=Positive, default=1000, help="tasks of the test")
    parser.add_argument("--test_source", type=SourceName | None, help="test on another source; None: the same")
    parser.add_argument("--test_root", type=str | None, help="of that")
    parser.add_argument("--save", type=str | None, help="a new checkpoint, of all pictures of --data.root")
    add_options(parser, EpisodeData, "data", DATA_OPTIONS)
    add_options(parser, TransferClassifier, "model", ("backbone", "weights", "image_size"))
    add_options(parser, MetaLearner, "model", HEAD_OPTIONS)
    parser.add_argument("--max_epochs", type=Positive, default=20, help="of the meta-training, at most")
    parser.add_argument("--patience", type=Positive, default=5, help="epochs without a better validation")
    parser.add_argument("--seed_everything", type=Count, default=0, help="of the initial values")
    parser.add_argument("--ckpt_path", type=str | None, help="go on from a checkpoint, or from `last`")
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, cuda or auto")
    parser.add_argument("--name", type=str | None, help="of the run; None: by source and head")
    parser.add_argument("--logs", type=str, default="logs", help="where the run's folder goes")
    return parser


def _say_comparison(rows: Sequence[Compared]) -> None:
    table = Table("head", "shots", "accuracy", "95 %", "gain on the baseline", "95 %")
    for row in rows:
        numbers = (row.acc, row.ci95, row.gain, row.gain_ci95)
        table.add_row(row.head, str(row.k_shot), *(f"{value:.4f}" for value in numbers))
    say(table)
