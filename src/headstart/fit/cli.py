"""The LightningCLI: one command line that trains, resumes and repeats runs."""

import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, Timer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI

from headstart.data.module import ImageFolderData
from headstart.data.splits import Repeat, repeated
from headstart.device import COMMON
from headstart.errors import UserError
from headstart.files import flat
from headstart.model.checkpoints import finetuned_in, read_checkpoint
from headstart.model.classifier import TransferClassifier
from headstart.model.sealed import BEST, RunCheckpoint, SealedCheckpointIO, run_checkpoints
from headstart.model.weights import for_data
from headstart.parser import OptionParser
from headstart.ranges import RunName, Seed
from headstart.report.collector import EvaluationCollector
from headstart.runs.folder import RunFolder
from headstart.runs.history import CONFIG, Run, newest_unfinished
from headstart.runs.logger import RunLogger
from headstart.runs.trackers import in_run_folder, prepare
from headstart.terminal import say

# The other precisions convert the weights, and the backbone's must not change.
PRECISIONS = ("None", "32", "32-true", "bf16", "bf16-mixed", "16", "16-mixed")


class TrainParser(OptionParser, LightningArgumentParser):
    """Lightning's parser, with short help and one-line errors."""

    last_line = "  --help_all                  list every option, with those of Lightning's Trainer"

    def instantiate_classes(self, cfg: Any, **options: Any) -> Any:
        """As in jsonargparse; a logger or callback that needs a missing package is an error of one line."""
        try:
            return super().instantiate_classes(cfg, **options)
        except ValueError as error:
            needs = r"class_path '([\w.]+)':\s*(Requirement .+ not met.*|No module named .+)"
            if missing := re.search(needs, str(error)):
                raise UserError(f"{missing[1]}: {missing[2]}") from error
            raise


class TrainCLI(LightningCLI):
    """Lightning's command line for one model class and image folders; ``root`` is the default of ``--data.root``."""

    usage = "python train.py [options]    or    headstart train [options]"
    module_class: type[TransferClassifier] = TransferClassifier
    defaults: Mapping[str, Any] = COMMON | {"max_epochs": 25}
    ckpt_help = "checkpoint to resume in a new run; `last`: resume the newest unfinished run in its own folder"
    lean_best = False  # whether best.ckpt leaves out the optimizer, twice the size of the trained parameters

    def __init__(self, options: Sequence[str], root: Path | None = None) -> None:
        self.root, self.full_help = root, "--help_all" in options
        # The Trainer's own name for the folder of all runs is accepted too.
        options = [re.sub(r"^(--)?trainer\.default_root_dir(?==|$)", "--logs", option) for option in options]
        options = in_run_folder(options)
        self.init_from: Path | None = None  # the checkpoint that the model starts from; None: initial values
        self.resume_from: Path | None = None  # the checkpoint whose fit is resumed; None: a new fit
        self.checkpoint: dict[str, Any] | None = None  # the content of ``resume_from``
        self.resumed: Run | None = None  # the run that is resumed in its own folder; None: a new folder
        self.repeat: Repeat | None = None  # selects the images of the resumed run
        super().__init__(
            self.module_class,
            ImageFolderData,
            args=["--help"] if self.full_help else options,
            run=False,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_defaults=dict(self.defaults),
            parser_class=TrainParser,
            parser_kwargs={"allow_abbrev": False},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        assert isinstance(parser, TrainParser)
        parser.usage_line, parser.full = self.usage, self.full_help
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        described = "seed of the initial values and of the order of images; true: random; false: not set"
        parser.add_argument("--seed_everything", type=bool | Seed, default=self.seed_everything_default, help=described)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=RunName | None, help="name of the run; None: the name of the data's folder")
        parser.add_argument("--logs", type=str | None, help="where to write the run's folder; None: logs")
        parser.add_argument("--ckpt_path", type=str | None, help=self.ckpt_help)
        parser.add_argument("--report", type=bool, default=True, help="draw the figures and write report.html")
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.link_arguments("data.multilabel", "model.multilabel", apply_on="instantiate")
        parser.link_arguments("data.flip", "model.mirror")
        if self.root:
            parser.set_defaults({"data.root": str(self.root)})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the options; a resumed run starts from its own configuration, which the command line overrides."""
        self.config = self._parsed(parser, args)
        if self.config.data.get("csv") is not None and self.config.data.root == str(self.root):
            self.config.data.root = None  # the demo is the default only if no data is given
        if self.config.ckpt_path == "last":
            self.resumed = newest_unfinished(self.logs, "train", self.config.name, self._given_data())
            self.config = self._parsed(parser, [f"--config={self.resumed.folder / CONFIG}", *args])
            self.config.ckpt_path = str(self.resumed.last)
        if self.config.ckpt_path:
            self.resume_from = Path(self.config.ckpt_path)
            self.checkpoint = read_checkpoint(self.resume_from, self.logs)
            if "optimizer_states" not in self.checkpoint and not finetuned_in(self.checkpoint):
                raise UserError(
                    f"--ckpt_path={self.resume_from}: its head ({self.checkpoint['headstart'].get('head')}) has no "
                    "optimizer to resume; give the last.ckpt of its run"
                )
            self._keep_the_split(Run.of(self.resume_from).splits_file)
            if self.config.data.feature_precision == "auto":
                self.config.data.feature_precision = self.checkpoint["headstart"].get("arithmetic") or "auto"
        self.config.model.weights = self._weights_of(self.config.model.backbone, self.config.model.weights)

    def _parsed(self, parser: LightningArgumentParser, args: Any) -> Any:
        """The options; a seed of `true` is drawn here, since Lightning would always take 0."""
        config = parser.parse_args(args)
        if config.seed_everything is True:
            config.seed_everything = int(os.environ.get("PL_GLOBAL_SEED") or secrets.randbelow(2**32))
        return config

    def _weights_of(self, backbone: str, weights: str) -> str:
        """The weights for the data at hand."""
        data = self.config.data
        return for_data(backbone, weights, data.get("csv") or data.root)

    def _given_data(self) -> Path | None:
        """The data named on the command line; None: the demo, or the data of the run to resume."""
        data = self.config.data
        given = data.get("csv") or (data.root if data.root != str(self.root) else None)
        return Path(given).expanduser() if given else None

    def _keep_the_split(self, file: Path) -> None:
        """Keeps the images and the split of a resumed run; another split would test on training images."""
        if not file.is_file():
            say(f"data: {file} is missing, so the images are split again; the test split may contain training images")
        elif self.resumed or not self.config.data.splits:
            self.config.data.splits, self.repeat = str(file), partial(repeated, file=file)

    @property
    def logs(self) -> Path:
        """The folder of all runs; old configurations use the Trainer's name for it."""
        return Path(self.config.logs or self.config.trainer.default_root_dir or "logs")

    @property
    def name(self) -> str:
        """The run's name."""
        data = self.config.data
        given = Path(data.get("csv") or data.root or "").expanduser().resolve()
        return str(self.config.name or (given.stem if data.get("csv") or given.is_file() else given.name) or "images")

    @property
    def chosen(self) -> RunCheckpoint:
        """The checkpoint that is tested: the best, or the last if nothing was validated."""
        return self.last if self.last.best_model_path and not self.best.best_model_path else self.best

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self.config_init.trainer
        if str(given.precision) not in PRECISIONS:
            allowed = "use 32-true, bf16-mixed or 16-mixed"
            raise UserError(f"--trainer.precision={given.precision}: converts the frozen backbone's weights; {allowed}")
        self.run_folder = RunFolder(self.logs, self.name, self.resolved_config(), self.resumed, self.kept())
        by = self.config.model.best_by
        mode = "min" if by == "val/loss" else "max"
        self.best, self.last = run_checkpoints(
            self.resumed is not None, monitor=by, mode=mode, save_weights_only=self.lean_best
        )
        self.collector = EvaluationCollector()
        own = given.callbacks if isinstance(given.callbacks, list) else [given.callbacks] if given.callbacks else []
        bar = sys.stderr.isatty() if given.enable_progress_bar is None else given.enable_progress_bar
        rates = [] if given.logger in (False, []) else [LearningRateMonitor("epoch")]  # it requires a logger
        # TensorBoard drops what a killed process wrote for steps that are repeated.
        steps_done = self.checkpoint["global_step"] if self.checkpoint and self.resumed else None
        try:
            return super().instantiate_trainer(
                callbacks=[*own, self.run_folder, *rates, self.collector, self.best, self.last],
                logger=RunLogger(steps_done=steps_done) if given.logger in (None, True) else given.logger,
                enable_progress_bar=bar,
                plugins=[SealedCheckpointIO(), *(given.plugins or [])],
                default_root_dir=str(self.logs),
            )
        except (ImportError, MisconfigurationException, TypeError, ValueError) as error:
            remedy = "; --trainer.accelerator=auto uses what this machine has" if given.accelerator != "auto" else ""
            raise UserError(f"--trainer: {error}{remedy}") from error

    def after_instantiate_classes(self) -> None:
        prepare(self.trainer.loggers)
        self.datamodule.repeat = self.repeat
        if str(self.config.trainer.precision) in ("16", "16-mixed") and self.trainer.strategy.root_device.type == "cpu":
            raise UserError("--trainer.precision=16-mixed: needs a GPU; on a CPU use bf16-mixed or 32-true")
        for option in ("max_epochs", "max_steps", "limit_train_batches"):
            if getattr(self.trainer, option) == 0:
                raise UserError(f"--trainer.{option}=0: leaves nothing to train; give more, or leave it out")
        for option in ("accumulate_grad_batches", "check_val_every_n_epoch"):
            if self.config.trainer[option] is not None and self.config.trainer[option] < 1:
                raise UserError(f"--trainer.{option}={self.config.trainer[option]}: give 1 or more, or leave it out")
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning at run time
            if isinstance(callback, Timer) and not callback.time_remaining():
                raise UserError("--trainer.max_time=00:00:00:00: leaves no time; give days:hours:minutes:seconds")
            watched = getattr(callback, "monitor", None)
            if watched is not None and watched not in self.model.logged:
                raise UserError(
                    f"--trainer.callbacks: {type(callback).__name__} monitors {watched!r}, which is not logged; "
                    f"choose from {', '.join(self.model.logged)}"
                )
        if self.checkpoint:
            self.model.on_load_checkpoint(self.checkpoint)  # refuses another head before any work
        made = self.checkpoint["hyper_parameters"] if self.checkpoint else {}
        for name in ("lr", "weight_decay"):
            if name in made and made[name] != self.model.hparams[name]:
                say(
                    f"--model.{name}={self.model.hparams[name]:g} has no effect: the optimizer resumes with the "
                    f"checkpoint's {made[name]:g}; start a new run to change it"
                )

    def say_if_finished(self) -> bool:
        """Says so if nothing is left to train; a run killed before its test is not finished."""
        epochs = self.checkpoint["epoch"] + 1 if self.checkpoint else 0
        limit = self.trainer.max_epochs
        if not epochs or limit in (None, -1) or epochs < limit or (epochs == limit and self.resumed):
            return False
        say(f"already finished: {self.resume_from} has {epochs} epochs; raise --trainer.max_epochs")
        return True

    def resolved_config(self) -> str:
        """The configuration as YAML, independent of the working directory."""
        config = self.config.clone()
        config.data.root = None if config.data.get("csv") else str(self.datamodule.source.path)
        config.model.weights = self.model.hparams["weights"]
        config.logs, config.trainer.default_root_dir = str(self.logs.resolve()), None
        for option in ("cache_dir", "splits", "csv"):
            if config.data.get(option) is not None:
                config.data[option] = str(Path(config.data[option]).expanduser().resolve())
        config.name, config.ckpt_path = self.name, str(self.init_from) if self.init_from else None
        return str(self.parser.dump(config, skip_none=False))

    def changed(self) -> dict[str, Any]:
        """The settings that differ from the defaults, by dotted name."""
        defaults = flat(self.parser.get_defaults(skip_validation=True).as_dict())
        config = flat(yaml.safe_load(self.resolved_config()))
        return {name: value for name, value in config.items() if value != defaults.get(name)}

    def kept(self) -> dict[str, bytes]:
        """Files to copy into a new run's folder, by path in it.

        The resumed checkpoint takes part in the choice of the best.
        """
        return {BEST: self.resume_from.read_bytes()} if self.resume_from else {}
