"""The `predict` command: streams files and writes the class of each one."""

import contextlib
import csv
import io
import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TextIO

from headstart.data import folders
from headstart.data.splits import BETWEEN
from headstart.decoding import MAX_PIXELS
from headstart.deploy.predictor import Answers, Prediction, Predictor
from headstart.device import device_of
from headstart.errors import UserError
from headstart.features.arithmetic import FeaturePrecision, as_trained, chosen
from headstart.features.hashes import cache_folder
from headstart.features.stream import FileStream
from headstart.files import check_writable, in_either_form, new_path
from headstart.model.classifier import TransferClassifier
from headstart.parser import OptionParser, add_accelerator, add_answers, add_checkpoint, parser_of, required
from headstart.ranges import Count, Positive
from headstart.terminal import images_bar, quiet_libraries, say

FORMATS = (".csv", ".jsonl")


def predict(options: Sequence[str]) -> dict[str, int]:
    """Writes a row per file, to a CSV or JSON Lines file or to standard output.

    Returns the number of files `predicted` and of `errors`.
    """
    quiet_libraries()
    given = _parser().parse_args(list(options))
    required(given, "--ckpt_path")
    if given.output is None and sys.__stdout__ is None:
        raise UserError("--output is missing: the standard output is closed")
    rows, counts = sys.stdout, {"predicted": 0, "errors": 0}
    with contextlib.ExitStack() as stack:
        if given.output is None:  # rows go to standard output, messages to standard error
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            if isinstance(rows, io.TextIOWrapper):  # paths keep their bytes, as in a file
                rows.reconfigure(encoding="utf-8", errors="surrogateescape")
        module = TransferClassifier.load_from_checkpoint(Path(given.ckpt_path).expanduser()).eval()
        answers = Answers(module, given.unknown, given.coverage, given.min_probability)
        device = device_of(given.accelerator)
        paths, total = _inputs(given.paths)
        maps = _empty_folder(given.explain) if given.explain else None
        workers = min(8, os.cpu_count() or 1) if given.num_workers is None else given.num_workers
        precision = as_trained(given.feature_precision, module.arithmetic, device)
        arithmetic = chosen(precision, module.backbone, device, total or 0, cache_folder())
        stream = FileStream(module.backbone, device, arithmetic, workers, given.max_pixels)
        predictor = Predictor(module, stream, given.top_k, maps is not None, answers, given.probabilities)
        file = stack.enter_context(_open(given.output)) if given.output else rows
        columns = module.class_names if given.probabilities else []
        write = _writer(file, given.output, given.format, predictor, given.coverage is not None, columns)
        with images_bar("predicting", total) as advance:
            for number, prediction in enumerate(predictor(paths), 1):
                if maps and prediction.heat is not None:
                    predictor.drawn(prediction).save(maps / _map_name(number, prediction, predictor.method))
                write(prediction)
                counts["errors" if prediction.error else "predicted"] += 1
                advance(1)
        _finish(counts, given.output, f"{maps} ({predictor.method})" if maps else None)
    return counts


def _map_name(number: int, prediction: Prediction, method: str) -> str:
    texts = Path(prediction.path).stem, prediction.best[0][0], method
    stem, label, how = (re.sub(r"[^\w.-]+", "_", text)[:60] for text in texts)
    return f"{number:06}-{stem}-{label}-{how}.png"


def _parser() -> OptionParser:
    parser = parser_of("predict", "PATH…    (files and folders; none: paths from standard input, one per line)")
    parser.add_argument("paths", nargs="*", type=str, help="files and folders")
    add_checkpoint(parser)
    parser.add_argument("--output", type=str | None, help="new .csv or .jsonl file; None: standard output")
    formats = Literal["csv", "jsonl"] | None
    parser.add_argument("--format", type=formats, help="csv or jsonl; None: by the output's suffix, else csv")
    parser.add_argument("--probabilities", type=bool, default=False, help="add the probability of every class")
    add_answers(parser)
    parser.add_argument("--explain", type=str | None, help="new folder for maps of where the head looks, one per file")
    parser.add_argument(
        "--num_workers", type=Count | None, help="number of decoding threads; None: one per CPU core, at most 8"
    )
    parser.add_argument(
        "--feature_precision", type=FeaturePrecision, default="auto", help="bf16, fp32, int8 or auto: as in training"
    )
    parser.add_argument(
        "--max_pixels",
        type=Positive,
        default=MAX_PIXELS,
        help="maximum number of pixels of an image; larger images are errors",
    )
    add_accelerator(parser)
    return parser


def _inputs(given: Sequence[str]) -> tuple[Iterable[str], int | None]:
    """The paths of all files, and their number; None for standard input."""
    if not given:
        if sys.stdin.isatty():
            raise UserError("no PATH; give files or folders, or paths on the standard input")
        lines = (line.rstrip("\n") for line in sys.stdin if line.strip())
        if (first := next(lines, None)) is None:
            raise UserError("no path on the standard input; give one per line, or files and folders as PATH")
        return itertools.chain([first], lines), None
    paths, others = list[str](), Counter[str]()
    if not all(given):
        raise UserError("a path is empty; give files, folders, or . for the current one")
    for path in given:
        folder = in_either_form(Path(path))
        is_folder = os.path.isdir(folder)  # noqa: PTH112  # pathlib's raises without permission
        paths += [str(found) for found in folders.images(folder, others)] if is_folder else [path]
    folders.say_left_out(others)
    if not paths:
        raise UserError(f"{', '.join(given)}: contains no images; give a folder with images")
    return paths, len(paths)


def _empty_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--explain={path}: exists and is not empty; give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--explain={path}: cannot be written ({error.strerror})") from error
    check_writable("--explain", path, folder)
    return folder


@contextlib.contextmanager
def _open(output: str) -> Iterator[TextIO]:
    """Opens the new output file; an existing file is never overwritten."""
    if Path(output).suffix not in FORMATS:
        raise UserError(f"--output={output}: name it {' or '.join(f'*{suffix}' for suffix in FORMATS)}")
    try:
        file = new_path("--output", output).open("x", newline="", encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror})") from error
    try:
        with file:
            yield file
    except OSError as error:
        if error.filename is None:  # a full disk's error names no file
            error.filename = output
        raise


def _writer(
    file: TextIO, output: str | None, form: str | None, predictor: Predictor, sets: bool, columns: Sequence[str]
) -> Callable[[Prediction], None]:
    """Writes rows; ``columns`` are the classes whose probability was asked for."""
    several, top_k = predictor.answers.several is not None, predictor.top_k
    form = form or (Path(output).suffix.removeprefix(".") if output else "csv")

    def write_json(prediction: Prediction) -> None:
        row = prediction.as_row(sets)
        if columns and prediction.best:
            row["probabilities"] = dict(zip(columns, prediction.probabilities, strict=True))
        file.write(json.dumps(row) + "\n")

    if form == "jsonl":
        return write_json
    rows = csv.writer(file)
    if several:
        rows.writerow(["path", "label", "probability", *columns, "error"])

        def write_labels(prediction: Prediction) -> None:
            shares = BETWEEN.join(f"{share:.6f}" for _, share in prediction.above or ())
            every = [f"{value:.6f}" for value in prediction.probabilities] or [""] * len(columns)
            rows.writerow([prediction.path, prediction.label, shares, *every, prediction.error])

        return write_labels
    rest = [f"{name}_{place}" for place in range(2, top_k + 1) for name in ("label", "probability")]
    rows.writerow(["path", "label", "probability", "known", *["set"] * sets, *rest, *columns, "error"])

    def write_csv(prediction: Prediction) -> None:
        best = [cell for name, probability in prediction.best for cell in (name, f"{probability:.6f}")]
        best = best or [""] * 2 * top_k
        known = "" if prediction.known is None else f"{prediction.known:.6f}"
        names = ["|".join(prediction.names)] * sets
        every = [f"{value:.6f}" for value in prediction.probabilities] or [""] * len(columns)
        start = [prediction.path, prediction.label, best[1], known, *names, *best[2:]]
        rows.writerow([*start, *every, prediction.error])

    return write_csv


def _finish(counts: dict[str, int], output: str | None, maps: str | None) -> None:
    if not counts["predicted"]:
        raise UserError(f"none of the {counts['errors']} files could be read; each row says why")
    say(f"predict: {counts['predicted']} files, and {counts['errors']} that could not be read")
    if output:
        say(f"rows:    {output}")
    if maps:
        say(f"maps:    {maps}")
