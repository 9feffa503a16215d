"""95 % intervals by resampling rows.

Every figure here is a function of sums over rows, so a resample is a vector of how often each row was drawn, and all
resamples together are one matrix product.

Shapes: N rows, K statistics a row, R resamples.

Source: Efron and Tibshirani, "An introduction to the bootstrap" (1993), percentile interval; Koehn, "Statistical
significance tests for machine translation evaluation" (2004), the paired form.
"""

from collections.abc import Callable

import numpy as np

RESAMPLES = 1000
SEED = 42
_BLOCK = 4_000_000  # draws held in memory at a time

Figure = Callable[[np.ndarray], np.ndarray]
"""(R, K) sums over the drawn rows → (R,) values; NaN where a resample has none."""


def resampled_sums(statistics: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Sums over rows drawn with replacement. The same seed and N draw the same rows, which is what makes two models'
    resamples a pair.

    Args:
        statistics: (N, K)

    Returns:
        (R, K)
    """
    rows = len(statistics)
    generator = np.random.default_rng(seed)
    step = max(_BLOCK // max(rows, 1), 1)
    blocks = []
    for start in range(0, resamples, step):
        drawn = (generator.integers(rows, size=rows) for _ in range(min(step, resamples - start)))
        times = np.array([np.bincount(draw, minlength=rows) for draw in drawn], dtype=np.float64)
        blocks.append(times @ statistics)
    return np.concatenate(blocks)


def percentile_interval(values: np.ndarray) -> list[float]:
    """[low, high], between which 95 % of the (R,) values lie, rounded to 4 places; NaNs don't count."""
    values = values[~np.isnan(values)]
    if not len(values):
        return [float("nan")] * 2
    low, high = np.percentile(values, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def ratio(sums: np.ndarray) -> np.ndarray:
    """The Figure of a mean, column 0 a sum and column 1 a count: (R, 2) → (R,), NaN where nothing was counted."""
    return np.divide(sums[:, 0], sums[:, 1], out=np.full(len(sums), np.nan), where=sums[:, 1] != 0)
