"""Confidence intervals: of means, by Student's t, and of shares, by Wilson."""

import math
from collections.abc import Sequence
from statistics import NormalDist

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


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share of which ``right`` of ``count`` were seen.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    if not count:
        return 0.0, 1.0
    z, share = NormalDist().inv_cdf(0.975), right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)
