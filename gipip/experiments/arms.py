"""What notebooks compare: arms, their runs, and the claims of the paper that they judge.

An *arm* is a named attack; a comparison gives the same private batches to all of its arms. A
*condition* is what weights are tuned for (`Scenario.condition`).

    scenarios = first_batches(6, model="convnet16", batch_size=4)
    results = gipip.sweep(equal_tv(scenarios, prior, iterations=100), store="results")
    claims = judge(results, 1, "with − without, equal λTV", "with", "without")
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from gipip.attacks.base import Attack
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.evaluation.statistics import paired_difference
from gipip.experiments.claims import Claim, compare
from gipip.experiments.results import Results
from gipip.experiments.scenario import Run, Scenario
from gipip.federation.defenses import DPSGD, Defense, GaussianNoise, Soteria, Sparsification
from gipip.priors.autoencoder import AnomalyScore

CLAIMS = (
    "1 The anomaly score improves inversion",
    "2 With 3.8 % auxiliary data better than GAN-based inversion with up to 100 %",
    "3 It generalises better than GAN-based inversion",
    "4 It is the stronger threat under defences and local training",
    "5 Photographs of ImageNet are recovered with 16.12 dB",
)
"""What the paper claims, as the notebooks judge it."""

EQUAL = "GIPIP at equal TV weight"
"""The arm of data/tuned.json that adds the anomaly score (c = 0) to tuned Inverting
Gradients and changes nothing else.
"""


def first_batches(count: int, **about) -> list[Scenario]:
    """Scenarios on the first `count` batches; `about`: the other fields of `Scenario`."""
    return [Scenario(seed=seed, **about) for seed in range(count)]


def runs(scenarios: Iterable[Scenario], arms: Mapping[str, Attack]) -> list[Run]:
    """Every arm on every scenario."""
    return [Run(arm, scenario, attack) for scenario in scenarios for arm, attack in arms.items()]


def with_and_without(condition: str, prior: AnomalyScore, **changes) -> dict[str, Attack]:
    """{"without": tuned Inverting Gradients, "with": the same λ_TV and the anomaly
    score with its tuned weight, c = 0} for a condition.

    `changes`: settings of both attacks. Raises DataError when no weights are shipped.
    """
    baseline = InvertingGradients.tuned(condition, **changes)
    ours = GIPIP.tuned(condition, arm=EQUAL, prior=prior.with_offset(0), **changes)
    return {"without": baseline, "with": ours}


def equal_tv(scenarios: Iterable[Scenario], prior: AnomalyScore, **changes) -> list[Run]:
    """`with_and_without` on every scenario, with the weights tuned for its condition."""
    todo = []
    for scenario in scenarios:
        todo += runs([scenario], with_and_without(scenario.condition, prior, **changes))
    return todo


def defended(kind: str, strength: float) -> Defense:
    """A defence by the name that tables give it: "noise" of standard deviation, "sparsity"
    or "Soteria" of share, or "DP-SGD" (C = 1) of noise multiplier `strength`.
    """
    kinds: dict[str, Callable[..., Defense]] = {
        "noise": partial(GaussianNoise, std=strength),
        "sparsity": partial(Sparsification, sparsity=strength),
        "Soteria": partial(Soteria, pruned=strength),
        "DP-SGD": partial(DPSGD, max_norm=1.0, noise_multiplier=strength),
    }
    return kinds[kind]()


def judge(results: Results, claim: int, compared: str, arm: str, baseline: str) -> list[Claim]:
    """The paper's `claim` (of CLAIMS, from 1) judged in PSNR and SSIM: one arm − another
    in each condition of the results. Each is named by `compared` and the condition, as
    "GIPIP − IG, convnet, B = 4".
    """
    claims = []
    for condition in dict.fromkeys(result.run.scenario.condition for result in results):
        text = ", ".join([compared, *condition.replace("=", " = ").split("/")[1:]])
        ours, theirs = ({"condition": condition, "arm": name} for name in (arm, baseline))
        claims += compare(results, CLAIMS[claim - 1], text, ours, theirs)
    return claims


def judge_losses(
    results: Results, claim: int, compared: str, more: tuple[str, str], less: tuple[str, str]
) -> list[Claim]:
    """As `judge`, whether from the first arm of `more` to its second more is lost than
    from the first arm of `less` to its second, on the same images.
    """
    claims = []
    for metric in ("psnr", "ssim"):
        wide = results.frame().pivot_table(metric, ["batch", "image"], "arm")
        losses = (wide[before] - wide[after] for before, after in (more, less))
        effect = paired_difference(*losses, groups=wide.index.get_level_values("batch"))
        claims.append(Claim(CLAIMS[claim - 1], compared, metric, len(wide), effect))
    return claims
