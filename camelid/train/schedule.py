"""The learning rate as a function of the step, known before the run."""

from __future__ import annotations

import math

from camelid.recipe import TrainSection

BARS = "▁▂▃▄▅▆▇█"


def warmup(steps: int, settings: TrainSection) -> int:
    """Steps of linear warm-up: what the recipe says, at most a tenth of the run."""
    return min(settings.warmup_steps, max(1, steps // 10))


def learning_rate(step: int, steps: int, settings: TrainSection) -> float:
    """The rate of update `step` (0-based) of `steps`: linear warm-up, then down to the floor share of the peak.

    cosine: half a wave over the rest (LLaMA). linear: a straight line. wsd: the peak is held, and only the last
    `decay_share` of the run falls, in a straight line (warmup-stable-decay, arXiv:2404.06395).
    """
    peak, floor, rising = settings.learning_rate, settings.min_learning_rate_share, warmup(steps, settings)
    if step < rising:
        return peak * (step + 1) / rising
    falling_from = rising
    if settings.schedule == "wsd":
        falling_from = max(rising, steps - math.ceil(settings.decay_share * steps))
    done = min(max(0.0, (step - falling_from) / max(1, steps - falling_from)), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if settings.schedule == "cosine" else 1 - done
    return peak * (floor + (1 - floor) * left)


def drawn(steps: int, settings: TrainSection, width: int = 40) -> str:
    """The schedule as one line of bars, with its numbers."""
    points = [learning_rate(int(i * max(steps - 1, 0) / max(width - 1, 1)), steps, settings) for i in range(width)]
    bars = "".join(BARS[min(7, int(8 * p / settings.learning_rate))] for p in points)
    rising = warmup(steps, settings)
    said = f", not the recipe's {settings.warmup_steps:,}" if rising < settings.warmup_steps else ""
    low = settings.learning_rate * settings.min_learning_rate_share
    return (
        f"{bars} {settings.schedule}, {settings.learning_rate:g} to {low:g}, {steps:,} steps, "
        f"{rising:,} of warm-up{said}"
    )
