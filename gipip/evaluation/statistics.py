"""How sure a comparison of attacks is: paired, batch-grouped bootstrap intervals and
verdicts.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from gipip.errors import DataError


class Interval(NamedTuple):
    """A mean, the ends of its bootstrap interval (nan for a single observation) and the
    number of independent observations.
    """

    mean: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # hides tuple.count

    def __format__(self, spec: str) -> str:
        """The three numbers in one format: `f"{interval:.3f}"` gives "0.420 [0.100,
        0.750]", or "0.420 (no interval)".
        """
        mean, low, high = (format(value, spec or "+.2f").replace("-", "−") for value in self[:3])
        return f"{mean} (no interval)" if math.isnan(self.low) else f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")


def bootstrap_interval(values: ArrayLike, *, groups: ArrayLike | None = None) -> Interval:
    """Mean of `values` with its 95 % percentile bootstrap interval, the same for the
    same values.

    `groups` says which batch each value belongs to: images of a batch are reconstructed
    together, so whole batches are resampled, and `count` is the number of batches. The
    percentiles are moved outward for small samples (the expanded percentile interval of
    Hesterberg 2015, "What teachers should know about the bootstrap"). One observation
    or batch has no interval: both ends are nan. Raises DataError for values that are
    empty or not finite, or groups of another length.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise DataError(
            "An interval needs a one-dimensional, non-empty set of finite values. Look for missing "
            "or NaN metrics."
        )
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    if groups.shape != values.shape:
        found = f"{len(values)} values but groups of shape {groups.shape}"
        raise DataError(f"{found}: expected one group a value.")
    totals = pd.Series(values).groupby(groups, dropna=False).agg(["sum", "count"]).to_numpy(float)
    low, high = _resampled_ends(totals) if len(totals) > 1 else (np.nan, np.nan)
    return Interval(float(values.mean()), float(low), float(high), len(totals))


def _resampled_ends(totals: np.ndarray) -> tuple[float, float]:
    """Ends of the bootstrap interval of Σ sums / Σ counts; `totals` has a row (sum,
    count) per group.
    """
    import scipy.stats  # slow to import

    count = len(totals)
    quantile = scipy.stats.t.ppf(0.975, count - 1) * np.sqrt(count / (count - 1))
    result = scipy.stats.bootstrap(
        totals.T,
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        method="percentile",
        confidence_level=2 * scipy.stats.norm.cdf(quantile) - 1,
        batch=1_000,
        rng=np.random.default_rng(0),
    )
    return result.confidence_interval


def paired_difference(a: ArrayLike, b: ArrayLike, *, groups: ArrayLike | None = None) -> Interval:
    """Mean of a − b with its bootstrap interval, as `bootstrap_interval`; a[i] and b[i]
    are two arms' values for the same private image.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        found = f"The arms have {a.shape} and {b.shape} values"
        raise DataError(f"{found}: a paired difference needs the same images in the same order.")
    return bootstrap_interval(a - b, groups=groups)


def verdict(
    difference: Interval,
) -> Literal["supported", "not supported", "undecided at this scale"]:
    """What an interval says about the claim that the difference is greater than 0.

    Undecided when both signs are possible, or with fewer than six independent
    observations: five all of one sign happen by chance with probability 2/2⁵ > 0.05
    (two-sided sign test).
    """
    if difference.count < 6 or difference.low <= 0 < difference.high:
        return "undecided at this scale"
    return "supported" if difference.low > 0 else "not supported"
