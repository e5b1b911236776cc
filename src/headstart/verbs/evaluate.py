"""The verb `evaluate`: a trained head on its own test split, or on other images of the same classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.data.module import ImageData, ImageFolderData
from headstart.data.sources import open_source
from headstart.device import quiet_trainer
from headstart.errors import UserError
from headstart.files import write_atomically
from headstart.model.checkpoints import read_checkpoint
from headstart.model.classifier import TransferClassifier
from headstart.parser import add_checkpoint, add_options, add_run, parser_of, required
from headstart.report.evaluation import EvaluationCollector
from headstart.report.page import predictions_csv, write_report
from headstart.runs.folder import new_run_folder, result_of, write_result
from headstart.runs.history import Run
from headstart.runs.logger import RunLogger
from headstart.terminal import Seconds, quiet_libraries, say, say_scores, told

WHERE = ("root", "csv", "source")
DATA_OPTIONS = ("num_workers", "cache", "cache_dir", "feature_precision", "max_pixels", "batch_size")


def evaluate(options: Sequence[str]) -> dict[str, Any]:
    """Scores a head; the figures, the predictions and the scores go to a folder of their own.

    Returns the content of `result.json`.
    """
    seconds = Seconds()
    quiet_libraries()
    parser = parser_of("evaluate")
    add_checkpoint(parser)
    add_options(parser, ImageFolderData, "data", (*WHERE, *DATA_OPTIONS))
    add_run(parser, "the data's folder and -evaluate")
    parser.add_argument("--report", type=bool, default=True, help="draw the figures and write report.html")
    given = parser.parse_args(list(options))
    required(given, "--ckpt_path")
    checkpoint = Path(given.ckpt_path).expanduser()
    module = TransferClassifier.from_content(read_checkpoint(checkpoint, Path(given.logs))).eval()
    data = _data(given, checkpoint, module.class_names)
    collector, logger = EvaluationCollector(), RunLogger()
    trainer = quiet_trainer(given.accelerator, callbacks=[collector], logger=logger)
    data.load(module.backbone, trainer.strategy.root_device)  # before the folder is claimed: it may find mistakes
    folder = logger.folder = new_run_folder(Path(given.logs), given.name or f"{data.source.path.stem}-evaluate")
    scores = {name: float(value) for name, value in trainer.test(module, data, verbose=False)[0].items()}
    evaluation = collector.evaluation
    assert evaluation
    write_atomically(folder / "predictions.csv", predictions_csv(evaluation))
    with seconds.of("report"):
        report = write_report(folder, evaluation, data, module, scores, logger) if given.report else None
    logger.save()
    result = result_of(module.backbone, data, scores, seconds.with_total()) | {"checkpoint": str(checkpoint)}
    write_result(folder, result)
    say_scores(result, f"{len(evaluation.items)} images of {data.source.path}")
    say(f"mistakes: {folder / 'predictions.csv'}")
    if report:
        say(f"report:   {report}")
    say(f"next:     headstart predict --ckpt_path={checkpoint} path/to/files")  # wing: deploy
    return result


def _data(given: Any, checkpoint: Path, class_names: Sequence[str]) -> ImageData:
    """All of the given images, or the test split of the run that the checkpoint belongs to."""
    options = {name: given.data[name] for name in DATA_OPTIONS}
    if given.data.root or given.data.csv:
        source = open_source(*(given.data[name] for name in WHERE))
        source.all_in = "test"
    else:
        run = Run.of(checkpoint)
        if not run.data:
            raise UserError(f"--data.root is missing: {checkpoint} lies in no run's folder that tells its test split")
        source = open_source(*(run.data.get(name) for name in WHERE))
        options["splits"] = str(run.splits_file)
    if source.class_names != list(class_names):
        raise UserError(f"{source.path}: {difference(class_names, source.class_names)}")
    return ImageData(source, **options)


def difference(trained: Sequence[str], found: Sequence[str]) -> str:
    """How a folder's classes differ from a head's, in words."""
    missing, unknown = sorted(set(trained) - set(found)), sorted(set(found) - set(trained))
    parts = [("missing", missing), ("unknown to the head", unknown)]
    listed = "; ".join(f"{name}: {told(names, [*missing, *unknown])}" for name, names in parts if names)
    return f"its classes are not those of the head ({listed or 'another order'}); rename or add the class folders"
