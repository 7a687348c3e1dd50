"""Attack weights chosen on tuning images, with the same effort for every arm, and
shipped as `data/tuned.json`.

A study is a list of scenarios on tuning images and the arms to tune on them. An arm is
tuned in stages: each tries all combinations of a few settings on every scenario, and
the combination of highest mean PSNR in a condition (`Scenario.condition`) is where the
next starts.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas

from gipip.attacks.base import Attack
from gipip.attacks.gias import GIAS, LatentSearch
from gipip.attacks.gipip import GIPIP
from gipip.attacks.gradinversion import GradInversion
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.presets import RELEASED_OFFSETS
from gipip.errors import DataError
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.sweep import sweep
from gipip.federation.defenses import DPSGD, GaussianNoise, Soteria, Sparsification
from gipip.files import DATA
from gipip.priors import AnomalyScore, load_generator, load_prior

Stage = Mapping[str, Sequence]
TUNED = DATA / "tuned.json"

TV_WEIGHTS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
AS_WEIGHTS = (0.05, 0.2, 1.0, 3.0)
BATCHES = {"convnet": {1: 8, 4: 4, 8: 4}, "resnet18": {1: 4, 4: 2, 8: 2}}
"""The main study: how many batches of tuning images for each model and batch size."""


@dataclass(frozen=True)
class Arm:
    """An attack and the stages in which it is tuned. `after`: the arm whose tuned
    settings it takes over first, e.g. its λ_TV.
    """

    attack: Attack
    stages: tuple[Stage, ...]
    after: str | None = None


@dataclass(frozen=True)
class Study:
    """What is tuned together: scenarios on tuning images, and arms by the name under
    which their settings are kept.
    """

    scenarios: tuple[Scenario, ...]
    arms: Mapping[str, Arm]


def tune(study: Study, **sweep_options) -> tuple[dict, pandas.DataFrame]:
    """The settings of highest mean PSNR, {condition: {arm: {setting: value}}}, and
    every combination that was tried, a row each.

    `sweep_options`: store, workers, scheduler, as for `sweep`. Raises DataError for a
    scenario that is not on tuning images.
    """
    if wrong := [scenario for scenario in study.scenarios if scenario.pool != "tuning"]:
        raise DataError(
            f"Weights are tuned on tuning images only: {wrong[0]} is on the {wrong[0].pool} pool. Use pool='tuning'."
        )
    settings: dict = {scenario.condition: {} for scenario in study.scenarios}
    rows = []
    for name, arm in study.arms.items():
        for condition in settings.values():
            condition[name] = dict(condition[arm.after]) if arm.after else {}
        for stage in arm.stages:
            tried = _try(study.scenarios, name, arm.attack, stage, settings, sweep_options)
            rows += tried
            for condition, best in _best(tried).items():
                settings[condition][name] |= best
    return settings, pandas.DataFrame(rows)


def _try(
    scenarios, name: str, attack: Attack, stage: Stage, settings: dict, sweep_options: dict
) -> list[dict]:
    """A row for each condition and each combination of the stage's values: mean metrics
    over the condition's scenarios.
    """
    points = [
        dict(zip(stage, values, strict=True)) for values in itertools.product(*stage.values())
    ]
    runs, where = [], []
    for scenario, point in itertools.product(scenarios, points):
        chosen = settings[scenario.condition][name] | point
        runs.append(Run(name, scenario, type(attack)(**dict(attack) | chosen)))
        where.append((scenario.condition, json.dumps(chosen)))
    metrics = ["psnr", "ssim", "lpips"]
    results = [result.metrics[metrics].mean() for result in sweep(runs, **sweep_options)]
    means = (
        pandas.DataFrame(results).groupby(pandas.MultiIndex.from_tuples(where), sort=False).mean()
    )
    return [
        {"condition": key[0], "arm": name, "settings": json.loads(key[1]), **row.to_dict()}
        for key, row in means.iterrows()
    ]


def _best(tried: list[dict]) -> dict[str, dict]:
    table = pandas.DataFrame(tried)
    best = table.loc[table.groupby("condition", sort=False)["psnr"].idxmax()]
    return dict(zip(best["condition"], best["settings"], strict=True))


def read_tuned() -> dict:
    """What ships: {"settings": {condition: {arm: settings}}, "studies": {name: {"made":
    …, "grid": [rows]}}}.
    """
    return json.loads(TUNED.read_text())


def write_tuned(
    path: Path | str, name: str, settings: dict, grid: pandas.DataFrame, made: dict
) -> Path:
    """Add a study to the file `path` (made from what ships when it is not there), in
    place of an earlier one of that name, as JSON.
    """
    path = Path(path)
    content = json.loads(path.read_text()) if path.exists() else read_tuned()
    for condition, arms in settings.items():
        content["settings"].setdefault(condition, {}).update(arms)
    content["studies"][name] = {
        "made": made,
        "grid": grid.round({"psnr": 4, "ssim": 4, "lpips": 4}).to_dict("records"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


# The studies whose results ship ------------------------------------------------


def _tuning(count: int, **about) -> tuple[Scenario, ...]:
    return tuple(Scenario(pool="tuning", seed=seed, **about) for seed in range(count))


def _main(prior: AnomalyScore, iterations: int) -> Study:
    scenarios = [
        _tuning(count, model=model, batch_size=size)
        for model, counts in BATCHES.items()
        for size, count in counts.items()
    ]
    arms = {
        "InvertingGradients": Arm(
            InvertingGradients(iterations=iterations), ({"tv_weight": TV_WEIGHTS},)
        ),
        "GIPIP": Arm(
            GIPIP(prior=prior, iterations=iterations),
            ({"tv_weight": TV_WEIGHTS, "as_weight": AS_WEIGHTS},),
        ),
    }
    return Study(tuple(itertools.chain(*scenarios)), arms)


EQUAL = "GIPIP at equal TV weight"
"""The arm that adds the anomaly score (c = 0) to tuned Inverting Gradients and changes
nothing else.
"""
_SMALL_TV = {"tv_weight": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}


def with_and_without(condition: str, prior: AnomalyScore, **changes) -> dict[str, Attack]:
    """{"without": tuned Inverting Gradients, "with": the same λ_TV and the anomaly
    score with its tuned weight, c = 0} for a condition.
    """
    ours = GIPIP.tuned(condition, arm=EQUAL, prior=prior.with_offset(0), **changes)
    return {"without": InvertingGradients.tuned(condition, **changes), "with": ours}


def _equal_tv_arms(prior: AnomalyScore, iterations: int, **settings) -> dict[str, Arm]:
    """λ_TV for Inverting Gradients, then λ_AS for GIPIP at that λ_TV: with and without
    the anomaly score at equal total variation.
    """
    return {
        "InvertingGradients": Arm(
            InvertingGradients(iterations=iterations, **settings), (_SMALL_TV,)
        ),
        EQUAL: Arm(
            GIPIP(prior=prior, iterations=iterations, **settings),
            ({"as_weight": AS_WEIGHTS},),
            after="InvertingGradients",
        ),
    }


def _conditions(prior: AnomalyScore, iterations: int) -> Study:
    counts = {1: 4, 2: 3, 4: 2, 8: 2, 12: 1, 16: 1}
    scenarios = [
        _tuning(count, model="convnet16", batch_size=size, distinct_labels=size <= 10)
        for size, count in counts.items()
    ]
    scenarios += [_tuning(2, model="convnet16", epochs=epochs) for epochs in (40, 60, 80, 100)]
    return Study(tuple(itertools.chain(*scenarios)), _equal_tv_arms(prior, iterations))


DEFENSES = (
    *(GaussianNoise(std=std) for std in (1e-4, 1e-3, 1e-2, 1e-1)),
    *(Sparsification(sparsity=sparsity) for sparsity in (0.5, 0.9, 0.95, 0.99)),
    Soteria(pruned=0.5),
    *(DPSGD(max_norm=1.0, noise_multiplier=noise) for noise in (0.01, 0.1)),
)
"""What 05_defenses attacks adaptively, at B = 1: matching only the entries that are not
zero, with weights tuned under each defence.
"""


def _defenses(prior: AnomalyScore, iterations: int) -> Study:
    scenarios = [_tuning(3, model="convnet16", defenses=(defense,)) for defense in DEFENSES]
    return Study(tuple(itertools.chain(*scenarios)), _equal_tv_arms(prior, iterations, masked=True))


def _variants(prior: AnomalyScore, iterations: int) -> Study:
    arms = _equal_tv_arms(prior, iterations)
    others = {name: load_prior(f"cifar10-{name}").with_offset(0) for name in AUTOENCODERS}
    others |= {
        "c calibrated": load_prior(),
        "c as released": prior.with_offset(RELEASED_OFFSETS["cifar10"]),
    }
    attacks = {name: GIPIP(prior=other, iterations=iterations) for name, other in others.items()}
    attacks["c calibrated, per batch"] = attacks["c calibrated"].model_copy(
        update={"score_per": "batch"}
    )
    stages = ({"as_weight": AS_WEIGHTS},)
    arms |= {
        name: Arm(attack, stages, after="InvertingGradients") for name, attack in attacks.items()
    }
    arms["anomaly score alone"] = Arm(
        GIPIP(prior=prior, iterations=iterations, tv_weight=0), stages
    )
    return Study(_tuning(2, model="convnet16", batch_size=4), arms)


AUTOENCODERS = ("width6", "depth2", "depth4")
"""The further autoencoders that 03_ablations compares."""


def _gan(prior: AnomalyScore, iterations: int) -> Study:
    generator = load_generator("cifar10-3.8%")
    scenarios = _tuning(
        2, model="convnet16", batch_size=4, statistics="shared"
    )  # which only GradInversion looks at
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
    return Study(scenarios, arms)


def _imagenet64(prior: AnomalyScore, iterations: int, dataset: str = "imagenet64") -> Study:
    batches = [
        _tuning(count, dataset=dataset, model="convnet16", batch_size=size)
        for size, count in {1: 4, 4: 2, 8: 2}.items()
    ]
    return Study(
        tuple(itertools.chain(*batches)),
        _three_arms(prior, iterations, tv_weights=(1e-3, 3e-3, 1e-2, 3e-2)),
    )


def _imagenet64_resnet18(
    prior: AnomalyScore, iterations: int, dataset: str = "imagenet64"
) -> Study:
    return Study(
        _tuning(4, dataset=dataset, model="resnet18"),
        _three_arms(prior, iterations, tv_weights=(1e-3, 3e-3, 1e-2, 3e-2)),
    )


def _three_arms(
    prior: AnomalyScore, iterations: int, tv_weights: Sequence[float]
) -> dict[str, Arm]:
    """λ_TV for Inverting Gradients, then λ_AS for GIPIP at that λ_TV, then λ_TV for
    GIPIP at that λ_AS.
    """
    weights, ours = {"tv_weight": tv_weights}, GIPIP(prior=prior, iterations=iterations)
    return {
        "InvertingGradients": Arm(InvertingGradients(iterations=iterations), (weights,)),
        EQUAL: Arm(ours, ({"as_weight": (0.05, 0.2, 1.0)},), after="InvertingGradients"),
        "GIPIP": Arm(ours, (weights,), after=EQUAL),
    }


def _imagenet64_gan(prior: AnomalyScore, iterations: int, dataset: str = "imagenet64") -> Study:
    gias = GIAS(
        prior=load_generator("imagenet64"), iterations=iterations, latent_iterations=iterations // 2
    )
    stages = ({"learning_rate": (1e-3, 3e-3, 1e-2)}, {"tv_weight": (1e-3, 3e-3, 1e-2)})
    return Study(_tuning(4, dataset=dataset, model="convnet16"), {"GIAS": Arm(gias, stages)})


_STUDIES = {  # how each is built, the iterations of its attacks, and the prior they use
    "main": (_main, 300, "cifar10"),
    "conditions": (_conditions, 100, "cifar10"),
    "variants": (_variants, 100, "cifar10"),
    "defenses": (_defenses, 100, "cifar10"),
    "gan": (_gan, 100, "cifar10"),
    "imagenet64": (_imagenet64, 100, "imagenet64"),
    "imagenet64-resnet18": (_imagenet64_resnet18, 300, "imagenet64"),
    "imagenet64-gan": (_imagenet64_gan, 100, "imagenet64"),
}
STUDIES = tuple(_STUDIES)


def study(
    name: str, prior: AnomalyScore | None = None, iterations: int | None = None, **options
) -> Study:
    """A study whose results ship: "main" (Inverting Gradients and GIPIP in 02),
    "conditions" (batch sizes and trained clients in 03), "variants" (of the anomaly
    score, 03), "defenses" (05), "gan" (GIAS and its opponents in 04), "imagenet64",
    "imagenet64-resnet18" and "imagenet64-gan" (06). These three take the name of a
    `dataset` that `gipip.prepare_imagenet` gave: the embedded photographs are too few
    to tune batches on.

    `prior`: by default the one that ships. Raises DataError for another name.
    """
    if name not in _STUDIES:
        raise DataError(f"Unknown study {name!r}. Known: {', '.join(STUDIES)}.")
    build, default, shipped = _STUDIES[name]
    return build((prior or load_prior(shipped)).with_offset(0), iterations or default, **options)
