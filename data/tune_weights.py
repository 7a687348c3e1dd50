"""The studies that made data/tuned.json: attack weights chosen on tuning images.

    python data/tune_weights.py main --store results --workers 2

takes up to hours on two cores, minutes on a GPU, and goes on where it was. The studies of
photographs take a data set that `gipip data imagenet64 --private FOLDER` prepared: those that
ship are too few to tune batches on.
"""

import argparse
from pathlib import Path

from gipip.attacks.gias import GIAS, LatentSearch
from gipip.attacks.gipip import GIPIP
from gipip.attacks.gradinversion import GradInversion
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.presets import RELEASED_OFFSETS
from gipip.experiments.arms import EQUAL
from gipip.experiments.scenario import Scenario
from gipip.experiments.sweep import provenance
from gipip.experiments.tuning import Arm, Study, tune, write_tuned
from gipip.federation.defenses import DPSGD, GaussianNoise, Soteria, Sparsification
from gipip.priors.autoencoder import AnomalyScore, load_prior
from gipip.priors.gan import load_generator

TV_WEIGHTS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
AS_WEIGHTS = (0.05, 0.2, 1.0, 3.0)
BATCHES = {"convnet": {1: 8, 4: 4, 8: 4}, "resnet18": {1: 4, 4: 2, 8: 2}}
"""The main study: how many batches of tuning images for each model and batch size."""

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

_SMALL_TV = {"tv_weight": TV_WEIGHTS[1:]}
_PHOTOGRAPHS_TV = {"tv_weight": (1e-3, 3e-3, 1e-2, 3e-2)}


def _tuning(count: int, **about) -> list[Scenario]:
    return [Scenario(pool="tuning", seed=seed, **about) for seed in range(count)]


def main_study(prior: AnomalyScore, iterations: int, dataset: str) -> Study:
    """Inverting Gradients and GI-PIP, for 02."""
    scenarios = []
    for model, counts in BATCHES.items():
        for size, count in counts.items():
            scenarios += _tuning(count, dataset=dataset, model=model, batch_size=size)
    baseline = InvertingGradients(iterations=iterations)
    ours = GIPIP(prior=prior, iterations=iterations)
    tv = {"tv_weight": TV_WEIGHTS}
    arms = {
        "InvertingGradients": Arm(baseline, (tv,)),
        "GIPIP": Arm(ours, (tv | {"as_weight": AS_WEIGHTS},)),
    }
    return Study(tuple(scenarios), arms)


def _equal_tv(prior: AnomalyScore, iterations: int, **settings) -> dict[str, Arm]:
    """λ_TV for Inverting Gradients, then λ_AS for GIPIP at that λ_TV: with and without
    the anomaly score at equal total variation.
    """
    baseline = InvertingGradients(iterations=iterations, **settings)
    ours = GIPIP(prior=prior, iterations=iterations, **settings)
    return {
        "InvertingGradients": Arm(baseline, (_SMALL_TV,)),
        EQUAL: Arm(ours, ({"as_weight": AS_WEIGHTS},), after="InvertingGradients"),
    }


def conditions(prior: AnomalyScore, iterations: int, dataset: str) -> Study:
    """Batch sizes and trained clients, for 03."""
    client, scenarios = {"dataset": dataset, "model": "convnet16"}, []
    for size, count in {1: 4, 2: 3, 4: 2, 8: 2, 12: 1, 16: 1}.items():
        scenarios += _tuning(count, **client, batch_size=size, distinct_labels=size <= 10)
    for epochs in (40, 60, 80, 100):
        scenarios += _tuning(2, **client, epochs=epochs)
    return Study(tuple(scenarios), _equal_tv(prior, iterations))


def variants(prior: AnomalyScore, iterations: int, dataset: str) -> Study:
    """Of the anomaly score, for 03."""
    priors = {name: load_prior(f"cifar10-{name}").with_offset(0) for name in AUTOENCODERS}
    priors["c calibrated"] = load_prior()
    priors["c as released"] = prior.with_offset(RELEASED_OFFSETS["cifar10"])
    attacks = {name: GIPIP(prior=own, iterations=iterations) for name, own in priors.items()}
    per_batch = attacks["c calibrated"].model_copy(update={"score_per": "batch"})
    attacks["c calibrated, per batch"] = per_batch
    arms, stages = _equal_tv(prior, iterations), ({"as_weight": AS_WEIGHTS},)
    for name, attack in attacks.items():
        arms[name] = Arm(attack, stages, after="InvertingGradients")
    alone = GIPIP(prior=prior, iterations=iterations, tv_weight=0)
    arms["anomaly score alone"] = Arm(alone, stages)
    return Study(tuple(_tuning(2, dataset=dataset, model="convnet16", batch_size=4)), arms)


def defenses(prior: AnomalyScore, iterations: int, dataset: str) -> Study:
    """What the client may do to its gradient, for 05."""
    scenarios = []
    for defense in DEFENSES:
        scenarios += _tuning(3, dataset=dataset, model="convnet16", defenses=(defense,))
    return Study(tuple(scenarios), _equal_tv(prior, iterations, masked=True))


def gan(prior: AnomalyScore, iterations: int, dataset: str) -> Study:
    """GIAS and its opponents, for 04."""
    generator = load_generator("cifar10-3.8%")
    client = {"model": "convnet16", "batch_size": 4}
    scenarios = _tuning(2, dataset=dataset, **client, statistics="shared")  # for GradInversion
    weights = {"tv_weight": (3e-4, 1e-3, 3e-3, 1e-2)}
    arms = {
        "GIPIP": Arm(
            GIPIP(prior=prior, iterations=iterations),
            (_SMALL_TV, {"as_weight": AS_WEIGHTS}, _SMALL_TV),
        ),
        "LatentSearch": Arm(
            LatentSearch(prior=generator, iterations=iterations),
            (weights, {"learning_rate": (0.03, 0.1, 0.3)}),
        ),
        "GIAS": Arm(
            GIAS(prior=generator, iterations=iterations, latent_iterations=iterations),
            (
                {"learning_rate": (3e-4, 1e-3, 3e-3, 1e-2)},
                weights,
                {"latent_learning_rate": (0.03, 0.3)},
            ),
        ),
        "GradInversion": Arm(
            GradInversion(iterations=iterations),
            (
                {"statistics_weight": (0.01, 0.1, 1.0)},
                {"tv_weight": (3e-3, 1e-2, 3e-2)},
                {"group_weight": (0.0, 0.1)},
            ),
        ),
    }
    return Study(tuple(scenarios), arms)


def _three_arms(prior: AnomalyScore, iterations: int) -> dict[str, Arm]:
    """λ_TV for Inverting Gradients, then λ_AS for GIPIP at that λ_TV, then λ_TV for
    GIPIP at that λ_AS.
    """
    baseline = InvertingGradients(iterations=iterations)
    ours = GIPIP(prior=prior, iterations=iterations)
    scores = ({"as_weight": (0.05, 0.2, 1.0)},)
    return {
        "InvertingGradients": Arm(baseline, (_PHOTOGRAPHS_TV,)),
        EQUAL: Arm(ours, scores, after="InvertingGradients"),
        "GIPIP": Arm(ours, (_PHOTOGRAPHS_TV,), after=EQUAL),
    }


def imagenet64(prior: AnomalyScore, iterations: int, dataset: str) -> Study:
    """Photographs, for 06."""
    scenarios = []
    for size, count in {1: 4, 4: 2, 8: 2}.items():
        scenarios += _tuning(count, dataset=dataset, model="convnet16", batch_size=size)
    return Study(tuple(scenarios), _three_arms(prior, iterations))


def imagenet64_resnet18(prior: AnomalyScore, iterations: int, dataset: str) -> Study:
    """Photographs and the paper's network, for 06."""
    scenarios = _tuning(4, dataset=dataset, model="resnet18")
    return Study(tuple(scenarios), _three_arms(prior, iterations))


def imagenet64_gan(prior: AnomalyScore, iterations: int, dataset: str) -> Study:
    """GIAS on photographs, for 06."""
    latent = {"prior": load_generator("imagenet64"), "latent_iterations": iterations // 2}
    gias = GIAS(iterations=iterations, **latent)
    stages = ({"learning_rate": (1e-3, 3e-3, 1e-2)}, {"tv_weight": (1e-3, 3e-3, 1e-2)})
    scenarios = _tuning(4, dataset=dataset, model="convnet16")
    return Study(tuple(scenarios), {"GIAS": Arm(gias, stages)})


STUDIES = {  # how each is built, the iterations of its attacks, the data set and the prior
    "main": (main_study, 300, "cifar10"),
    "conditions": (conditions, 100, "cifar10"),
    "variants": (variants, 100, "cifar10"),
    "defenses": (defenses, 100, "cifar10"),
    "gan": (gan, 100, "cifar10"),
    "imagenet64": (imagenet64, 100, "imagenet64"),
    "imagenet64-resnet18": (imagenet64_resnet18, 300, "imagenet64"),
    "imagenet64-gan": (imagenet64_gan, 100, "imagenet64"),
}


def study(name: str, iterations: int | None = None, dataset: str | None = None) -> Study:
    """One of STUDIES, with the anomaly score that ships, c = 0."""
    build, usual, images = STUDIES[name]
    return build(load_prior(images).with_offset(0), iterations or usual, dataset or images)


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
    chosen = study(asked.study, asked.iterations, asked.dataset)
    settings, grid = tune(chosen, store=asked.store, workers=asked.workers)
    attacks = {name: arm.attack for name, arm in chosen.arms.items()}
    with_prior = {name: attack for name, attack in attacks.items() if hasattr(attack, "prior")}
    made = {
        "command": f"python data/tune_weights.py {asked.study}",
        "dataset": chosen.scenarios[0].dataset,
        "priors": {name: attack.prior.fingerprint for name, attack in with_prior.items()},
        "iterations": {name: attack.iterations for name, attack in attacks.items()},
        "criterion": "highest mean PSNR on tuning images",
        **provenance(),
    }
    print(f"Saved: {write_tuned(asked.output, asked.study, settings, grid, made)}")


if __name__ == "__main__":
    main()
