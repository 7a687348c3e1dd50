"""Attack weights chosen on tuning images, with the same effort for every arm, and
shipped as `data/tuned.json`; `data/tune_weights.py` holds the studies that made it.

A study is a list of scenarios on tuning images and the arms to tune on them. An arm is
tuned in stages: each tries all combinations of a few settings on every scenario, and
the combination of highest mean PSNR in a condition (`Scenario.condition`) is where the
next starts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas

from gipip.attacks.base import Attack
from gipip.errors import DataError
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.sweep import sweep
from gipip.files import DATA

Stage = Mapping[str, Sequence]
_METRICS = ["psnr", "ssim", "lpips"]


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

    `sweep_options`: store, executor, workers, as for `sweep`. Raises DataError for a
    scenario that is not on tuning images.
    """
    for scenario in study.scenarios:
        if scenario.pool != "tuning":
            wrong = f"{scenario} is on the {scenario.pool} pool. Use pool='tuning'."
            raise DataError(f"Weights are tuned on tuning images only: {wrong}")
    settings: dict = {scenario.condition: {} for scenario in study.scenarios}
    tried = []
    for name, arm in study.arms.items():
        for condition in settings.values():
            condition[name] = dict(condition[arm.after]) if arm.after else {}
        for stage in arm.stages:
            table = _try(study, name, stage, settings, sweep_options)
            tried.append(table)
            best = table.loc[table.groupby("condition", sort=False)["psnr"].idxmax()]
            for row in best.itertuples():
                settings[row.condition][name] |= row.settings
    return settings, pandas.concat(tried, ignore_index=True)


def _try(
    study: Study, name: str, stage: Stage, settings: dict, sweep_options: dict
) -> pandas.DataFrame:
    """A row for each condition and each combination of the stage's values: mean metrics
    over the condition's scenarios.
    """
    attack = study.arms[name].attack
    points = [dict(zip(stage, values, strict=True)) for values in product(*stage.values())]
    runs, about = [], []
    for scenario, point in product(study.scenarios, points):
        chosen = settings[scenario.condition][name] | point
        runs.append(Run(name, scenario, type(attack)(**dict(attack) | chosen)))
        about.append((scenario.condition, name, json.dumps(chosen)))
    keys = ["condition", "arm", "settings"]
    results = sweep(runs, **sweep_options)
    means = pandas.DataFrame([result.metrics[_METRICS].mean() for result in results])
    rows = pandas.DataFrame(about, columns=keys).join(means)
    table = rows.groupby(keys, sort=False, as_index=False).mean()
    return table.assign(settings=table["settings"].map(json.loads))


def read_tuned() -> dict:
    """What ships: {"settings": {condition: {arm: settings}}, "studies": {name: {"made":
    …, "grid": [rows]}}}.
    """
    return json.loads((DATA / "tuned.json").read_text())


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
    rows = grid.round(dict.fromkeys(_METRICS, 4)).to_dict("records")
    content["studies"][name] = {"made": made, "grid": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
