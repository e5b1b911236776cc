"""Every prediction of a split, as a table."""

from headstart.files import csv_bytes
from headstart.report.evaluation import Evaluation, Predictions
from headstart.report.multilabel import MultilabelEvaluation


def predictions_csv(evaluation: Predictions) -> bytes:
    """A row per image: path, true class or classes, predicted ones, and the probability; of several labels, of each."""
    if isinstance(evaluation, MultilabelEvaluation):
        names, numbers = evaluation.class_names, evaluation.probabilities.tolist()
    else:
        assert isinstance(evaluation, Evaluation)
        names, numbers = ["probability"], [[value] for value in evaluation.confidence.tolist()]
    rows = (evaluation.row(position) for position in range(len(evaluation.items)))
    lines = (
        [row.path, row.true, row.predicted, *(f"{value:.6f}" for value in own)]
        for row, own in zip(rows, numbers, strict=True)
    )
    return csv_bytes([["path", "class", "prediction", *names], *lines])
