"""The `fewshot` command: few-shot tasks on the frozen backbone, meta-training, comparison, heads to save."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import seed_everything
from rich.table import Table
from torch import nn

from headstart.data.splits import repeated
from headstart.device import device_of
from headstart.errors import UserError
from headstart.fewshot.compare import AS_TRAIN, BASELINE, AsTrain, Compared, accuracies, compare, shots_figure, to_csv
from headstart.fewshot.data import EpisodeData
from headstart.fewshot.episodes import EpisodeSampler, TaskSize
from headstart.fewshot.heads import HEADS, HeadName, TaskHead, make_head
from headstart.fewshot.module import MetaLearner
from headstart.fewshot.save import fitted, save
from headstart.fewshot.sources import SourceName, source_of
from headstart.fewshot.training import SHARES, make_trainer, meta_train
from headstart.files import new_path, write_atomically
from headstart.model.backbone import BACKBONE_OPTIONS, FrozenBackbone, check_frozen, tensor_digests
from headstart.model.classifier import TransferClassifier
from headstart.model.heads import Unit
from headstart.model.weights import for_data
from headstart.parser import OptionParser, add_options, add_run, parser_of
from headstart.ranges import Positive, Seed
from headstart.runs.folder import RunFolder, new_run_folder, result_of, settings_in, write_result
from headstart.runs.history import CONFIG, Run, newest_unfinished
from headstart.runs.logger import RunLogger
from headstart.search.intervals import mean_and_half_width
from headstart.terminal import Seconds, listing, quiet_libraries, say

# Heads that a comparison meta-trains; the untrained prototype is the baseline.
TRAINED: tuple[HeadName, ...] = ("ridge", "anil", "projection")
SAVED: tuple[HeadName, ...] = ("prototype", "ridge", "logistic", "projection")  # linear in the features
SHOTS, COMPARED_QUERIES = (1, 5, 10), 10
DATA_OPTIONS = (
    *("source", "root", "val_episodes", "train_episodes", "batch_size", "val_fraction", "test_fraction"),
    *("test_domain", "split_seed", "episode_seed", "num_workers", "cache_dir", "feature_precision", "max_pixels"),
)
HEAD_OPTIONS = ("lr", "metric", "centre", "l2", "inner_lr", "inner_steps", "first_order")
SIZE_OPTIONS = ("n_way", "k_shot", "n_query", "episodes")


def fewshot(options: Sequence[str]) -> dict[str, Any]:
    """Tests a head on few-shot tasks, with optional meta-training; or compares all heads; or saves one.

    Returns the content of `result.json`; with `--save`, the checkpoint and its accuracy.
    """
    quiet_libraries()
    parser = _parser()
    given = parser.parse_args(list(options))
    resumed: Run | None = None
    checkpoint = Path(given.ckpt_path) if given.ckpt_path else None
    if given.ckpt_path == "last":
        root = Path(given.data.root).expanduser() if given.data.root else None
        resumed = newest_unfinished(Path(given.logs), "fewshot", given.name, root)
        checkpoint = resumed.last
        given = parser.parse_args([f"--config={resumed.folder / CONFIG}", *options])
    given.data.source = given.data.source or source_of(given.data.root)
    for part in ("test", "val"):
        if given[f"{part}_root"]:
            given[f"{part}_source"] = given[f"{part}_source"] or source_of(given[f"{part}_root"])
    return _Command(parser, given, resumed, checkpoint).run()


class _Command:
    """One call of the command: its options, its backbone and its data."""

    def __init__(self, parser: OptionParser, given: Any, resumed: Run | None, checkpoint: Path | None) -> None:
        self.parser, self.given, self.resumed, self.checkpoint = parser, given, resumed, checkpoint
        self.seconds, self.logs = Seconds(), Path(given.logs)
        self.third: EpisodeSampler | None = None
        self.device = device_of(given.accelerator)
        given.model.weights = for_data(given.model.backbone, given.model.weights, given.data.root)
        self.backbone = FrozenBackbone(*(given.model[name] for name in BACKBONE_OPTIONS))
        given.model.weights = self.backbone.weights  # what `auto` became is in the run's configuration
        self.digests = self.backbone.digests()

    def run(self) -> dict[str, Any]:
        given = self.given
        few = self._few() if given.save else None
        if few and not given.train:
            return self._save(few, self._module(given.head, few).head)
        data = self._data(given.data.source, given.data.root)
        if few:
            _apart(few, data)
        tested = self._other(given.test_source, given.test_root) if given.test_source else data
        if given.val_source:
            self.third = self._other(given.val_source, given.val_root).sampler("test", data.size)
        seed_everything(int(given.seed_everything), workers=True, verbose=False)
        if given.head == "all":
            result = self._compare(data, tested)
        else:
            module = self._module(given.head, data)
            result = self._one(module, data, tested)
            if few:
                result |= self._save(few, module.head)
        check_frozen(tensor_digests(self.backbone), self.digests)
        return result

    def _other(self, source: SourceName, root: str | None) -> EpisodeData:
        """All classes of a source that is not trained on."""
        return self._data(source, root, test_fraction=1.0, test_domain=None)

    def _data(self, source: SourceName, root: str | None, **changed: Any) -> EpisodeData:
        given = vars(self.given.data) | {name: self.given[name] for name in SIZE_OPTIONS}
        data = EpisodeData(**given | {"source": source, "root": root} | changed)
        if self.checkpoint and not changed and (file := Run.of(self.checkpoint).splits_file).is_file():
            data.repeat = partial(repeated, file=file)
        data.load(self.backbone, self.device)
        return data

    def _module(self, head: HeadName, data: EpisodeData) -> MetaLearner:
        values = {name: self.given.model[name] for name in HEAD_OPTIONS}
        return MetaLearner(self.given.n_way, data.width, head, **values)

    def _meta_train(self, module: MetaLearner, data: EpisodeData, name: str) -> tuple[RunLogger, Path, float]:
        """Meta-trains a head in its own run; returns the logger, the folder and the validation accuracy before."""
        given, config = self.given, self.given.clone()
        config.ckpt_path = None
        run_folder = RunFolder(self.logs, name, self.parser.dump(config, skip_none=False), self.resumed)
        lengths = int(given.max_epochs), int(given.patience), int(given.seed_everything)
        shares: tuple[float, ...] = ()  # within a domain, all that was learnt is kept if it helps
        if self.third or given.data.source == "domains":
            shares = SHARES
        elif given.test_source not in (None, given.data.source):
            shares = SHARES[:2]
            say("fewshot: the test is on another kind of data; a third, --val_source=…, decides how much carries over")
        options = given.accelerator, run_folder, *lengths, self.checkpoint, shares, self.third
        trainer, before = meta_train(module, data, *options)
        assert run_folder.folder
        assert isinstance(trainer.logger, RunLogger)
        return trainer.logger, run_folder.folder, before

    def _one(self, module: MetaLearner, data: EpisodeData, tested: EpisodeData) -> dict[str, Any]:
        """Tests one head, and the baseline on the same episodes."""
        name, scores = _name(self.given), dict[str, float]()
        if self.given.train:
            if not module.learns:
                raise UserError(f"--train: {self.given.head} has nothing to meta-train; projection, anil and ridge do")
            logger, folder, scores["val/acc_before"] = self._meta_train(module, data, name)
        else:
            folder = new_run_folder(self.logs, name, tested.store.source.path)
            logger = RunLogger(folder)
            logger.compare_by(settings_in(self.parser.dump(self.given, skip_none=False)))
        trainer = make_trainer(self.given.accelerator, logger=logger)
        scores |= {name: float(value) for name, value in trainer.test(module, tested, verbose=False)[0].items()}
        own = torch.cat(module.accuracies).cpu()
        baseline = accuracies(make_head(BASELINE, self.given.n_way, data.width), tested.sampler("test"), len(own))
        scores["baseline/acc"], scores["baseline/acc_ci95"] = mean_and_half_width(baseline)
        scores["gain/acc"], scores["gain/acc_ci95"] = mean_and_half_width(own - baseline)
        result = self._finish(folder, tested, scores)
        size = tested.size
        say(f"fewshot: {len(own)} episodes of {size.n_way}-way {size.k_shot}-shot, {size.n_query} queries per class")
        say(f"{self.given.head + ':':12}{_interval(scores['test/acc'], scores['test/acc_ci95'])}")
        if scores["gain/acc_ci95"]:  # else it is the baseline
            say(f"baseline:   {_interval(scores['baseline/acc'], scores['baseline/acc_ci95'])} (prototype, untrained)")
            say(f"gain:       {_interval(scores['gain/acc'], scores['gain/acc_ci95'])} (paired, 95 %)")
        say(f"run:      {folder}")
        say(f"inspect:  tensorboard --logdir {self.given.logs}")
        if not self.given.train:
            say("next:     headstart fewshot --head=projection --train    (meta-trains on other classes first)")
        return result

    def _compare(self, data: EpisodeData, tested: EpisodeData) -> dict[str, Any]:
        """Compares all heads at 1, 5 and 10 shots, before and after meta-training."""
        samplers = {
            shots: tested.sampler("test", TaskSize(self.given.n_way, shots, COMPARED_QUERIES))
            for shots in SHOTS
            if tested.rows_of("test", shots + COMPARED_QUERIES)
        }
        if not samplers:
            raise UserError(f"--head=all: no class of the test has {min(SHOTS) + COMPARED_QUERIES} images; give more")
        heads: dict[str, nn.Module] = {name: self._module(name, data).head for name in HEADS}
        heads[AS_TRAIN] = AsTrain()
        folder = new_run_folder(self.logs, _name(self.given), tested.store.source.path)
        if self.given.train:
            for name in TRAINED:
                module = self._module(name, data)
                self._meta_train(module, data, f"{_name(self.given)}-{name}")
                heads[f"{name} (trained)"] = module.head
        heads = {name: head.to(self.device) for name, head in heads.items()}
        rows = compare(heads, samplers, int(self.given.episodes))
        write_atomically(folder / "heads.csv", to_csv(rows))
        figure = shots_figure(rows)
        figure.image().save(folder / "heads.png")
        logger = RunLogger(folder)
        logger.experiment.add_image("accuracy_by_shots", figure.pixels(), dataformats="HWC")
        for row in rows:
            logger.experiment.add_scalar(f"accuracy_by_shots/{row.head}", row.acc, row.k_shot)
        logger.experiment.close()
        _say_comparison(rows)
        scores = {f"{row.head}/{row.k_shot}-shot": row.acc for row in rows}
        result = self._finish(folder, tested, scores)
        say(f"table:    {folder / 'heads.csv'}")
        say(f"plot:     {folder / 'heads.png'}")
        return result

    def _few(self) -> EpisodeData:
        """All pictures of a folder, from which --save learns."""
        given = self.given
        if given.head not in SAVED:
            raise UserError(f"--save: {given.head} cannot be saved; {', '.join(SAVED)} can")
        root = given.save_root or (None if given.train else given.data.root)
        if root is None:
            option = "save_root" if given.train else "data.root"
            raise UserError(f"--{option} is missing: --save learns from a folder of class folders")
        new_path("--save", Path(given.save).expanduser())
        return self._other("folder", root)

    def _save(self, few: EpisodeData, head: nn.Module) -> dict[str, Any]:
        """Saves a checkpoint learnt from all pictures of a folder."""
        assert isinstance(head, TaskHead)
        found = fitted(head.cpu(), few.all_support(), choose=not self.given.train)
        kind = "unit" if isinstance(found.head, Unit) else "linear"
        backbone = {name: self.given.model[name] for name in BACKBONE_OPTIONS}
        module = TransferClassifier(few.class_names, head=kind, **backbone)
        module.trained_on = sorted({item.digest.hex() for item in few.items})
        module.backbone.preprocessing.bits = self.backbone.preprocessing.bits
        module.arithmetic = few.store.arithmetic
        path = Path(self.given.save).expanduser()
        save(path, module, found, self.given.head)
        alone = "one per class, so none is left out: the strength is fixed, and the temperature 1"
        left_out = alone if found.left_out is None else f"leave-one-out accuracy {found.left_out:.3f}"
        say(f"fewshot: {len(few.items)} images of {len(few.class_names)} classes, {left_out}")
        say(f"head:     {path}")
        say(f"next:     headstart predict --ckpt_path={path} path/to/files")  # wing: deploy
        return {"checkpoint": str(path), "left_out/acc": found.left_out, "images": len(few.items)}

    def _finish(self, folder: Path, data: EpisodeData, scores: dict[str, float]) -> dict[str, Any]:
        result = result_of(self.backbone, data, scores, self.seconds.with_total())
        result |= {"head": self.given.head, **{name: int(self.given[name]) for name in SIZE_OPTIONS}}
        write_result(folder, result)
        return result


def _apart(few: EpisodeData, data: EpisodeData) -> None:
    """Refuses to save a class that is also meta-trained on, by its name or by an image."""
    names, seen = {Path(name).name for name in data.class_names}, {item.digest for item in data.items}
    both = {name for name in few.class_names if Path(name).name in names}
    both |= {few.class_names[item.label] for item in few.items if item.digest in seen}
    if both:
        raise UserError(f"--save_root: classes also in --data.root: {listing(sorted(both))}; remove them from one")


def _name(given: Any) -> str:
    return str(given.name or f"fewshot-{given.data.source}-{given.head}")


def _interval(mean: float, half_width: float) -> str:
    return f"{mean:.4f} ± {half_width:.4f}"


def _parser() -> OptionParser:
    parser = parser_of("fewshot")
    heads, compared = Literal[HeadName, "all"], "head to test; all: compare them at 1, 5 and 10 shots"
    parser.add_argument("--head", type=heads, default="prototype", help=compared)
    parser.add_argument("--train", action="store_true", help="meta-train the head first, on other classes")
    parser.add_argument("--n_way", type=Positive, default=5, help="classes per task")
    parser.add_argument("--k_shot", type=Positive, default=1, help="support images per class")
    parser.add_argument("--n_query", type=Positive, default=15, help="query images per class")
    parser.add_argument("--episodes", type=Positive, default=1000, help="number of test tasks")
    parser.add_argument("--test_source", type=SourceName | None, help="source to test on; None: --data.source")
    parser.add_argument("--test_root", type=str | None, help="folder or files of --test_source")
    third = "source of validation tasks from a third domain, which decide how much of the meta-training to keep"
    parser.add_argument("--val_source", type=SourceName | None, help=third)
    parser.add_argument("--val_root", type=str | None, help="folder or files of --val_source")
    parser.add_argument("--save", type=str | None, help="new checkpoint, trained on all images of --save_root")
    parser.add_argument("--save_root", type=str | None, help="folder of the classes to save; None: --data.root")
    add_options(parser, EpisodeData, "data", DATA_OPTIONS)
    add_options(parser, TransferClassifier, "model", BACKBONE_OPTIONS)
    add_options(parser, MetaLearner, "model", HEAD_OPTIONS)
    parser.add_argument("--max_epochs", type=Positive, default=20, help="maximum number of meta-training epochs")
    parser.add_argument("--patience", type=Positive, default=5, help="stop after this many epochs without improvement")
    parser.add_argument("--seed_everything", type=Seed, default=0, help="seed of the initial values")
    parser.add_argument("--ckpt_path", type=str | None, help="checkpoint to resume; `last`: the newest run's")
    add_run(parser, "fewshot-<source>-<head>")
    return parser


def _say_comparison(rows: Sequence[Compared]) -> None:
    table = Table("head", "shots", "accuracy", "95 %", "gain on the baseline", "95 %")
    for row in rows:
        numbers = (row.acc, row.ci95, row.gain, row.gain_ci95)
        table.add_row(row.head, str(row.k_shot), *(f"{value:.4f}" for value in numbers))
    say(table)
