"""The learning rate over the steps of a fit."""

import math


def warmup_cosine(step: int, warmup_steps: int, steps: float) -> float:
    """The learning rate as a share of its peak: a linear rise, then half a cosine to 0.

    Where ``steps`` is infinite it stays at its peak.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
