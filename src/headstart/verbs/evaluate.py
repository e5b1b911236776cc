"""The `evaluate` command: scores a trained head on its own test split or on other images of the same classes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.data import folders
from headstart.data.module import ImageData, ImageFolderData
from headstart.data.sources import WHERE, ListedSource, chosen_source
from headstart.data.splits import Split, places_of, repeated
from headstart.device import quiet_trainer
from headstart.errors import UserError
from headstart.features.arithmetic import as_trained
from headstart.features.stream import FileStream
from headstart.files import write_atomically
from headstart.model.checkpoints import read_checkpoint
from headstart.model.classifier import TransferClassifier
from headstart.model.known import Known, unknown_scores
from headstart.model.metrics import defined
from headstart.parser import add_checkpoint, add_options, add_run, parser_of, required
from headstart.report.answered import answered_table
from headstart.report.collector import EvaluationCollector
from headstart.report.domains import domain_scores, say_domains
from headstart.report.evaluation import Evaluation, Predictions
from headstart.report.multilabel import label_scores, say_labels
from headstart.report.page import write_report
from headstart.report.predictions import predictions_csv
from headstart.report.verdict import verdict_of
from headstart.runs.folder import new_run_folder, result_of, write_result
from headstart.runs.history import PREDICTIONS, Run
from headstart.runs.logger import RunLogger
from headstart.terminal import Seconds, listing, quiet_libraries, say, say_scores

REFUSED = 0.05  # of the own images, in what is printed
DATA_OPTIONS = ("num_workers", "cache", "cache_dir", "feature_precision", "max_pixels", "batch_size", "strict")


def evaluate(options: Sequence[str]) -> dict[str, Any]:
    """Scores a head; writes the figures, the predictions and the scores to a new folder.

    Returns the content of `result.json`.
    """
    seconds = Seconds()
    quiet_libraries()
    parser = parser_of("evaluate")
    add_checkpoint(parser)
    add_options(parser, ImageFolderData, "data", (*WHERE, *DATA_OPTIONS))
    add_run(parser, "<data folder>-evaluate")
    parser.add_argument(
        "--unknown.root", type=str | None, help="folder of images of none of the classes, to measure `known` on"
    )
    parser.add_argument("--report", type=bool, default=True, help="draw the figures and write report.html")
    given = parser.parse_args(list(options))
    required(given, "--ckpt_path")
    checkpoint = Path(given.ckpt_path).expanduser()
    content = read_checkpoint(checkpoint, Path(given.logs))
    module = TransferClassifier.from_content(content).eval()
    data = _data(given, checkpoint, module.class_names)
    collector, logger = EvaluationCollector(), RunLogger()
    trainer = quiet_trainer(given.accelerator, callbacks=[collector], logger=logger)
    device, asked = trainer.strategy.root_device, data.store.feature_precision
    data.store.feature_precision = as_trained(asked, module.arithmetic, device)
    data.load(module.backbone, device)  # before the folder is created, since it may raise
    known = module.known
    far = _unknown_distances(given.unknown.root, known, data) if given.unknown.root else None
    seen = _seen_before(checkpoint, content, data) if given.data.root or given.data.csv else {}
    if seen and given.data.strict:
        raise UserError(f"--data.strict: {len(seen)} of these images were in training or chose the epoch; remove them")
    name, path = given.name or f"{data.source.path.stem}-evaluate", data.source.path
    folder = logger.folder = new_run_folder(Path(given.logs), name, path)
    scores = defined(trainer.test(module, data, verbose=False)[0])
    evaluation = collector.evaluation
    assert evaluation
    scores |= _scores_of_new(module, evaluation, seen) if seen else {}
    # First, since it is the loss of the probabilities that every command returns; test/loss is of the raw logits.
    losses = module.task.losses(module.task.calibrated(evaluation.logits), evaluation.labels)
    scores = {"test/loss_scaled": float(losses.mean())} | scores
    if known and far is not None:
        scores |= _scores_of_unknown(known, known.distance(evaluation.features), far)  # of at most 2,000 images
    write_atomically(folder / PREDICTIONS, predictions_csv(evaluation))
    verdict = verdict_of(evaluation, None, module, data.source.options, str(checkpoint))
    verdict.say()
    with seconds.of("report"):
        report = write_report(folder, evaluation, data, module, scores, verdict, [logger]) if given.report else None
    logger.save()
    result = result_of(
        module.backbone, data, scores | domain_scores(evaluation) | label_scores(evaluation), seconds.with_total()
    )
    result["checkpoint"] = str(checkpoint)
    write_result(folder, result)
    say_scores(result, f"{len(evaluation.items)} images of {data.source.path}")
    say_domains(result)
    say_labels(result)
    if isinstance(evaluation, Evaluation):
        say(answered_table(evaluation))
    say(f"mistakes: {folder / PREDICTIONS}")
    if report:
        say(f"report:   {report}")
    say(f"next:     headstart predict --ckpt_path={checkpoint} path/to/files")  # wing: deploy
    return result


def _data(given: Any, checkpoint: Path, class_names: Sequence[str]) -> ImageData:
    """All given images, or the test split of the run that the checkpoint belongs to."""
    options, own_test = {name: given.data[name] for name in DATA_OPTIONS}, None
    if given.data.root or given.data.csv:
        source = chosen_source(given.data)
        source.all_in = "test"
        if source.multilabel and isinstance(source, ListedSource) and set(source.class_names) < set(class_names):
            source.renumber(class_names)
    else:
        run = Run.of(checkpoint)
        if not run.data:
            raise UserError(f"--data.root is missing: {checkpoint} is not in the folder of a run with a test split")
        source = chosen_source(run.data)
        own_test = partial(repeated, file=run.splits_file, only=("test",))
    if source.class_names != list(class_names):
        raise UserError(f"{source.path}: {difference(class_names, source.class_names)}")
    data = ImageData(source, **options)
    data.repeat = own_test
    return data


def _seen_before(checkpoint: Path, content: Mapping[str, Any], data: ImageData) -> dict[str, Split]:
    """The split of the given images that were used to train this head or choose its epoch, by path."""
    file, known = Run.of(checkpoint).splits_file, content["headstart"].get("trained_on", [])
    if file.is_file():
        places = places_of("--ckpt_path", file)
    elif known:
        places = dict.fromkeys(known, "train")
    else:
        say(f"evaluate: {file} is missing, so it is unknown whether some of these images trained this head")
        return {}
    found = {item.path: places[item.digest.hex()] for item in data.items if item.digest.hex() in places}
    return {path: split for path, split in found.items() if split != "test"}


def _scores_of_new(module: TransferClassifier, evaluation: Predictions, seen: Mapping[str, Split]) -> dict[str, float]:
    """Scores of the images that had no part in the training, which are the reliable ones."""
    new = torch.tensor([item.path not in seen for item in evaluation.items])
    trained, total = sum(split == "train" for split in seen.values()), len(evaluation.items)
    said = f"evaluate: {trained} of {total} images were in training, and {len(seen) - trained} chose the epoch"
    if not new.any():
        say(f"{said}; none is new, so these scores are optimistic")
        return {}
    metrics = module.configure_metrics("new/")
    metrics.update(module.task.activation(evaluation.logits[new]), evaluation.labels[new])
    scores = defined(metrics.compute())
    say(f"{said}; on the {int(new.sum())} new ones: {', '.join(f'{k[4:]} {v:.3f}' for k, v in scores.items())}")
    return scores


def _unknown_distances(root: str, known: Known | None, data: ImageData) -> Tensor:
    """The distances of the images of none of the classes."""
    store, paths = data.store, folders.images(folders.existing(root, "--unknown.root"))
    if known is None:
        raise UserError(f"--unknown.root={root}: this head cannot tell; use best.ckpt of a run with the cache")
    arithmetic = store.arithmetic if store.cache else "fp32"  # that of the images evaluated
    stream = FileStream(store.backbone, store.device, arithmetic, store.workers, store.max_pixels, store.cache_dir)
    found = torch.cat([torch.empty(0), *(known.distance(part.features) for part in stream(map(str, paths)))])
    if not len(found):
        raise UserError(f"--unknown.root={root}: contains no readable images; give images of none of the classes")
    return found


def _scores_of_unknown(known: Known, own: Tensor, far: Tensor) -> dict[str, float]:
    """How well the distances separate images of the classes from images of none of them."""
    scores = unknown_scores(own, far)
    refused = [float((known.share(distances) <= REFUSED).float().mean()) for distances in (far, own)]
    say(
        f"unknown:  AUROC {scores['unknown/auroc']:.3f}, false positives at 95 % {scores['unknown/fpr95']:.3f}; "
        f"--unknown={REFUSED} rejects {refused[0]:.1%} of these {len(far)} images, and {refused[1]:.1%} of the known"
    )
    return scores


def difference(trained: Sequence[str], found: Sequence[str]) -> str:
    """Describes how a folder's classes differ from a head's."""
    missing, unknown = sorted(set(trained) - set(found)), sorted(set(found) - set(trained))
    parts = [("missing", missing), ("unknown to the head", unknown)]
    listed = "; ".join(f"{name}: {listing(names, [*missing, *unknown])}" for name, names in parts if names)
    return f"its classes are not those of the head ({listed or 'another order'}); rename or add the class folders"
