"""How sure a mean is: Student's t-interval, for scores and for paired differences."""

import math
from statistics import NormalDist

from torch import Tensor


def quantile(freedom: int, share: float = 0.975) -> float:
    """Of Student's t, within 0.01 from 4 degrees of freedom on (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms)))


def mean_and_half_width(values: Tensor) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval; of paired differences if those are given.

    Args:
        values: independent ones, such as the accuracy of each episode, [E].
    """
    count = len(values)
    if count < 2:
        return float(values.double().mean()), math.inf
    spread = float(values.double().std()) / math.sqrt(count)
    return float(values.double().mean()), quantile(count - 1) * spread
