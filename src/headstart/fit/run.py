"""The steps of a run: fit, test of the best checkpoint, report and result."""

from collections.abc import Mapping
from traceback import extract_tb
from typing import Any

import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException

from headstart.errors import UserError
from headstart.files import write_atomically
from headstart.fit.cli import TrainCLI
from headstart.fit.known import add_known
from headstart.fit.rival import meet_rival
from headstart.model.metrics import defined
from headstart.report.domains import domain_scores, say_domains
from headstart.report.multilabel import label_scores, say_labels
from headstart.report.predictions import predictions_csv
from headstart.runs.history import PREDICTIONS, REPORT
from headstart.runs.trackers import say_where
from headstart.terminal import Seconds, say, say_scores


def fit(cli: TrainCLI, seconds: Seconds) -> None:
    """Fits the module, and keeps the better one of the best epoch's head and the exact optimum as ``best.ckpt``.

    Time that the data module records itself is not counted.
    """
    before = sum(cli.datamodule.store.seconds.values())
    try:
        with seconds.of("fit"):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.resume_from, weights_only=True)
            meet_rival(cli)
            add_known(cli)
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        # Lightning checks some options only against the data, or against what a callback finds.
        if "pytorch_lightning" not in extract_tb(error.__traceback__)[-1].filename:
            raise
        raise UserError(f"--trainer: {' '.join(str(error).split())}") from error
    seconds["fit"] -= sum(cli.datamodule.store.seconds.values()) - before


def test(cli: TrainCLI, seconds: Seconds) -> dict[str, Any]:
    """Scores of the chosen checkpoint: the validation scores stored in it, and the test scores."""
    trainer, module, data, path = cli.trainer, cli.model, cli.datamodule, cli.chosen.best_model_path
    if not path:  # a dry run keeps no checkpoint
        return dict(defined(trainer.callback_metrics))
    made = torch.load(path, weights_only=True)["headstart"]
    scores, head = made["scores"], {"head": made["head"]}
    if cli.chosen is cli.last:
        say("fit: nothing was validated, so the last checkpoint is used; choosing the best needs validation")
    with seconds.of("test"):
        if data.items_in("test") and (tested := trainer.test(module, data, path, verbose=False, weights_only=True)):
            return {**head, **scores, **defined(tested[0])}
        if scores:
            say("data: nothing is tested, so the optimistic validation score is reported; it also chose the epoch")
            trainer.validate(module, data, path, verbose=False, weights_only=True)
    return {**head, **scores}


def report(cli: TrainCLI, scores: Mapping[str, float], seconds: Seconds) -> None:
    """Says the verdict, and draws the figures for TensorBoard and the page; not in dry runs, and on rank zero only."""
    folder, evaluation, module, data = cli.run_folder.folder, cli.collector.evaluation, cli.model, cli.datamodule
    if folder is None or evaluation is None:
        return
    if evaluation.split == "test":
        write_atomically(folder / PREDICTIONS, predictions_csv(evaluation))
    with seconds.of("report"):
        from headstart.report.verdict import verdict_of

        mirror, curve, leaks = None, None, ""
        if cli.config.report:
            from headstart.report.leaks import leaks_of
            from headstart.report.learning_curve import learning_curve_of
            from headstart.report.mirror import mirror_check_of

            curve = learning_curve_of(module, data) if evaluation.split == "test" else None
            if (mirror := mirror_check_of(module, data)) and mirror.advice:
                say(f"data: {mirror.advice}")
            if leaks := "" if module.finetuned else leaks_of(data):
                say(f"data: {leaks}")
        verdict = verdict_of(evaluation, curve, module, data.source.options, cli.chosen.best_model_path)
        if cli.config.report:
            from headstart.report.page import write_report

            loggers = cli.trainer.loggers
            write_report(
                folder, evaluation, data, module, scores, verdict, loggers, curve, mirror, leaks, cli.changed()
            )
        verdict.say()


def finish(cli: TrainCLI, scores: Mapping[str, Any], seconds: Seconds) -> dict[str, Any]:
    """Writes the result, prints the scores and the run's folder; returns the content of ``result.json``."""
    found = dict(scores) | domain_scores(cli.collector.evaluation) | label_scores(cli.collector.evaluation)
    result = cli.run_folder.finish(cli.trainer, found, seconds.with_total())
    images, seen = result["images"]["train"], result["images_per_epoch"]
    if seen < images - cli.trainer.world_size:
        say(f"fit: an epoch saw {seen} of {images} training images")
    say_scores(result, f"the {cli.chosen.filename} checkpoint's scores")
    say_domains(result)
    say_labels(result)
    if "head" in result:
        say(f"head:     {result['head']}")
    if folder := cli.run_folder.folder:
        say(f"run:      {folder}")
        if (folder / REPORT).exists():
            say(f"report:   {folder / REPORT}")
        for logger in cli.trainer.loggers:
            say_where(logger, cli.logs)
    return result
