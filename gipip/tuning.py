"""Attack weights chosen on tuning images, with the same grid of λ_TV for every arm, and shipped as `data/tuned.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas

from gipip.attacks import GIPIP, InvertingGradients
from gipip.experiments import Run, Scenario, sweep
from gipip.priors import AnomalyScore

TV_WEIGHTS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
AS_WEIGHTS = (0.05, 0.2, 1.0, 3.0)
BATCHES = {"convnet": {1: 8, 4: 4, 8: 4}, "resnet18": {1: 4, 4: 2, 8: 2}}


def tune(
    prior: AnomalyScore,
    *,
    dataset: str = "cifar10",
    batches: Mapping[str, Mapping[int, int]] = BATCHES,
    iterations: int = 300,
    tv_weights: Sequence[float] = TV_WEIGHTS,
    as_weights: Sequence[float] = AS_WEIGHTS,
    **sweep_options,
) -> tuple[dict, pandas.DataFrame]:
    """The weights of highest mean PSNR on tuning images, and the whole grid.

    `batches`: for each model and batch size how many batches of tuning images. Inverting Gradients is tried with every λ_TV, GIPIP (c = 0)
    with every λ_TV × λ_AS. Returns {data set: {model: {batch size: {attack: settings}}}} and a table with a row for each point of the grid.
    `sweep_options`: store, workers, scheduler, as for `sweep`.
    """
    prior = prior.with_offset(0)
    attacks = [InvertingGradients(tv_weight=tv, iterations=iterations) for tv in tv_weights]
    attacks += [GIPIP(prior=prior, tv_weight=tv, as_weight=score, iterations=iterations) for tv in tv_weights for score in as_weights]
    scenarios = [
        Scenario(dataset=dataset, pool="tuning", model=model, batch_size=size, seed=seed)
        for model, counts in batches.items()
        for size, count in counts.items()
        for seed in range(count)
    ]
    results = sweep([Run(type(attack).__name__, scenario, attack) for scenario in scenarios for attack in attacks], **sweep_options)
    rows = [
        {"attack": result.run.arm, "model": result.run.scenario.model, "batch_size": result.run.scenario.batch_size}
        | {"tv_weight": result.run.attack.tv_weight, "as_weight": getattr(result.run.attack, "as_weight", 0.0)}
        | result.metrics[["psnr", "ssim", "lpips"]].mean().to_dict()
        for result in results
    ]
    point = ["attack", "model", "batch_size", "tv_weight", "as_weight"]
    grid = pandas.DataFrame(rows).groupby(point, sort=False, as_index=False).mean()
    return {dataset: _best(grid)}, grid


def _best(grid: pandas.DataFrame) -> dict:
    settings: dict = {}
    for row in grid.loc[grid.groupby(["model", "batch_size", "attack"])["psnr"].idxmax()].to_dict("records"):
        weights = {"tv_weight": row["tv_weight"]} | ({"as_weight": row["as_weight"]} if row["attack"] == "GIPIP" else {})
        settings.setdefault(row["model"], {}).setdefault(str(row["batch_size"]), {})[row["attack"]] = weights
    return settings


def write_tuned(path: Path | str, settings: dict, grid: pandas.DataFrame, made: dict) -> Path:
    """Write what `tune` found, with the whole grid and how it was made, as JSON."""
    content = {"made": made, "settings": settings, "grid": grid.round({"psnr": 4, "ssim": 4, "lpips": 4}).to_dict("records")}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
