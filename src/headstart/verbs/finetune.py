"""The `finetune` command: continues from a trained head and trains the backbone's last layers too."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning.cli import LightningArgumentParser

from headstart.data.sources import WHERE
from headstart.device import COMMON, quiet_trainer
from headstart.errors import UserError
from headstart.finetune.module import FineTunedClassifier
from headstart.fit.cli import TrainCLI
from headstart.fit.run import finish, fit, report, test
from headstart.model.backbone import BACKBONE_OPTIONS
from headstart.model.checkpoints import read_checkpoint
from headstart.model.metrics import defined
from headstart.runs.history import CONFIG, Run, newest_unfinished
from headstart.terminal import Seconds, quiet_libraries, say

HEAD = "checkpoints/head.ckpt"  # the head that a run started from, in its folder
# Settings that fine-tuning inherits from the head; its learning rate does not suit a backbone.
INHERITED = (*BACKBONE_OPTIONS, "head", "weight_decay", "label_smoothing", "class_weights", "best_by", "min_precision")
# Bytes. The front's cached output takes tens of times the space of features.
LARGEST_CACHE = 8 * 2**30


class FinetuneCLI(TrainCLI):
    """The command line of `train`, with defaults from the head's run; ``head`` is the checkpoint's content."""

    usage = "headstart finetune --ckpt_path=logs/…/checkpoints/best.ckpt [options]"
    module_class = FineTunedClassifier
    defaults = COMMON | {"max_epochs": 10}
    ckpt_help = "trained head to start from; `last`: resume the newest unfinished run"
    lean_best = True

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--unfreeze", type=str, default="layer4", help="first layer to train; all: every layer")
        parser.add_argument(
            "--batch_norm",
            type=Literal["eval", "train"],
            default="eval",
            help="running statistics of the trained layers: eval keeps them, train updates them",
        )
        for name in ("unfreeze", "batch_norm"):
            parser.link_arguments(name, f"model.{name}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the options; the head's run gives the defaults."""
        self.config = self._parsed(parser, args)
        if self.config.ckpt_path is None:
            raise UserError("--ckpt_path is missing: give a trained head, such as logs/…/checkpoints/best.ckpt")
        if self.config.ckpt_path == "last":
            self.resumed = newest_unfinished(self.logs, "finetune", self.config.name, self._given_data())
            self.resume_from, self.init_from = self.resumed.last, self.resumed.folder / HEAD
            self.checkpoint = read_checkpoint(self.resume_from)
            args = [f"--config={self.resumed.folder / CONFIG}", *args]
        else:
            self.init_from = Path(self.config.ckpt_path).expanduser().resolve()
        self.head = read_checkpoint(self.init_from, self.logs)
        parser.set_defaults(self._inherited(parser, self.init_from))
        self.config = self._parsed(parser, args)
        if self.config.data.feature_precision == "int8":
            raise UserError("--data.feature_precision=int8: fine-tuning needs the output of a layer; use auto")
        if self.resumed:
            self._keep_the_split(self.resumed.splits_file)

    def _inherited(self, parser: LightningArgumentParser, head: Path) -> dict[str, Any]:
        made, run = self.head["hyper_parameters"], Run.of(head)
        defaults = {f"model.{name}": made[name] for name in INHERITED if name in made}
        if run.data:
            given = self.config.data
            other = given.get("root") is not None or given.get("csv") is not None
            data = {name: value for name, value in run.data.items() if not (other and name in WHERE)}
            data["splits"] = str(run.splits_file)
            if data.get("feature_precision") == "int8":  # the front's output is computed by torch
                data["feature_precision"] = "auto"
            defaults |= {f"data.{name}": value for name, value in data.items()}
            defaults["name"] = f"{run.folder.parent.name.removesuffix('-finetune')}-finetune"
        known = set(parser.get_defaults(skip_validation=True).keys())
        return {name: value for name, value in defaults.items() if name in known}

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        self.model.start_from(self.head)
        self._choose_what_is_cached()

    def _choose_what_is_cached(self) -> None:
        """Caches the frozen front's output where possible; else images are decoded in every epoch."""
        data, front, why = self.datamodule, self.model.front, ""
        assert self.init_from
        if front is None:
            why = "no frozen layers whose output could be cached"
        elif (size := 4 * front.num_features * len(Run.of(self.init_from).images()) * data.views) > LARGEST_CACHE:
            why = f"the front's output would take {size / 1e9:.0f} GB"
        if data.store.cache and why:
            data.store.cache, data.views = False, 1
            say(f"finetune: {why}; images are decoded in every epoch (--data.augment=light varies them)")

    def kept(self) -> dict[str, bytes]:
        return {HEAD: self.init_from.read_bytes()} if self.init_from else {}


def finetune(options: Sequence[str]) -> dict[str, Any]:
    """Trains the head and the backbone's last layers, and says whether that beats the head alone.

    Returns the content of `result.json`: the scores, the head's own as `before/…`, and the `recommended` checkpoint.
    """
    seconds = Seconds()
    quiet_libraries()
    cli = FinetuneCLI(options)
    if cli.say_if_finished():
        return {}
    before = _score_the_head(cli)
    fit(cli, seconds)
    scores = test(cli, seconds)
    report(cli, scores, seconds)
    by = cli.model.hparams["best_by"]
    better = by not in scores or (scores[by] < before[by] if by == "val/loss" else scores[by] > before[by])
    about: dict[str, Any] = {"recommended": "checkpoints/best.ckpt" if better else HEAD}
    about |= {f"before/{name}": value for name, value in before.items()}
    result = finish(cli, scores | about, seconds)
    _say_gain(result, cli.run_folder.folder)
    return result


def _score_the_head(cli: FinetuneCLI) -> dict[str, float]:
    """Scores of the head alone, on the same images and in the same precision."""
    given = cli.config.trainer
    # Without inference mode, since the metrics' tensors are used again in the fit.
    trainer = quiet_trainer(given.accelerator, precision=given.precision, inference_mode=False)
    trainer.validate(cli.model, cli.datamodule, verbose=False)
    scores = defined(trainer.callback_metrics)
    if cli.datamodule.items_in("test"):
        scores |= defined(trainer.test(cli.model, cli.datamodule, verbose=False)[0])
    return scores


def _say_gain(result: Mapping[str, Any], folder: Path | None) -> None:
    for split, score in itertools.product(("val", "test"), ("acc", "map")):
        if f"before/{split}/{score}" in result and f"{split}/{score}" in result:
            before, after = result[f"before/{split}/{score}"], result[f"{split}/{score}"]
            say(f"{split}/{score}:  {before:.3f} with the head alone, {after:.3f} now")
    if folder and result["recommended"] == HEAD:
        say("finetune: validation did not improve: the head alone is the better choice")
    # wing: deploy
    if folder:
        say(f"next:     headstart predict --ckpt_path={folder / result['recommended']} path/to/files")
    # /wing
