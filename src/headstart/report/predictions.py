"""Every prediction of a split, as a table."""

from headstart.files import csv_bytes
from headstart.report.evaluation import Predictions
from headstart.report.multilabel import MultilabelEvaluation


def predictions_csv(evaluation: Predictions) -> bytes:
    """A row per image: path, true class or classes, predicted ones, and the probability; of several labels, of each."""
    if isinstance(evaluation, MultilabelEvaluation):
        numbers = [[f"{value:.6f}" for value in row] for row in evaluation.probabilities.tolist()]
        found = (evaluation.row(position) for position in range(len(evaluation.items)))
        labelled = ([row.path, row.true, row.predicted, *own] for row, own in zip(found, numbers, strict=True))
        return csv_bytes([["path", "class", "prediction", *evaluation.class_names], *labelled])
    rows = (evaluation.row(position) for position in range(len(evaluation.items)))
    lines = ([row.path, row.true, row.predicted, f"{row.confidence:.6f}"] for row in rows)
    return csv_bytes([["path", "class", "prediction", "probability"], *lines])
