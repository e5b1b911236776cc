"""The verb `evaluate`: a trained head on its own test split, or on any folder with the same classes."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer

from headstart.data.module import ImageData, ImageFolderData
from headstart.data.splits import Item
from headstart.errors import UserError
from headstart.files import write_atomically
from headstart.model.classifier import load_head
from headstart.parser import OptionParser, add_options, parser_of, required
from headstart.report.evaluation import EvaluationCollector
from headstart.report.page import REPORT, About, inspect, predictions_csv
from headstart.runs.folder import RunLogger, claim, command_line, result_of, run_config, write_result
from headstart.terminal import be_calm, say, say_scores

SOURCES = ("root", "csv")
DATA_OPTIONS = ("num_workers", "cache", "cache_dir", "feature_precision", "max_pixels", "batch_size")


class WholeFolder(ImageFolderData):
    """A folder, or a list, of which every image is for the test."""

    def scan(self) -> list[Item]:
        """As of any folder, with the test for each image's split."""
        return [replace(item, split="test") for item in super().scan()]


def evaluate(options: Sequence[str]) -> dict[str, Any]:
    """Scores a head; the figures, the predictions and the scores go to a folder of their own.

    Args:
        options: of the command line.

    Returns:
        The content of `result.json`.

    Raises:
        UserError: a mistake in the options, the checkpoint or the data.
    """
    started = time.perf_counter()
    be_calm()
    parser = _parser()
    given = parser.parse_args(list(options))
    required(given, "--ckpt_path")
    checkpoint = Path(given.ckpt_path).expanduser()
    module = load_head(checkpoint, Path(given.logs))
    data = _data(given, checkpoint, module.class_names)
    name = given.name or f"{data.source.stem}-evaluate"
    logger, collector = RunLogger(), EvaluationCollector()
    trainer = _trainer(given.accelerator, logger, collector)
    data.load(module.backbone, trainer.strategy.root_device)  # before the folder is claimed: it may find mistakes
    folder = logger.folder = claim(Path(given.logs), name)
    scores = {name: float(value) for name, value in trainer.test(module, data, verbose=False)[0].items()}
    evaluation = collector.evaluation
    assert evaluation
    write_atomically(folder / "predictions.csv", predictions_csv(evaluation))
    tested = time.perf_counter()
    if given.report:
        about = About(f"{folder.parent.name}, {folder.name}", command_line(), "", scores)
        inspect(trainer, module, data, evaluation, about, folder)
    logger.save()
    ended = time.perf_counter()
    seconds = data.seconds | {"report": ended - tested, "total": ended - started}
    result = result_of(module.backbone, data, scores, seconds, command_line()) | {"checkpoint": str(checkpoint)}
    write_result(folder, result)
    say_scores(result, f"{len(evaluation.items)} images of {data.source}")
    say(f"mistakes: {folder / 'predictions.csv'}")
    if given.report:
        say(f"report:   {folder / REPORT}")
    say(f"next:     headstart predict --ckpt_path={checkpoint} path/to/files")
    return result


def _trainer(accelerator: str, logger: RunLogger, collector: EvaluationCollector) -> Trainer:
    try:
        return Trainer(
            accelerator=accelerator,
            devices=1,
            logger=logger,
            callbacks=[collector],
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            deterministic=True,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"--accelerator={accelerator}: {error}; auto takes what this machine has") from error


def _parser() -> OptionParser:
    parser = parser_of("evaluate")
    parser.add_argument("--ckpt_path", type=str | None, help="of a trained head, such as logs/…/checkpoints/best.ckpt")
    parser.add_argument(
        "--data.root", type=str | None, help="a folder of class folders; None: the test split of the head's own run"
    )
    parser.add_argument("--data.csv", type=str | None, help="a list of images, instead of a folder")
    add_options(parser, ImageData, "data", DATA_OPTIONS)
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu, or whatever Lightning knows")
    parser.add_argument("--name", type=str | None, help="of the evaluation; None: the data's folder and -evaluate")
    parser.add_argument("--logs", type=str, default="logs", help="where the evaluation's folder goes")
    parser.add_argument("--report", type=bool, default=True, help="draw the figures and write report.html")
    return parser


def _data(given: Any, checkpoint: Path, class_names: Sequence[str]) -> ImageFolderData:
    """All of the given folder, or the test split of the run that the checkpoint belongs to."""
    options = {name: value for name, value in vars(given.data).items() if name not in SOURCES}
    if given.data.root or given.data.csv:
        data: ImageFolderData = WholeFolder(**_given_ones(vars(given.data)), **options)
    else:
        config, folder = run_config(checkpoint), checkpoint.resolve().parent.parent
        if not config:
            raise UserError(f"--data.root is missing: {checkpoint} lies in no run's folder that tells its test split")
        data = ImageFolderData(**_given_ones(config["data"]), splits=str(folder / "splits.csv"), **options)
    if data.class_names != list(class_names):
        raise UserError(f"{data.source}: {difference(class_names, data.class_names)}")
    return data


def _given_ones(data: Mapping[str, Any]) -> dict[str, str]:
    """Of the options that say where the images are, those that are given."""
    return {name: data[name] for name in SOURCES if data.get(name) is not None}


def difference(trained: Sequence[str], found: Sequence[str]) -> str:
    """How a folder's classes differ from a head's, in words."""
    missing, unknown = sorted(set(trained) - set(found)), sorted(set(found) - set(trained))
    parts = [("missing", missing), ("unknown to the head", unknown)]
    listed = "; ".join(
        f"{name}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for name, names in parts if names
    )
    return f"its classes are not those of the head ({listed or 'another order'}); rename or add the class folders"
