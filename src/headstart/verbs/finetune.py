"""The verb `finetune`: from a trained head on, with some of the backbone's layers learning too."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import Trainer
from pytorch_lightning.cli import LightningArgumentParser

from headstart.errors import UserError
from headstart.finetune.module import FineTunedClassifier
from headstart.fit.cli import (
    TRAINER_DEFAULTS,
    FullHelpParser,
    TrainCLI,
    TrainParser,
    fit_and_test,
    say_result,
)
from headstart.model.classifier import read_checkpoint
from headstart.runs.folder import files_of_run, newest_unfinished, run_config
from headstart.terminal import be_calm, say

DEFAULTS = TRAINER_DEFAULTS | {"max_epochs": 10}
HEAD = "checkpoints/head.ckpt"  # what a run started from, in its folder
# A head's settings that go on to hold; its learning rate is no one's for a backbone.
INHERITED = ("backbone", "weights", "image_size", "weight_decay", "label_smoothing", "class_weights")
USAGE = "headstart finetune --ckpt_path=logs/…/checkpoints/best.ckpt [options]"
# Cached output of the front takes tens of times more space than features.
LARGEST_CACHE = 8 * 2**30


class FinetuneParser(TrainParser):
    """Shows the options of the model, the data and the run."""

    usage_line = USAGE


class FullFinetuneParser(FullHelpParser):
    """Shows every option, with those of Lightning's Trainer."""

    usage_line = USAGE


class FinetuneCLI(TrainCLI):
    """The command line of `train`, with the defaults of the head's own run.

    Attributes:
        start: the checkpoint of the head.
        head: its content.
        before: its scores.
    """

    module_class = FineTunedClassifier
    parsers = (FinetuneParser, FullFinetuneParser)
    defaults = DEFAULTS
    ckpt_help = "a trained head, or `last`: go on with the newest unfinished run"
    lean_best = True

    start: Path
    head: dict[str, Any]
    before: dict[str, float]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--unfreeze", type=str, default="layer4", help="the first layer that learns, or all")
        parser.add_argument(
            "--batch_norm",
            type=Literal["eval", "train"],
            default="eval",
            help="of the layers that learn: keep the running statistics, or update them",
        )
        for name in ("unfreeze", "batch_norm"):
            parser.link_arguments(name, f"model.{name}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """The head's run gives the defaults; options of the command line win over it."""
        given = parser.parse_args(args)
        if given.ckpt_path is None:
            raise UserError("--ckpt_path is missing: give a trained head, such as logs/…/checkpoints/best.ckpt")
        logs = Path(given.trainer.default_root_dir)
        if given.ckpt_path == "last":
            last = newest_unfinished(logs, given.name or "*-finetune")
            self.resumed = last.parent.parent
            self.checkpoint, self.start = read_checkpoint(last), self.resumed / HEAD
            own = f"--config={self.resumed / 'config.yaml'}", f"--data.splits={self.resumed / 'splits.csv'}"
            args = [*own, *args]
        else:
            self.start = Path(given.ckpt_path).expanduser().resolve()
        self.head = read_checkpoint(self.start, logs)
        parser.set_defaults(self._inherited(parser))
        self.config = parser.parse_args(args)
        self.config.ckpt_path = str(self.start)

    def _inherited(self, parser: LightningArgumentParser) -> dict[str, Any]:
        made, config = self.head["hyper_parameters"], run_config(self.start)
        defaults = {f"model.{name}": made[name] for name in INHERITED}
        if config:
            folder = self.start.parent.parent
            data = config["data"] | {"splits": str(folder / "splits.csv")}
            defaults |= {f"data.{name}": value for name, value in data.items()}
            defaults["name"] = f"{folder.parent.name.removesuffix('-finetune')}-finetune"
        known = set(parser.get_defaults(skip_validation=True).keys())
        return {name: value for name, value in defaults.items() if name in known}

    @property
    def goes_on_from(self) -> str | None:
        return str(self.resumed / "checkpoints/last.ckpt") if self.resumed else None

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        self.model.start_from(self.head)
        self._choose_the_way_of_images()

    def _choose_the_way_of_images(self) -> None:
        """What a frozen front gives is cached where there is one; else images are decoded in every epoch."""
        data, front = self.datamodule, self.model.front
        why = "" if front else "nothing is frozen whose output could be cached"
        if front:
            size = 4 * front.num_features * len(files_of_run(self.start)) * data.views
            why = f"the front's output would take {size / 1e9:.0f} GB" if size > LARGEST_CACHE else ""
        if data.cache and why:
            data.cache, data.views = False, 1
            say(f"finetune: {why}; images are decoded in every epoch (--data.augment=light varies them)")

    @property
    def started_from(self) -> str:
        return str(self.start)

    def kept(self) -> dict[str, bytes]:
        return {HEAD: self.start.read_bytes()}

    def about(self, scores: Mapping[str, float]) -> dict[str, Any]:
        """The scores of the head alone, and which checkpoint validates better."""
        better = "val/loss" not in scores or scores["val/loss"] < self.before["val/loss"]
        recommended = "checkpoints/best.ckpt" if better else HEAD
        return {f"before/{name}": value for name, value in self.before.items()} | {"recommended": recommended}

    def score_the_head(self) -> None:
        """Its scores on the same images, in the same arithmetic."""
        trainer = Trainer(
            accelerator=self.config.trainer.accelerator,
            precision=self.config.trainer.precision,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,  # the metrics' tensors are used again in the fit
        )
        trainer.validate(self.model, self.datamodule, verbose=False)
        self.before = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.datamodule.of("test"):
            self.before |= trainer.test(self.model, self.datamodule, verbose=False)[0]


def finetune(options: Sequence[str]) -> dict[str, Any]:
    """Trains the head and the backbone's last layers, and says whether that was better than the head alone.

    Args:
        options: of the command line.

    Returns:
        The content of the run's `result.json`: the scores, those `before/…`, and the `recommended` checkpoint.

    Raises:
        UserError: a mistake in the options, the checkpoint or the data.
    """
    started = time.perf_counter()
    be_calm()
    cli = FinetuneCLI(options, None)
    if cli.say_if_finished():
        return {}
    cli.score_the_head()
    result = fit_and_test(cli, started)
    say_result(result, cli)
    _say_gain(result, cli.run_folder.folder)
    return result


def _say_gain(result: Mapping[str, Any], folder: Path | None) -> None:
    for split in ("val", "test"):
        if f"before/{split}/acc" in result and f"{split}/acc" in result:
            before, after = result[f"before/{split}/acc"], result[f"{split}/acc"]
            say(f"{split}/acc:  {before:.3f} with the head alone, {after:.3f} now")
    if folder:
        recommended = folder / result["recommended"]
        if result["recommended"] == HEAD:
            say("finetune: validation did not improve (by its loss): the head alone is the better choice")
        say(f"next:     headstart predict --ckpt_path={recommended} path/to/files")
