"""The verb `train`: the options, and what is wired to what."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from headstart.data.module import ImageFolderData
from headstart.errors import UserError
from headstart.model.checkpoints import RunCheckpoint, SealedCheckpointIO
from headstart.model.classifier import TransferClassifier, read_checkpoint
from headstart.parser import OptionParser
from headstart.report.evaluation import EvaluationCollector
from headstart.runs.folder import RunFolder, RunLogger, command_line, newest_unfinished
from headstart.terminal import be_calm, say, say_scores

OWN_PHOTOS = "--data.root=path/to/your/photos    (one folder of images a class)"
STRONGER = "--data.{}={} --model.weights=imagenet    (better features for photographs, 45 MB once)"
TRAINER_DEFAULTS = {
    "max_epochs": 25,
    "default_root_dir": "logs",
    "deterministic": True,  # for exact resume
    "num_sanity_val_steps": 0,  # likewise: it would draw random numbers
    "use_distributed_sampler": False,  # the data shares itself out, each image once
    "enable_model_summary": False,
}


class TrainParser(OptionParser):
    """Shows the options of the model, the data and the run."""

    usage_line = "python train.py [options]    or    headstart train [options]"
    last_line = "  --help_all                  every option, with those of Lightning's Trainer"


class FullHelpParser(TrainParser):
    """Shows every option, with those of Lightning's Trainer."""

    def format_help(self, formatter: Any = None) -> str:
        """jsonargparse's own page."""
        return LightningArgumentParser.format_help(self, formatter)


class TrainCLI(LightningCLI):
    """Lightning's command line for one model and one kind of data.

    Args:
        options: of the command line.
        root: the data's root where none is given.

    Attributes:
        checkpoint: the content of the one that the run goes on from.
        resumed: the folder of the run that goes on in it.
    """

    module_class: type[TransferClassifier] = TransferClassifier
    parsers: tuple[type[OptionParser], type[OptionParser]] = (TrainParser, FullHelpParser)
    defaults: Mapping[str, Any] = TRAINER_DEFAULTS
    ckpt_help = "go on from a checkpoint in a new run, or from `last`: the newest unfinished run, in its own folder"
    lean_best = False  # whether best.ckpt comes without the optimizer, which is twice as large as what learns

    def __init__(self, options: Sequence[str], root: Path | None) -> None:
        self.root = root
        self.resumed: Path | None = None
        self.checkpoint: dict[str, Any] | None = None
        everything = "--help_all" in options
        super().__init__(
            self.module_class,
            ImageFolderData,
            args=["--help"] if everything else list(options),
            run=False,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_defaults=dict(self.defaults),
            parser_class=self.parsers[everything],
            parser_kwargs={"allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, help="of the run; None: the name of the data's folder")
        parser.add_argument("--ckpt_path", type=str | None, help=self.ckpt_help)
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.add_argument("--report", type=bool, default=True, help="draw the figures and write report.html")
        if self.root:
            parser.set_defaults({"data.root": str(self.root)})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """A run that goes on starts from its own configuration; options of the command line win over it."""
        self.config = parser.parse_args(args)
        if self.config.data.get("csv") and self.config.data.root == str(self.root):
            self.config.data.root = None  # the demo's folder is for when nothing is given
        if self.config.ckpt_path == "last":
            checkpoint = newest_unfinished(self.logs, self.name)
            self.resumed = checkpoint.parent.parent
            self.config = parser.parse_args([f"--config={self.resumed / 'config.yaml'}", *args])
            self.config.ckpt_path = str(checkpoint)
        if self.config.ckpt_path:
            self.checkpoint = read_checkpoint(Path(self.config.ckpt_path), self.logs)

    @property
    def started_from(self) -> str | None:
        """The ``--ckpt_path`` that repeats the run."""
        return None

    @property
    def goes_on_from(self) -> str | None:
        """The checkpoint whose fit goes on."""
        return str(self.config.ckpt_path) if self.config.ckpt_path else None

    @property
    def trained_epochs(self) -> int:
        """Of the checkpoint that the run goes on from."""
        return self.checkpoint["epoch"] + 1 if self.checkpoint else 0

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train; a run that was killed before its test still goes on to that."""
        limit = self.trainer.max_epochs
        if not self.trained_epochs or limit in (None, -1):
            return False
        return self.trained_epochs > limit or (self.trained_epochs == limit and self.resumed is None)

    def say_if_finished(self) -> bool:
        """Says that there is nothing left to train, if so."""
        if self.finished:
            say(f"already finished: {self.goes_on_from} has {self.trained_epochs} epochs; raise --trainer.max_epochs")
        return self.finished

    @property
    def logs(self) -> Path:
        return Path(self.config.trainer.default_root_dir)

    @property
    def name(self) -> str:
        data = self.config.data
        given = Path(data.get("csv") or data.root or "").expanduser().resolve()
        return str(self.config.name or (given.stem if data.get("csv") else given.name))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        self.run_folder = RunFolder(
            self.logs, self.name, self.resolved_config(), self._settings(), command_line(), self.resumed, self.kept()
        )
        # "best" by the loss: with few validation images accuracy moves in steps and picks an early epoch by luck.
        self.best = RunCheckpoint(
            filename="best", monitor="val/loss", save_weights_only=self.lean_best, enable_version_counter=False
        )
        last = RunCheckpoint(filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
        self.best.moved = last.moved = self.resumed is not None
        self.collector = EvaluationCollector()
        callbacks: list[Callback] = [self.run_folder, LearningRateMonitor("epoch"), self.collector, self.best, last]
        self.trainer_defaults = {"callbacks": callbacks}
        given = self.config_init.trainer
        # TensorBoard forgets what a killed process wrote of steps that are done again.
        steps_done = self.checkpoint["global_step"] if self.checkpoint and self.resumed else None
        logger = RunLogger(steps_done) if given.logger in (None, True) else given.logger
        bar = sys.stderr.isatty() if given.enable_progress_bar is None else given.enable_progress_bar
        try:
            plugins = [SealedCheckpointIO(), *(given.plugins or [])]
            return super().instantiate_trainer(logger=logger, enable_progress_bar=bar, plugins=plugins)
        except (MisconfigurationException, TypeError, ValueError) as error:
            raise UserError(f"--trainer: {error}; --trainer.accelerator=auto takes what this machine has") from error

    def after_instantiate_classes(self) -> None:
        if str(self.config.trainer.precision) in ("16", "16-mixed") and self.trainer.strategy.root_device.type == "cpu":
            raise UserError("--trainer.precision=16-mixed: needs a GPU; on a processor use bf16-mixed or 32-true")
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning at run time
            watched = getattr(callback, "monitor", None)
            if watched is not None and watched not in self.model.logged:
                raise UserError(
                    f"--trainer.callbacks: {type(callback).__name__} watches {watched!r}, which is not logged; "
                    f"there are {', '.join(self.model.logged)}"
                )
        self._say_what_stays()

    def _say_what_stays(self) -> None:
        """A run that goes on has its optimizer's settings in the checkpoint."""
        made = self.checkpoint["hyper_parameters"] if self.checkpoint else {}
        for name in ("lr", "weight_decay"):
            if name in made and made[name] != self.model.hparams[name]:
                say(
                    f"--model.{name}={self.model.hparams[name]:g} has no effect: the optimizer goes on with the "
                    f"checkpoint's {made[name]:g}; start a new run for another"
                )

    def resolved_config(self) -> str:
        """The configuration as YAML, which means the same in every working directory."""
        config = self.config.clone()
        config.data.root = None if config.data.get("csv") else str(self.datamodule.root)
        config.model.weights = self.model.hparams["weights"]
        config.trainer.default_root_dir = str(self.logs.resolve())
        for option in ("cache_dir", "splits", "csv"):
            if config.data.get(option) is not None:
                config.data[option] = str(Path(config.data[option]).expanduser().resolve())
        config.name, config.ckpt_path = self.name, self.started_from
        return str(self.parser.dump(config, skip_none=False))

    def kept(self) -> dict[str, bytes]:
        """Files that a new run's folder holds from the start, by their path in it."""
        return {}

    def about(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """What the result holds beside the scores."""
        return {}

    def _settings(self) -> dict[str, Any]:
        values = yaml.safe_load(self.resolved_config())
        groups = {"model": values["model"], "data": values["data"]}
        return {f"{group}.{name}": value for group, options in groups.items() for name, value in options.items()} | {
            "seed_everything": values["seed_everything"],
            "max_epochs": values["trainer"]["max_epochs"],
        }


def train(options: Sequence[str], root: Path | None = None) -> dict[str, Any]:
    """Fits a head, tests the best checkpoint, writes the result, and says what to do next.

    Args:
        options: of the command line.
        root: the data's root where none is given.

    Returns:
        The content of the run's `result.json`.

    Raises:
        UserError: a mistake in the options or the data.
    """
    started = time.perf_counter()
    be_calm()
    cli = TrainCLI(options, root)
    if cli.say_if_finished():
        return {}
    result = fit_and_test(cli, started)
    data = cli.datamodule
    option = "root" if data.source == data.root else "csv"
    hint = OWN_PHOTOS if data.source == root else STRONGER.format(option, data.source)
    say_result(result, cli)
    say(f"next:     {program()} {hint}")
    return result


def fit_and_test(cli: TrainCLI, started: float) -> dict[str, Any]:
    """Fits, tests the best checkpoint, draws the figures, and writes the result.

    Args:
        cli: with the trainer, the module and the data.
        started: when the command began, in seconds of ``time.perf_counter``.

    Returns:
        The content of the run's `result.json`.
    """
    trainer, module, data = cli.trainer, cli.model, cli.datamodule
    fit_started, before = time.perf_counter(), sum(data.seconds.values())
    trainer.fit(module, datamodule=data, ckpt_path=cli.goes_on_from, weights_only=True)
    fitted = time.perf_counter()
    scores = _evaluate(trainer, module, data, cli.best.best_model_path or None)
    tested = time.perf_counter()
    if cli.config.report:
        _report(cli, scores)
    ended = time.perf_counter()
    seconds = data.seconds | {
        "fit": fitted - fit_started - (sum(data.seconds.values()) - before),
        "test": tested - fitted,
        "report": ended - tested,
        "total": ended - started,
    }
    return cli.run_folder.finish(trainer, scores | cli.about(scores), seconds)


def _evaluate(
    trainer: Trainer, module: TransferClassifier, data: ImageFolderData, best: str | None
) -> dict[str, float]:
    """The scores of the best checkpoint: those of validation from the checkpoint itself, and those of the test."""
    if best is None:  # a dry run keeps no checkpoint
        return _floats(trainer.callback_metrics)
    scores: dict[str, float] = torch.load(best, weights_only=True)["headstart"]["scores"]
    if data.of("test"):
        return scores | _floats(trainer.test(module, data, best, verbose=False, weights_only=True)[0])
    say("data: there is no test split, so the validation score is reported; it also chose the epoch and flatters")
    trainer.validate(module, data, best, verbose=False, weights_only=True)
    return scores


def _report(cli: TrainCLI, scores: dict[str, float]) -> None:
    """The figures, in TensorBoard and in the report; a dry run has no folder for them, and other ranks no data."""
    folder, evaluation = cli.run_folder.folder, cli.collector.evaluation
    if folder is None or evaluation is None:
        return
    from headstart.report.page import About, inspect
    from headstart.search.bank import Setting

    module, setting = cli.model, None
    if not module.tuned:  # how the head alone would do with fewer photos tells nothing of a fine-tuned backbone
        setting = Setting(*(float(module.hparams[name]) for name in ("lr", "weight_decay", "label_smoothing")))
    about = About(f"{folder.parent.name}, {folder.name}", cli.run_folder.command, cli.run_folder.config, scores)
    inspect(cli.trainer, module, cli.datamodule, evaluation, about, folder, setting)


def _floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def program() -> str:
    """How this command was called, so that what it suggests can be typed."""
    return "python train.py" if Path(sys.argv[0]).name == "train.py" else "headstart train"


def say_result(result: Mapping[str, Any], cli: TrainCLI) -> None:
    """The scores, and where the run is."""
    folder = cli.run_folder.folder
    say_scores(result, "the best checkpoint's scores")
    if folder:
        say(f"run:      {folder}")
        if (folder / "report.html").exists():
            say(f"report:   {folder / 'report.html'}")
        say(f"inspect:  tensorboard --logdir {cli.logs}")
