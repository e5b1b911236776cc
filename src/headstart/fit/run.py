"""From a command line to a result: the fit, the test of the best checkpoint, the report, what is said."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headstart.fit.cli import TrainCLI
from headstart.runs.history import REPORT
from headstart.runs.logger import RunLogger
from headstart.terminal import Seconds, say, say_scores


def fit(cli: TrainCLI, seconds: Seconds) -> None:
    """Fits the module to the data; the data's own time is not the fit's."""
    before = sum(cli.datamodule.store.seconds.values())
    with seconds.of("fit"):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
    seconds["fit"] -= sum(cli.datamodule.store.seconds.values()) - before


def test(cli: TrainCLI, seconds: Seconds) -> dict[str, Any]:
    """The scores of the best checkpoint: those of validation from the checkpoint itself, and those of the test."""
    trainer, module, data, best = cli.trainer, cli.model, cli.datamodule, cli.best.best_model_path
    if not best:  # a dry run keeps no checkpoint
        return {name: float(value) for name, value in trainer.callback_metrics.items()}
    scores: dict[str, Any] = torch.load(best, weights_only=True)["headstart"]["scores"]
    with seconds.of("test"):
        if data.items_in("test"):
            return {**scores, **trainer.test(module, data, best, verbose=False, weights_only=True)[0]}
        say("data: there is no test split, so the validation score is reported; it also chose the epoch and flatters")
        trainer.validate(module, data, best, verbose=False, weights_only=True)
    return scores


def report(cli: TrainCLI, scores: Mapping[str, float], seconds: Seconds) -> None:
    """The figures, in TensorBoard and in the report; a dry run has no folder for them, and other ranks no data."""
    folder, evaluation, module, data = cli.run_folder.folder, cli.collector.evaluation, cli.model, cli.datamodule
    logger = cli.trainer.logger if isinstance(cli.trainer.logger, RunLogger) else None
    with seconds.of("report"):
        if folder is None or evaluation is None or not cli.config.report:
            return
        from headstart.report.learning_curve import learning_curve_of  # what draws takes a while to import
        from headstart.report.mirror import mirror_check_of
        from headstart.report.page import write_report

        mirror = mirror_check_of(module, data)
        if mirror and mirror.advice:
            say(f"data: {mirror.advice}")
        curve = learning_curve_of(module, data, cli.trainer.max_epochs) if evaluation.split == "test" else None
        write_report(folder, evaluation, data, module, scores, logger, curve, mirror)


def finish(cli: TrainCLI, scores: Mapping[str, Any], seconds: Seconds) -> dict[str, Any]:
    """Writes the result, and says the scores and where the run is; gives the content of ``result.json``."""
    result = cli.run_folder.finish(cli.trainer, dict(scores), seconds.with_total())
    say_scores(result, "the best checkpoint's scores")
    if folder := cli.run_folder.folder:
        say(f"run:      {folder}")
        if (folder / REPORT).exists():
            say(f"report:   {folder / REPORT}")
        say(f"inspect:  tensorboard --logdir {cli.logs}")
    return result


def program() -> str:
    """How this command was called, so that what it suggests can be typed."""
    return "python train.py" if Path(sys.argv[0]).name == "train.py" else "headstart train"
