"""What notebooks compare: arms, their runs, and the claims of the paper that they speak of.

An *arm* is a named attack; a comparison gives the same units to all of its arms. A
*unit* is one private batch: number i is attacked on client weights of seed i mod 3,
with the prior that was trained with seed i mod 3, from the random start i, so that
intervals hold the variance of all. A *condition* is what weights are tuned for
(`Scenario.condition`).

    priors = three_priors("cifar10")
    scenarios = units(6, model="convnet16", batch_size=4)
    results = gipip.sweep(equal_tv(scenarios, priors, iterations=100), store="results")
    comparisons = compare_arms(results, 1, "with − without, equal λTV", "with", "without")
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pandas
import torch
from torch.nn.functional import interpolate

from gipip.attacks.base import Attack
from gipip.attacks.feature_inversion import FeatureInversion
from gipip.attacks.features import recover_features
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.data.datasets import LabeledImages, load_dataset
from gipip.evaluation.published import published_psnr
from gipip.evaluation.statistics import bootstrap_interval, paired_difference
from gipip.experiments.claims import Comparison
from gipip.experiments.results import Results
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.shares import gradient_shares
from gipip.federation.defenses import DPSGD, Defense, GaussianNoise, Soteria, Sparsification
from gipip.federation.models import last_linear
from gipip.priors.autoencoder import AnomalyScore, load_prior
from gipip.priors.decoder import train_decoder
from gipip.priors.gan import load_generator

SEEDS = 3
"""Of clients and priors, over which units vary."""

EQUAL = "GIPIP at equal TV weight"
"""The arm of data/tuned.json that adds the anomaly score (c = 0) to tuned Inverting
Gradients and changes nothing else.
"""

GROUPS = {"animals": (2, 3, 4, 5, 6, 7), "vehicles": (0, 1, 8, 9)}
"""CIFAR-10's classes in two kinds."""

METRICS = ("psnr", "ssim")
"""By which arms are compared."""

Arm = Attack | Sequence[Attack]
"""One attack, or one for each seed of the prior: unit i gets number i mod their count."""


def units(count: int, **about) -> list[Scenario]:
    """Scenarios on the first `count` batches; `about`: the other fields of `Scenario`.
    Untrained clients have weights of three seeds in turn, unless `about` names a
    `model_seed`.
    """
    clients = 1 if about.get("epochs") else SEEDS
    return [
        Scenario(**{"seed": unit, "model_seed": unit % clients} | about) for unit in range(count)
    ]


def three_priors(name: str) -> list[AnomalyScore]:
    """The shipped anomaly scores of a name, trained with three seeds, c = 0."""
    names = [name, *(f"{name}-seed{seed}" for seed in range(1, SEEDS))]
    return [load_prior(each).with_offset(0) for each in names]


def runs(scenarios: Iterable[Scenario], arms: Mapping[str, Arm], reseed: bool = True) -> list[Run]:
    """Every arm on every scenario, from the random start of the scenario's own number,
    or (without `reseed`) of the attack's.
    """
    todo = []
    for scenario in scenarios:
        for name, arm in arms.items():
            attacks = [arm] if isinstance(arm, Attack) else arm
            attack = attacks[scenario.seed % len(attacks)]
            if reseed:
                attack = attack.model_copy(update={"seed": scenario.seed})
            todo.append(Run(name, scenario, attack))
    return todo


def with_and_without(condition: str, priors: Sequence[AnomalyScore], **changes) -> dict[str, Arm]:
    """{"without": tuned Inverting Gradients, "with": the same λ_TV and the anomaly
    score with its tuned weight, c = 0} for a condition.

    `changes`: settings of both attacks. Raises DataError when no weights are shipped.
    """
    ours = [
        GIPIP.tuned(condition, arm=EQUAL, prior=prior.with_offset(0), **changes) for prior in priors
    ]
    return {"without": InvertingGradients.tuned(condition, **changes), "with": ours}


def equal_tv(scenarios: Iterable[Scenario], priors: Sequence[AnomalyScore], **changes) -> list[Run]:
    """`with_and_without` on every scenario, with the weights tuned for its condition."""
    todo = []
    for scenario in scenarios:
        todo += runs([scenario], with_and_without(scenario.condition, priors, **changes))
    return todo


def decoded(
    scenarios: Sequence[Scenario], auxiliary: LabeledImages | None = None, **training
) -> list[FeatureInversion]:
    """The features attack without iterations on scenarios of one condition. Each client
    model gets its own decoder, for the `auxiliary` images (none given: see
    `auxiliary_images`).

    `training`: settings of `train_decoder`. Under a defence, only entries that are not
    zero would be matched.
    """
    attacks = []
    for scenario in scenarios[:SEEDS]:
        own = auxiliary_images(scenario.dataset) if auxiliary is None else auxiliary
        client, masked = scenario.client_model(), bool(scenario.defenses)
        decoder = train_decoder(client, own, mode=scenario.mode, **training)
        attacks.append(FeatureInversion(prior=decoder, iterations=0, masked=masked))
    return attacks


def from_features(
    start: Sequence[FeatureInversion], scores: Sequence[AnomalyScore], iterations: int
) -> dict[str, Arm]:
    """The features attack from what `decoded` gives, the `start`: that alone,
    "refined", and "refined, with AS", the anomaly score of the same seed.
    """
    refined = [attack.model_copy(update={"iterations": iterations}) for attack in start]
    pairs = zip(refined, scores, strict=False)
    scored = [attack.model_copy(update={"score": score}) for attack, score in pairs]
    return {"decoded": start, "refined": refined, "refined, with AS": scored}


def started(
    attacks: Mapping[str, Arm], start: Sequence[FeatureInversion]
) -> dict[str, list[FeatureInversion]]:
    """Inverting Gradients and GI-PIP, with all their settings, from what `decoded`
    gives (the `start`) instead of from noise. Each is named "…, decoded start".
    """
    return {
        f"{name}, decoded start": _started(arm if isinstance(arm, Sequence) else [arm], start)
        for name, arm in attacks.items()
    }


def _started(
    attacks: Sequence[Attack], start: Sequence[FeatureInversion]
) -> list[FeatureInversion]:
    made = []
    for number, decoded in enumerate(start):
        attack = attacks[number % len(attacks)]
        about = attack.model_dump(include={*InvertingGradients.model_fields})
        about |= {"feature_weight": 0.0, "pull_weight": 0.0}
        if isinstance(attack, GIPIP):
            about |= {"score": attack.prior, "as_weight": attack.as_weight}
        made.append(decoded.model_copy(update=about))
    return made


def decoding(
    sizes: Iterable[tuple[int, int]], store: Path | str | None = None, **about
) -> list[Run]:
    """Batches of one client only decoded, by a regression, for each batch size and its
    number of batches. `about`: the scenarios' other fields.
    """
    todo = []
    for size, count in sizes:
        scenarios = units(count, model_seed=0, batch_size=size, **about)
        todo += runs(scenarios, {"decoded": decoded(scenarios, steps=0, store=store)})
    return todo


def decoding_from(
    auxiliary: Mapping[str, LabeledImages], count: int, store: Path | str | None = None, **about
) -> list[Run]:
    """As `decoding`, `count` batches of four animals and as many of four vehicles, with
    decoders for each of several sets of `auxiliary` images, which name the arms.
    """
    todo = []
    for classes in GROUPS.values():
        scenarios = units(count, model_seed=0, batch_size=4, classes=classes, **about)
        for name, images in auxiliary.items():
            todo += runs(scenarios, {name: decoded(scenarios, images, steps=0, store=store)})
    return todo


def recovery(scenarios: Iterable[Scenario]) -> pandas.DataFrame:
    """How exactly features are recovered: a row for each scenario, whose last column,
    the largest relative error of an image's, needs the private images.
    """
    rows = []
    for scenario in scenarios:
        model = scenario.client_model()
        found = recover_features(model, scenario.update(model))
        inputs = model.normalize(scenario.batch().images)
        true = last_linear(model.network, inputs)[1].detach().double()
        error = ((found.features - true).norm(dim=1) / true.norm(dim=1)).max().item()
        seen = {"status": found.status, "residual": f"{found.residual:.0e}"}
        size = {"batch size": scenario.batch_size}
        rows.append(size | seen | {"largest relative error": f"{error:.0e}"})
    return pandas.DataFrame(rows)


def auxiliary_images(dataset: str) -> LabeledImages:
    """Those of a data set; for one that has none, as "imagenet64", those of CIFAR-10, enlarged."""
    data = load_dataset(dataset)
    if len(data.auxiliary_pool):
        return data.auxiliary()
    return resized(load_dataset("cifar10").auxiliary(), data.image_size)


def sources(shares: Iterable[float], count: int) -> dict[str, LabeledImages]:
    """Auxiliary images by name: several shares of CIFAR-10's training images, as many
    as `count` of its animals or vehicles, and of what a generator of photographs makes,
    shrunk.
    """
    data = load_dataset("cifar10")
    found = {f"{100 * share:g} %": data.auxiliary(share) for share in shares}
    pool = data.auxiliary()
    for name, classes in GROUPS.items():
        found[f"{name} only"] = pool[torch.isin(pool.labels, torch.tensor(classes))][:count]
    made = load_generator("imagenet64").sample(count)
    labels = torch.zeros(count, dtype=torch.int64)
    return found | {"generated photos": resized(LabeledImages(made, labels), data.image_size)}


def resized(images: LabeledImages, size: int) -> LabeledImages:
    """At size × size pixels."""
    pixels = interpolate(images.images, size=size, mode="bilinear", antialias=True)
    return LabeledImages(pixels.clamp(0, 1), images.labels, images.indices)


def defended(kind: str, strength: float) -> Defense:
    """A defence by the name that tables give it: "noise" of standard deviation,
    "sparsity" or "Soteria" of share, or "DP-SGD" (C = 1) of noise multiplier
    `strength`.
    """
    kinds: dict[str, Callable[..., Defense]] = {
        "noise": partial(GaussianNoise, std=strength),
        "sparsity": partial(Sparsification, sparsity=strength),
        "Soteria": partial(Soteria, pruned=strength),
        "DP-SGD": partial(DPSGD, max_norm=1.0, noise_multiplier=strength),
    }
    return kinds[kind]()


def compare_arms(
    results: Results, about: int, compared: str, arm: str, baseline: str
) -> list[Comparison]:
    """One arm − another in each condition of the results, in PSNR and SSIM. Each
    comparison is named by `compared` and the condition, as "GIPIP − IG, convnet, B =
    4".

    `about`: the number of the claim that they belong to.
    """
    found = []
    for condition in dict.fromkeys(result.run.scenario.condition for result in results):
        text = ", ".join([compared, *condition.replace("=", " = ").split("/")[1:]])
        images = len(results.select(arm=arm, condition=condition).images)
        for metric in METRICS:
            effect = results.effect(arm, baseline, metric, condition=condition)
            found.append(Comparison(about, text, metric, images, effect))
    return found


def compare_losses(
    results: Results, about: int, compared: str, more: tuple[str, str], less: tuple[str, str]
) -> list[Comparison]:
    """As `compare_arms`, how much more is lost from the first arm of `more` to its
    second than from the first arm of `less` to its second, on the same images.
    """
    found = []
    for metric in METRICS:
        wide = results.frame().pivot_table(metric, ["batch", "image"], "arm")
        losses = (wide[before] - wide[after] for before, after in (more, less))
        effect = paired_difference(*losses, groups=wide.index.get_level_values("batch"))
        found.append(Comparison(about, compared, metric, len(wide), effect))
    return found


def released_shares(
    prior: AnomalyScore, iterations: int, sizes: Sequence[int] = (1, 4, 8), **about
) -> pandas.DataFrame:
    """How hard each term of released GI-PIP pulls, compared with gradient matching,
    over an attack on the first unit of each batch size: see `gradient_shares`. `about`:
    the scenario's fields.
    """
    tables = []
    for size in sizes:
        [scenario] = units(1, batch_size=size, **about)
        model = scenario.client_model()
        attack = GIPIP.as_released("cifar10", size, iterations=iterations, prior=prior)
        table = gradient_shares(
            attack, model, scenario.update(model), every=max(1, iterations // 50)
        )
        tables.append(table.assign(batch=f"B = {size}"))
    return pandas.concat(tables, ignore_index=True)


def compare_with_paper(results: Results, compared: str, arm: str) -> Comparison:
    """PSNR of an arm − the 16.12 dB that the paper reports (claim 5)."""
    frame = results.select(arm=arm).frame()
    above = bootstrap_interval(frame["psnr"] - published_psnr(), groups=frame["batch"])
    return Comparison(5, compared, "psnr", len(frame), above)
