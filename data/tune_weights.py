"""The tunings that made data/tuned.json: attack weights chosen on tuning images.

    python data/tune_weights.py main --store results --workers 2

takes hours on two cores, minutes on a GPU, and goes on where it was. Those of photographs take a
data set that `gipip data imagenet64 --private FOLDER` prepared: those that ship are too few to tune
on. `gipip tune` does the same for one attack and condition.
"""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import pandas

from gipip.attacks.base import Attack
from gipip.attacks.gias import GIAS, LatentSearch
from gipip.attacks.gipip import GIPIP
from gipip.attacks.gradinversion import GradInversion
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.presets import RELEASED_OFFSETS
from gipip.experiments.arms import EQUAL, three_priors
from gipip.experiments.tuning import read_tuned, tune, tuning_units, write_tuned
from gipip.federation.defenses import DPSGD, GaussianNoise, Soteria, Sparsification
from gipip.priors.autoencoder import AnomalyScore, load_prior
from gipip.priors.gan import load_generator

AUTOENCODERS = ("width6", "depth2", "depth4")
"""The further autoencoders that 03_ablations compares."""

DEFENSES = (
    *(GaussianNoise(std=std) for std in (1e-4, 1e-3, 1e-2, 1e-1)),
    *(Sparsification(sparsity=sparsity) for sparsity in (0.5, 0.9, 0.95, 0.99)),
    Soteria(pruned=0.5),
    *(DPSGD(max_norm=1.0, noise_multiplier=noise) for noise in (0.01, 0.1)),
)
"""What 05_defenses attacks adaptively, at B = 1: matching only the entries that are not
zero, with weights tuned under each defence.
"""


class Tuned(NamedTuple):
    """An arm (an attack for each prior) and which of its settings are tuned: by default its
    weights. `after`: the arm whose tuned settings it takes over first, e.g. its λ_TV.
    """

    attacks: list[Attack]
    settings: tuple[str, ...] = ()
    after: str = ""


Arms = dict[str, Tuned]
Priors = list[AnomalyScore]


def _ours(priors: Iterable[AnomalyScore], **about) -> list[Attack]:
    return [GIPIP(prior=prior, **about) for prior in priors]


def each_at_its_best(priors: Priors, **about) -> Arms:
    """Inverting Gradients and GI-PIP."""
    return {
        "InvertingGradients": Tuned([InvertingGradients(**about)]),
        "GIPIP": Tuned(_ours(priors, **about)),
    }


def equal_tv(priors: Priors, **about) -> Arms:
    """With and without the anomaly score, at the total variation that is best without."""
    score = Tuned(_ours(priors, **about), ("as_weight",), after="InvertingGradients")
    return {"InvertingGradients": Tuned([InvertingGradients(**about)]), EQUAL: score}


def three_arms(priors: Priors, **about) -> Arms:
    """Those of `equal_tv` and of `each_at_its_best`."""
    return equal_tv(priors, **about) | each_at_its_best(priors, **about)


def adaptive(priors: Priors, **about) -> Arms:
    """Those of `equal_tv`, by an attacker who knows the defence."""
    return equal_tv(priors, masked=True, **about)


def variants(priors: Priors, **about) -> Arms:
    """Of the anomaly score."""
    found = {name: [load_prior(f"cifar10-{name}").with_offset(0)] for name in AUTOENCODERS}
    found["c calibrated"] = [load_prior()]
    found["c as released"] = [prior.with_offset(RELEASED_OFFSETS["cifar10"]) for prior in priors]
    attacks = {name: _ours(own, **about) for name, own in found.items()}
    attacks["c calibrated, per batch"] = _ours([load_prior()], score_per="batch", **about)
    arms = {
        name: Tuned(own, ("as_weight",), after="InvertingGradients")
        for name, own in attacks.items()
    }
    alone = Tuned(_ours(priors, tv_weight=0, **about))
    return equal_tv(priors, **about) | arms | {"anomaly score alone": alone}


def _gias(generator: str, iterations: int) -> GIAS:
    """In the time that other attacks take for so many iterations."""
    stages = {"latent_iterations": iterations // 4, "iterations": iterations // 2}
    return GIAS(prior=load_generator(generator), **stages)


def generators(priors: Priors, iterations: int) -> Arms:
    """GIAS and its opponents."""
    search = LatentSearch(prior=load_generator("cifar10-3.8%"), iterations=iterations)
    rates = ("learning_rate", "latent_learning_rate", "tv_weight")
    return {
        "GIPIP": Tuned(_ours(priors, iterations=iterations)),
        "LatentSearch": Tuned([search], ("tv_weight", "learning_rate")),
        "GIAS": Tuned([_gias("cifar10-3.8%", iterations)], rates),
        "GradInversion": Tuned([GradInversion(iterations=iterations)]),
    }


def generators_of_photographs(priors: Priors, iterations: int) -> Arms:
    """GIAS."""
    return {"GIAS": Tuned([_gias("imagenet64", iterations)], ("learning_rate", "tv_weight"))}


class Study(NamedTuple):
    """What is tuned for which conditions, at the iterations at which it is judged."""

    arms: Callable[..., Arms]
    conditions: list[dict]
    iterations: int
    dataset: str = "cifar10"
    evaluations: int = 24  # of each arm and condition


def _on(model: str, sizes: Iterable[int] = (1, 4, 8)) -> list[dict]:
    return [{"model": model, "batch_size": size} for size in sizes]


_SMALL = {"model": "convnet16"}
_SIZES = [
    _SMALL | {"batch_size": size, "distinct_labels": size <= 10} for size in (1, 2, 4, 8, 12, 16)
]
_EPOCHS = [_SMALL | {"epochs": epochs} for epochs in (40, 60, 80, 100)]
_DEFENDED = [_SMALL | {"defenses": (defense,)} for defense in DEFENSES]
_FOUR = _SMALL | {"batch_size": 4}

STUDIES = {
    "main": Study(each_at_its_best, _on("convnet"), 300),  # 02
    "resnet18-1": Study(each_at_its_best, _on("resnet18", [1]), 300, evaluations=5),  # 02, claim 1
    "resnet18-4": Study(each_at_its_best, _on("resnet18", [4]), 300, evaluations=5),  # 02, claim 1
    "resnet18-8": Study(each_at_its_best, _on("resnet18", [8]), 300, evaluations=5),  # 02, claim 1
    "conditions": Study(equal_tv, _SIZES + _EPOCHS, 100),  # 03
    "variants": Study(variants, [_FOUR], 100),  # 03
    "gan": Study(generators, [_FOUR | {"statistics": "shared"}], 100),  # 04
    "defenses": Study(adaptive, _DEFENDED, 100),  # 05
    "imagenet64": Study(three_arms, _on("convnet16"), 100, "imagenet64"),  # 06
    "imagenet64-resnet18": Study(three_arms, _on("resnet18", [1]), 500, "imagenet64"),  # 06
    "imagenet64-gan": Study(generators_of_photographs, [_SMALL], 100, "imagenet64"),  # 06
}


def study_arms(study: Study, iterations: int | None = None) -> Arms:
    """With the anomaly scores that ship, c = 0."""
    cifar10 = study.dataset == "cifar10"
    priors = three_priors("cifar10") if cifar10 else [load_prior(study.dataset).with_offset(0)]
    return study.arms(priors, iterations=iterations or study.iterations)


def tune_all(study: Study, dataset: str, arms: Arms, **options) -> pandas.DataFrame:
    """All that was tried; each arm starts from what ships for it."""
    shipped, tables = read_tuned()["settings"], []
    for about in study.conditions:
        scenarios, found = tuning_units(dataset=dataset, **about), {}
        for name, (attacks, settings, after) in arms.items():
            start = shipped.get(scenarios[0].condition, {}).get(name, {}) | found.get(after, {})
            arm = [attack.model_copy(update=start) for attack in attacks]
            found[name], tried = tune(arm, scenarios, settings, name=name, **options)
            tables.append(tried)
    return pandas.concat(tables, ignore_index=True)


def _arguments() -> argparse.Namespace:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--iterations", type=int, help="of each attack (the study's)")
    parser.add_argument("--dataset", help="photographs that were prepared (the study's)")
    parser.add_argument("--workers", type=int, help="processes (two, or fewer cores)")
    parser.add_argument("--store", type=Path, default=Path("results"), help="of single results")
    parser.add_argument("--output", type=Path, default=Path("results/tuned.json"))
    return parser.parse_args()


def main() -> None:
    asked = _arguments()
    study = STUDIES[asked.study]
    arms = study_arms(study, asked.iterations)
    dataset = asked.dataset or study.dataset
    options = {"evaluations": study.evaluations, "store": asked.store, "workers": asked.workers}
    tried = tune_all(study, dataset, arms, **options)
    about = {"command": f"python data/tune_weights.py {asked.study}", "dataset": dataset}
    print(f"Saved: {write_tuned(asked.output, asked.study, tried, **about)}")


if __name__ == "__main__":
    main()
