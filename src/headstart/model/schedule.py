"""The learning rate schedule."""

import math


def warmup_cosine(step: int, warmup_steps: int, steps: float) -> float:
    """The learning rate as a fraction of its peak: linear warmup, then cosine decay to 0.

    If ``steps`` is infinite, it stays at its peak.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))
