"""How sure is sure enough: accuracy against the share of images answered."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from torch import Tensor

from headstart.report.evaluation import Evaluation

WANTED = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Answered:
    """What is answered and how well, at each of K thresholds of the probability, from the highest to the lowest."""

    probability: Tensor  # the least that is answered, [K]
    share: Tensor  # of the images that are answered, [K]
    accuracy: Tensor  # on those, [K]

    def at(self, accuracy: float) -> tuple[float, float, float] | None:
        """Threshold, share and accuracy where most images are answered at this accuracy or better; None: nowhere.

        The threshold is 0 where every image may be answered.
        """
        enough = (self.accuracy >= accuracy).nonzero()[:, 0]
        if not len(enough):
            return None
        probability, share, found = (
            float(values[enough[-1]]) for values in (self.probability, self.share, self.accuracy)
        )
        return (0.0 if share == 1 else probability), share, found


def answered(evaluation: Evaluation) -> Answered:
    """The risk-coverage curve of Geifman and El-Yaniv, "Selective Classification for Deep Neural Networks", 2017."""
    confidence, order = evaluation.confidence.sort(descending=True, stable=True)
    right = evaluation.right[order].double().cumsum(dim=0)
    last = confidence != confidence.roll(-1)  # of those with the same probability, which are answered together
    last[-1] = True
    count = last.nonzero()[:, 0] + 1
    return Answered(confidence[last], count / len(order), right[last] / count)


def answered_table(evaluation: Evaluation, wanted: Sequence[float] = WANTED) -> Table:
    """The least probability for some accuracies, to print."""
    curve = answered(evaluation)
    table = Table(
        "accuracy",
        "--min_probability",
        "answered",
        title=f"how sure is sure enough, on these {len(evaluation.items)} images",
    )
    for accuracy in wanted:
        found = curve.at(accuracy)
        table.add_row(f"{accuracy:.0%}", *([f"{found[0]:.3f}", f"{found[1]:.1%}"] if found else ["-", "none"]))
    return table
