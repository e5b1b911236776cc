"""The receiver operating characteristic of each domain."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torchmetrics.functional.classification import multiclass_roc

from headstart.domains.leave_out import LeftOut
from headstart.report.evaluation import Evaluation
from headstart.terminal import one_line

COLUMNS, SIDE, DPI = 3, 3.6, 100
RATES = np.linspace(0, 1, 201)


def roc_by_domain(found: Sequence[LeftOut]) -> bytes:
    """A panel per domain, as PNG: the mean one-vs-rest curve where it was left out, and of the others' test images."""
    rows = -(-len(found) // COLUMNS)
    figure = Figure(figsize=(SIDE * min(COLUMNS, len(found)), SIDE * rows), dpi=DPI, layout="tight")
    FigureCanvasAgg(figure)
    for number, each in enumerate(found):
        axes = figure.add_subplot(rows, min(COLUMNS, len(found)), number + 1)
        for name, part, colour in (("the others", each.seen, "#999999"), ("new", each.unseen, "#D55E00")):
            axes.plot(RATES, mean_curve(part), color=colour, label=f"{name} {part.auroc:.3f}")
        axes.set_title(one_line(each.domain).replace("$", r"\$"), fontsize=10)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="false positive rate", ylabel="true positive rate")
        axes.legend(title="area under the curve", loc="lower right", fontsize=8, title_fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def mean_curve(evaluation: Evaluation) -> NDArray[np.float64]:
    """The true positive rate at each of ``RATES``, the mean over the classes present; NaN if there is only one."""
    classes = len(evaluation.class_names)
    false, true, _ = multiclass_roc(evaluation.probabilities, evaluation.labels, num_classes=classes)
    present = set(evaluation.labels.tolist())
    if len(present) < 2:
        return np.full_like(RATES, np.nan)
    curves = [np.interp(RATES, false[label].numpy(), true[label].numpy()) for label in present]
    mean: NDArray[np.float64] = np.stack(curves).mean(axis=0)
    return mean
