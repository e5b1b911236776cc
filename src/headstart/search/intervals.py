"""Confidence intervals of means: Student's t-interval, for scores and paired differences."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mean_and_half_width(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """The mean of independent values or paired differences [E], and the half-width of its 95 % confidence interval."""
    from scipy.special import stdtrit  # here, since scipy is slow to import

    values = values.cpu() if isinstance(values, Tensor) else values  # Apple's GPUs have no float64
    found = torch.as_tensor(values, dtype=torch.float64)
    count, mean = len(found), float(found.mean())
    if count < 2:
        return mean, math.inf
    return mean, float(stdtrit(count - 1, 0.975)) * float(found.std()) / math.sqrt(count)
