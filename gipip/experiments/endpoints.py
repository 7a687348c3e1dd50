"""The primary endpoints: what decides each claim, fixed before it was measured.

`STUDY` says what is compared, on which network and how many units. The functions at the
end build each endpoint from the results that a notebook has, by the names of its arms.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from gipip.evaluation.metrics import psnr
from gipip.evaluation.published import published_psnr
from gipip.evaluation.references import mean_image
from gipip.evaluation.statistics import stratified_test
from gipip.experiments.results import Results

NOTHING_RECOVERED = "nothing recovered"
NO_FAIR_OPPONENT = "no fair opponent could be trained here"
NOT_MEASURED = "not measured yet"
PENDING = "pending: fewer units or a smaller network"


class Planned(NamedTuple):
    """What decides a claim, fixed beforehand: the comparison, its metric, the client's
    `model`, and how many `units` (independent batches) each stratum has. Strata have
    equal weight.
    """

    claim: str
    endpoint: str
    metric: str
    model: str
    units: tuple[int, ...]


STUDY = {
    1: Planned(
        "The anomaly score improves inversion",
        "GI-PIP − IG, each tuned, mean over B = 1, 4, 8",
        "psnr",
        "resnet18",
        (64, 32, 16),
    ),
    2: Planned(
        "3.8 % auxiliary data suffice where a GAN needs over 70 %",
        "GI-PIP − GIAS with 70 %, in equal time, is above −0.3 dB, B = 4",
        "psnr",
        "convnet",
        (48,),
    ),
    3: Planned(
        "It generalises better than GAN-based inversion",
        "loss of GIAS − loss of GI-PIP by a prior of the other classes, B = 4",
        "psnr",
        "convnet",
        (48,),
    ),
    4: Planned(
        "It is the stronger threat under defences and local training",
        "GI-PIP − IG, mean over the conditions in which something is recovered, B = 1",
        "ssim",
        "convnet",
        (32,),
    ),
    5: Planned(
        "Photographs of ImageNet are recovered with 16.12 dB",
        "GI-PIP − 16.12 dB is within ±1 dB, and the anomaly score raises SSIM, B = 1",
        "psnr",
        "resnet18",
        (32,),
    ),
    6: Planned(
        "Features, recovered exactly, are a better start (ours)",
        "refined features attack − GI-PIP, mean over B = 4, 8",
        "psnr",
        "resnet18",
        (32, 16),
    ),
}
"""The primary endpoints, by the number of their claim."""


class Part(NamedTuple):
    """One inequality: the mean of the strata's means is greater than `above`.

    `strata`: for each stratum the values of its units.
    """

    strata: Sequence[numpy.ndarray]
    above: float = 0.0


@dataclass(frozen=True)
class Endpoint:
    """The primary endpoint of a claim, as far as it is measured: it holds if all `parts` do.

    `number`: of the claim in STUDY. `model`: the network that was attacked. `obstacle`:
    why the claim cannot be judged, such as NOTHING_RECOVERED.
    """

    number: int
    model: str
    parts: Sequence[Part]
    obstacle: str = ""

    def row(self) -> dict:
        """Of the endpoints' table: interval of the first part, and the two-sided
        p-value, which is negative if it speaks against the claim.
        """
        intervals, ps = zip(*(stratified_test(*part) for part in self.parts), strict=True)
        units = [len(values) for values in self.parts[0].strata]
        planned = STUDY[self.number]
        as_planned = self.model == planned.model and _reached(units, planned.units)
        return {
            "claim": f"{self.number} {planned.claim}",
            "endpoint": planned.endpoint,
            "metric": planned.metric,
            "model": self.model,
            "units": f"{_text(units)} of {_text(planned.units)}",
            **intervals[0]._asdict(),
            "p": _two_sided(ps),
            "obstacle": self.obstacle or ("" if as_planned else PENDING),
        }


def _reached(units: Sequence[int], planned: Sequence[int]) -> bool:
    return len(units) == len(planned) and all(map(int.__ge__, units, planned))


def _text(units: Sequence[int]) -> str:
    return " + ".join(map(str, units))


def _two_sided(one_sided: Sequence[float]) -> float:
    """Of a claim with several parts: for it the largest of their one-sided p-values,
    against it the smallest of the opposite ones times their number (Bonferroni). The
    sign says which.
    """
    supports = max(one_sided)
    contradicts = len(one_sided) * min(1 - p for p in one_sided)
    return min(1.0, 2 * supports) if supports <= contradicts else -min(1.0, 2 * contradicts)


# From results ---------------------------------------------------------------------


def of_units(results: Results, arm: str, metric: str = "psnr") -> numpy.ndarray:
    """The mean of a metric over the images of each unit, in the order of the units' seeds."""
    frame = results.select(arm=arm).frame()
    return frame.groupby("seed")[metric].mean().to_numpy()


def gains(results: Results, arm: str, baseline: str, metric: str = "psnr") -> numpy.ndarray:
    """One arm − another in each unit."""
    return of_units(results, arm, metric) - of_units(results, baseline, metric)


def obstacle(results: Results, arm: str) -> str:
    """NOTHING_RECOVERED unless the arm beats the auxiliary set's mean image by 1 dB on average."""
    truth = results.select(arm=arm).truth
    blank = psnr(mean_image(results[0].run.scenario.dataset).expand_as(truth), truth).mean()
    return "" if of_units(results, arm).mean() > blank + 1 else NOTHING_RECOVERED


def improvement(results: Results, arms: tuple[str, str], number: int = 1) -> Endpoint:
    """Claim 1 or 6, of results on one network: the first arm − the second, each batch
    size a stratum.
    """
    sizes = sorted({result.run.scenario.batch_size for result in results})
    strata = [gains(results.select(batch_size=size), *arms) for size in sizes]
    model = results[0].run.scenario.model
    obstructed = obstacle(results, arms[0])
    return Endpoint(number, model, [Part(strata)], obstructed)


def fair_opponent(trial: Results, rival: str, baseline: str) -> str:
    """NO_FAIR_OPPONENT unless the rival, with the most data, beats the baseline, which
    has none, on tuning images.
    """
    return "" if gains(trial, rival, baseline).mean() > 0 else NO_FAIR_OPPONENT


def not_worse(results: Results, arms: tuple[str, str], unfair: str) -> Endpoint:
    """Claim 2: the first arm − the second is above −0.3 dB. `unfair`: see `fair_opponent`."""
    model = results[0].run.scenario.model
    return Endpoint(2, model, [Part([gains(results, *arms)], above=-0.3)], unfair)


def smaller_loss(
    groups: Iterable[Results], more: tuple[str, str], less: tuple[str, str], unfair: str
) -> Endpoint:
    """Claim 3: of each group of private classes, how much more is lost from the first
    arm of `more` to its second than from the first arm of `less` to its second; all
    groups' units pooled.
    """
    groups = list(groups)
    losses = [gains(part, *more) - gains(part, *less) for part in groups]
    model = groups[0][0].run.scenario.model
    return Endpoint(3, model, [Part([numpy.concatenate(losses)])], unfair)


def stronger_threat(conditions: Sequence[Results], arms: tuple[str, str]) -> Endpoint:
    """Claim 4: a unit's mean gain in SSIM over the conditions in which something is recovered."""
    kept = [part for part in conditions if not obstacle(part, arms[0])]
    each = [gains(part, *arms, metric="ssim") for part in kept or conditions]
    model = conditions[0][0].run.scenario.model
    return Endpoint(4, model, [Part([numpy.mean(each, axis=0)])], "" if kept else NOTHING_RECOVERED)


def headline(results: Results, arms: tuple[str, str]) -> Endpoint:
    """Claim 5: the first arm's PSNR is equivalent to the paper's within ±1 dB (two
    one-sided tests), and its SSIM is higher than the second's.
    """
    away = of_units(results, arms[0]) - published_psnr()
    parts = [Part([away], -1), Part([-away], -1), Part([gains(results, *arms, metric="ssim")])]
    model = results[0].run.scenario.model
    return Endpoint(5, model, parts, obstacle(results, arms[0]))
