"""Attack weights chosen on tuning images, with the same effort for every arm, and
shipped as `data/tuned.json`; `data/tune_weights.py` made it, `gipip tune` does the same
for one condition.

    scenarios = tuning_units(model="convnet", batch_size=4)
    settings, tried = tune(gipip.InvertingGradients(iterations=100), scenarios, store="results")
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas

from gipip.attacks.base import Attack
from gipip.errors import DataError
from gipip.experiments.arms import Arm, runs, units
from gipip.experiments.scenario import Scenario
from gipip.experiments.sweep import provenance, sweep
from gipip.files import DATA

Point = dict[str, float]
_METRICS = ["psnr", "ssim", "lpips"]
_FACTOR = 10**0.5


def tuning_units(images: int | None = None, **about) -> list[Scenario]:
    """Scenarios on so many tuning images or a few more; by default enough of them to
    tune on: 16, and 32 in batches of 8 or more. `about`: the other fields of
    `Scenario`.
    """
    size = about.get("batch_size", 1)
    return units(math.ceil((images or _enough(size)) / size), pool="tuning", **about)


def tune(
    arm: Arm,
    scenarios: Sequence[Scenario],
    settings: Sequence[str] = (),
    *,
    name: str = "",
    evaluations: int = 24,
    enough: int | None = None,
    **sweep_options,
) -> tuple[Point, pandas.DataFrame]:
    """The settings of highest mean PSNR on the scenarios, and a row for every point tried.

    `settings`: what `pattern_search` varies, from the arm's own values; by default all
    weights of its cost that are not 0. `evaluations`: of that search. `name`: of the
    arm, by default its class's. `sweep_options`: store, executor, workers, as for
    `sweep`. The rows hold condition, arm, settings, psnr, ssim, lpips, and the numbers
    of images and iterations.

    Raises DataError unless all scenarios are of one condition, on the tuning pool, with
    `enough` images (by default 16, and 32 in batches of 8 or more), and for a setting
    that cannot be tuned.
    """
    _require(scenarios, enough)
    attacks = [arm] if isinstance(arm, Attack) else list(arm)
    first, tables = attacks[0], []
    kept = {each: value for each, value in first if each.endswith("_weight")}

    def measure(points: list[Point]) -> list[float]:
        arms = {json.dumps(kept | point): _changed(attacks, point) for point in points}
        tables.append(_measured(arms, scenarios, **sweep_options))
        return tables[-1]["psnr"].tolist()

    pattern_search(measure, _start(first, settings), evaluations)
    tried = pandas.concat(tables, ignore_index=True)
    tried.insert(1, "arm", name or type(first).__name__)
    tried["iterations"] = first.iterations
    return tried["settings"].tolist()[tried["psnr"].argmax()], tried


def pattern_search(
    measure: Callable[[list[Point]], Sequence[float]], start: Point, evaluations: int
) -> None:
    """Search the point of highest measure, on a logarithmic lattice that has no edge,
    by measuring exactly so many different points, several at a time.

    `start`, of positive values, is first; then, again and again, the best point's
    neighbours: each of its values times and divided by √10. When none is better, the
    factor's square root takes its place.
    """
    best, step = (0.0,) * len(start), 1.0
    scores: dict[tuple[float, ...], float] = {}
    new = [best]
    while len(scores) < evaluations:
        if new:
            measured = measure([_point(start, place) for place in new])
            scores |= dict(zip(new, measured, strict=True))
            best = max(scores, key=scores.__getitem__)
        else:
            step /= 2
        new = [place for place in _neighbours(best, step) if place not in scores]
        new = new[: evaluations - len(scores)]


def _point(start: Point, place: Sequence[float]) -> Point:
    """The values so many factors from the start."""
    powers = dict(zip(start, place, strict=True))
    return {each: float(f"{start[each] * _FACTOR ** powers[each]:.6g}") for each in start}


def _neighbours(place: tuple[float, ...], step: float) -> Iterator[tuple[float, ...]]:
    for axis, power in enumerate(place):
        for there in (power + step, power - step):
            yield (*place[:axis], there, *place[axis + 1 :])


def _changed(attacks: Iterable[Attack], point: Point) -> list[Attack]:
    return [attack.model_copy(update=point) for attack in attacks]


def _measured(
    arms: Mapping[str, Arm], scenarios: Sequence[Scenario], **sweep_options
) -> pandas.DataFrame:
    """A row for each arm, named by its settings: means over all images."""
    images = sweep(runs(scenarios, arms), **sweep_options).frame().groupby("arm", sort=False)
    table = images[_METRICS].mean().reset_index(names="settings")
    table["settings"] = table["settings"].map(json.loads)
    table.insert(0, "condition", scenarios[0].condition)
    return table.assign(images=images.size().tolist())


def _enough(batch_size: int) -> int:
    return 32 if batch_size >= 8 else 16


def _require(scenarios: Sequence[Scenario], enough: int | None) -> None:
    conditions = sorted({scenario.condition for scenario in scenarios})
    if len(conditions) != 1:
        given = ", ".join(conditions) or "none"
        raise DataError(f"Weights are tuned for one condition at a time. Given: {given}.")
    if {scenario.pool for scenario in scenarios} != {"tuning"}:
        raise DataError("Weights are tuned on tuning images only. Use pool='tuning'.")
    images = sum(scenario.batch_size for scenario in set(scenarios))
    least = _enough(scenarios[0].batch_size) if enough is None else enough
    if images < least:
        raise DataError(
            f"{images} tuning images are too few for {conditions[0]}: expected at least {least}. "
            "Give more scenarios, or say by `enough` that so few will do."
        )


def _start(attack: Attack, settings: Sequence[str]) -> Point:
    """The attack's own values of what is tuned."""
    values = {each: value for each, value in attack if isinstance(value, float) and value > 0}
    names = list(settings) or [each for each in values if each.endswith("_weight")]
    wrong = [each for each in names if each not in values]
    if wrong or not names:
        missing, found = ", ".join(wrong) or "weight", ", ".join(values) or "nothing"
        kind = type(attack).__name__
        raise DataError(f"{kind} has no {missing} above 0 to tune. It has: {found}.")
    return {each: values[each] for each in names}


def read_tuned() -> dict:
    """What ships: {"settings": {condition: {arm: settings}}, "studies": {name: {"made":
    …, "grid": [rows]}}}.
    """
    return json.loads((DATA / "tuned.json").read_text())


def write_tuned(path: Path | str, study: str, tried: pandas.DataFrame, **made) -> Path:
    """Add what `tune` tried, of one or more arms and conditions, to the file `path`
    (made from what ships when it is not there) in place of an earlier study of that
    name, and the best as settings.

    `made`: what else to note beside machine, versions and date, such as the command.
    """
    path = Path(path)
    content = json.loads(path.read_text()) if path.exists() else read_tuned()
    best = tried.loc[tried.groupby(["condition", "arm"], sort=False)["psnr"].idxmax()]
    for row in best.itertuples():
        content["settings"].setdefault(row.condition, {})[row.arm] = row.settings
    made |= {"criterion": "highest mean PSNR on tuning images", **provenance()}
    rows = tried.round(dict.fromkeys(_METRICS, 4)).to_dict("records")
    content["studies"][study] = {"made": made, "grid": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
