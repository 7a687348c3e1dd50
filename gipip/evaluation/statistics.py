"""How sure a comparison of attacks is: paired, batch-grouped bootstrap intervals, and
the tests of the primary endpoints.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

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


def stratified_test(strata: Sequence[ArrayLike], above: float = 0.0) -> tuple[Interval, float]:
    """The mean of the strata's means with its 95 % t interval, and the one-sided
    p-value that it is greater than `above`.

    `strata`: for each the values of its independent observations, which may spread
    differently; strata have equal weight. A regression on the strata with
    heteroscedasticity-consistent errors (HC2: each stratum's own variance over its
    count). Without a second observation in every stratum the interval's ends and the
    p-value are nan. Raises DataError for no strata, and for values that are missing or
    not finite.
    """
    from statsmodels.api import OLS  # slow to import

    samples = [np.asarray(values, dtype=float) for values in strata]
    if not samples or not all(len(sample) and np.isfinite(sample).all() for sample in samples):
        raise DataError(f"Expected finite values in each of {len(samples)} strata; some lack them.")
    count = sum(map(len, samples))
    mean = float(np.mean([sample.mean() for sample in samples]))
    if min(map(len, samples)) < 2:
        return Interval(mean, np.nan, np.nan, count), np.nan
    members = np.repeat(np.eye(len(samples)), list(map(len, samples)), axis=0)
    fit = OLS(np.concatenate(samples), members).fit(cov_type="HC2", use_t=True)
    test = fit.t_test((np.full((1, len(samples)), 1 / len(samples)), above))
    (low, high), p = test.conf_int()[0], float(test.pvalue)
    return Interval(mean, low, high, count), p / 2 if mean > above else 1 - p / 2


def holm(p_values: ArrayLike) -> list[float]:
    """p-values corrected for their number (Holm 1979): below 0.05, the chance of a
    single false decision among all of them is at most 5 %. nan counts as 1.
    """
    from statsmodels.stats.multitest import multipletests  # slow to import

    return multipletests(np.nan_to_num(np.asarray(p_values, float), nan=1.0), method="holm")[
        1
    ].tolist()
