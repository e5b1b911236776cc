"""Temperature scaling: calibrates confidence with one number, fitted on the validation split."""

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

# Range of 1 / temperature, searched on a logarithmic scale.
COLDEST, HOTTEST = 1e-2, 1e2
HALVINGS = 40
MOST = 20_000  # images that are used, evenly spread: enough for one number


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T, in [0.01, 100], at which softmax(logits / T) has the lowest cross entropy; logits [N, C].

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. The cross entropy is convex in b = 1 / T, so its
    slope, the mean of <p, z> - <target, z> over the images, has one root, which is found by bisection. The targets are
    smoothed by 1 / (N + 2), after Platt, "Probabilistic Outputs for Support Vector Machines", 1999, so that a head
    that is right on all of a few images does not become certain.
    """
    every = -(-len(logits) // MOST) or 1
    logits, labels = logits[::every].cpu().double(), labels[::every].cpu()  # Apple's GPUs have no float64
    smoothing = 1 / (len(labels) + 2)
    truth = (1 - smoothing) * logits.gather(1, labels[:, None]).mean() + smoothing * logits.mean()
    low, high = COLDEST, HOTTEST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        slope = ((logits * middle).softmax(dim=1) * logits).sum(dim=1).mean() - truth
        low, high = (low, middle) if slope > 0 else (middle, high)
    return float((low * high) ** -0.5)


class Logits(Metric):
    """The logits and labels of all batches and ranks."""

    higher_is_better = None
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor]
        self.labels: list[Tensor]
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits [B, C], labels [B]."""
        self.logits.append(logits.detach())
        self.labels.append(labels)

    def compute(self) -> tuple[Tensor, Tensor]:
        """All logits [N, C] and labels [N]."""
        return dim_zero_cat(self.logits), dim_zero_cat(self.labels)
