"""How certain a mean is: Student's t-interval, for scores and for paired differences."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mean_and_half_width(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """The mean of independent values, [E], and half the width of its 95 % interval; of paired differences if given."""
    from scipy.special import stdtrit  # where it is used, since scipy takes a while to import

    values = values.cpu() if isinstance(values, Tensor) else values  # Apple's GPUs have no float64
    found = torch.as_tensor(values, dtype=torch.float64)
    count, mean = len(found), float(found.mean())
    if count < 2:
        return mean, math.inf
    return mean, float(stdtrit(count - 1, 0.975)) * float(found.std()) / math.sqrt(count)
