"""Tuning: one search on tuning images, with the same effort for every arm, and the settings that
ship.
"""

import importlib.util
import itertools
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas
import pytest

from gipip.attacks.dlg import DLG
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.data.datasets import Dataset, load_dataset
from gipip.errors import DataError
from gipip.experiments.arms import EQUAL
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.sweep import execute
from gipip.experiments.tuning import pattern_search, read_tuned, tune, tuning_units, write_tuned
from gipip.federation.defenses import Sparsification
from gipip.priors.autoencoder import load_prior

SHIPPED = read_tuned()
ONE = "cifar10/lenet/B=1"
FEW = tuning_units(2, model="lenet")


@pytest.fixture(scope="module")
def prior():
    return load_prior()


@pytest.fixture(scope="module")
def studies():
    """data/tune_weights.py."""
    file = Path(__file__).parents[1] / "data" / "tune_weights.py"
    spec = importlib.util.spec_from_file_location("tune_weights", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Notes(ThreadPoolExecutor):
    """An executor in this process that keeps in mind what it was asked for."""

    def __init__(self):
        super().__init__(1)
        self.runs = []

    def submit(self, work, run):
        self.runs.append(run)
        return super().submit(work, run)


# The search ---------------------------------------------------------------------


def searched(measure, evaluations, **start) -> list[dict]:
    """All points, in the order in which they were measured."""
    points = []

    def noted(several):
        points.extend(several)
        return [measure(**point) for point in several]

    pattern_search(noted, start, evaluations)
    return points


def near(best):
    """Highest at `best`, and falling with the distance in decades."""
    return lambda **point: -sum(math.log10(point[name] / best[name]) ** 2 for name in best)


def test_the_search_tries_neighbours_moves_to_the_best_and_then_halves_its_step():
    tried = [point["a"] for point in searched(near({"a": 0.1}), 8, a=0.01)]
    decades = [-2, -1.5, -2.5, -1, -0.5, -0.75, -1.25, -0.875]
    assert tried == pytest.approx([10**power for power in decades], rel=1e-5)


def test_the_search_varies_each_value_alone_and_starts_at_the_incumbent():
    tried = searched(near({"a": 2.0, "b": 5.0}), 5, a=2.0, b=5.0)
    assert tried[0] == {"a": 2.0, "b": 5.0}
    assert [point["a"] for point in tried[1:]] == pytest.approx(
        [2 * 10**0.5, 2 / 10**0.5, 2, 2], rel=1e-5
    )
    assert [point["b"] for point in tried[1:]] == pytest.approx(
        [5, 5, 5 * 10**0.5, 5 / 10**0.5], rel=1e-5
    )


@pytest.mark.parametrize("evaluations", [1, 2, 7, 24])
@pytest.mark.parametrize("start", [{"a": 1.0}, {"a": 1.0, "b": 3.0, "c": 1e-3}])
def test_the_search_measures_exactly_so_many_different_points(evaluations, start):
    tried = searched(near(dict.fromkeys(start, 0.02)), evaluations, **start)
    assert len({tuple(point.values()) for point in tried}) == len(tried) == evaluations


@pytest.mark.parametrize("best", [{"a": 1e4, "b": 0.3}, {"a": 1e-3, "b": 7.0}])
def test_the_search_has_no_edge_and_comes_close(best):
    tried = searched(near(best), 40, a=1.0, b=1.0)
    found = max(tried, key=lambda point: near(best)(**point))
    assert all(abs(math.log10(found[name] / best[name])) < 0.15 for name in best)


# An arm -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_lenet(prior, tmp_path_factory):
    """Settings, points and runs of an arm with two priors; drawing a private image is an error."""

    def private(*arguments, **options):
        raise AssertionError("a private image was drawn")

    arm = [GIPIP(prior=prior.with_offset(c), iterations=2, tv_weight=0.1) for c in (0, 0.01)]
    store = tmp_path_factory.mktemp("store")
    how = {"name": "ours", "evaluations": 4, "enough": 2}
    with pytest.MonkeyPatch.context() as patch, Notes() as executor:
        patch.setattr(Dataset, "private", private)
        return *tune(arm, FEW, store=store, executor=executor, **how), executor.runs


def test_there_is_a_row_for_each_point_with_all_weights_of_the_arm(tuned_lenet):
    settings, tried, _ = tuned_lenet
    about = tried[["condition", "arm", "images", "iterations"]].drop_duplicates()
    assert about.to_dict("records") == [
        {"condition": ONE, "arm": "ours", "images": 2, "iterations": 2}
    ]
    points = tried["settings"].tolist()
    assert len(points) == 4 and points[0] == {"tv_weight": 0.1, "as_weight": 0.2}
    assert settings == max(tried.to_dict("records"), key=lambda row: row["psnr"])["settings"]


def test_a_row_is_the_mean_over_all_images_each_attacked_with_its_own_prior_and_start(
    tuned_lenet, prior
):
    _, tried, _ = tuned_lenet
    row = tried.to_dict("records")[1]
    results = []
    for number, offset in enumerate((0, 0.01)):
        known = {"prior": prior.with_offset(offset), "iterations": 2, "seed": number}
        attack = GIPIP(**known, **row["settings"])
        results.append(execute(Run("ours", FEW[number], attack)))
    for metric in ("psnr", "ssim", "lpips"):
        mean = sum(result.metrics[metric].mean() for result in results) / 2
        assert row[metric] == pytest.approx(mean)


def test_what_is_not_tuned_stays_as_the_arm_has_it(tmp_path):
    attack = InvertingGradients(iterations=1, learning_rate=0.05, tv_weight=0)
    with Notes() as executor:
        how = {"store": tmp_path, "executor": executor, "evaluations": 3, "enough": 2}
        settings, tried = tune(attack, FEW, ["learning_rate"], **how)
    assert {run.attack.tv_weight for run in executor.runs} == {0}
    assert {run.attack.iterations for run in executor.runs} == {1}
    assert tried["settings"].tolist()[0] == {"tv_weight": 0, "learning_rate": 0.05}
    assert settings["tv_weight"] == 0


def test_a_weight_of_zero_is_off_and_stays_off(prior, tmp_path):
    attack = GIPIP(prior=prior, iterations=1, tv_weight=0)
    _, tried = tune(attack, FEW, store=tmp_path, executor=Notes(), evaluations=3, enough=2)
    assert {point["tv_weight"] for point in tried["settings"]} == {0}
    assert len({point["as_weight"] for point in tried["settings"]}) == 3


def test_tuning_is_a_sweep_that_the_store_spares_the_second_time(tmp_path):
    attack = InvertingGradients(iterations=1)
    with Notes() as executor:
        how = {"store": tmp_path, "executor": executor, "evaluations": 2, "enough": 2}
        first, again = tune(attack, FEW, **how), tune(attack, FEW, **how)
    assert len(executor.runs) == 4
    assert first[0] == again[0] and first[1].equals(again[1])


def refused(*arguments, **options) -> str:
    with pytest.raises(DataError) as error:
        tune(*arguments, store="not needed", **options)
    return str(error.value)


def test_private_images_are_refused_before_anything_is_computed():
    message = refused(InvertingGradients(), [Scenario(model="lenet")])
    assert "on tuning images only. Use pool='tuning'" in message


def test_scenarios_of_two_conditions_or_of_none_are_refused():
    defended = tuning_units(2, model="lenet", defenses=(Sparsification(sparsity=0.9),))
    message = refused(InvertingGradients(), FEW + defended)
    assert f"one condition at a time. Given: {ONE}, {ONE}/sparsity 0.9." in message
    assert "Given: none." in refused(InvertingGradients(), [])


@pytest.mark.parametrize(("size", "least"), [(1, 16), (4, 16), (8, 32), (16, 32)])
def test_too_few_tuning_images_are_refused_however_often_they_are_given(size, least):
    enough = tuning_units(batch_size=size, distinct_labels=size <= 10)
    assert sum(scenario.batch_size for scenario in enough) == least
    message = refused(InvertingGradients(), [*enough[1:], *enough[1:]])
    assert f"{least - size} tuning images are too few" in message
    assert f"expected at least {least}" in message


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (InvertingGradients(), ["tv_wieght"], "no tv_wieght above 0 to tune. It has: tv_weight, "),
        (InvertingGradients(tv_weight=0), ["tv_weight"], "no tv_weight above 0 to tune"),
        (DLG(), [], "DLG has no weight above 0 to tune. It has: learning_rate"),
    ],
)
def test_a_setting_that_cannot_be_tuned_is_refused(attack, settings, message):
    assert message in refused(attack, FEW, settings, enough=2)


def test_tuning_images_are_never_private_ones():
    data = load_dataset("cifar10")
    pools = [
        {image.numpy().tobytes() for image in pool.pixels}
        for pool in (data.tuning_pool, data.private_pool, data.auxiliary_pool)
    ]
    assert all(not first & second for first, second in itertools.combinations(pools, 2))


def test_the_settings_of_an_arm_are_those_of_the_run_they_were_tuned_with():
    about = {"model": "lenet", "model_seed": 4, "mode": "train", "labels": "withheld"}
    conditions = {Scenario(pool=pool, seed=3, **about).condition for pool in ("tuning", "private")}
    assert conditions == {ONE}


# The file ----------------------------------------------------------------------


def row(condition="c", arm="IG", psnr=12.345678, **settings) -> dict:
    about = {"condition": condition, "arm": arm, "settings": settings, "psnr": psnr}
    return about | {"images": 16, "iterations": 100}


def written(path, study, *rows, **made) -> dict:
    return json.loads(write_tuned(path, study, pandas.DataFrame(rows), **made).read_text())


def test_what_is_written_holds_the_best_exact_settings_and_every_point(tmp_path):
    best = row(tv_weight=1e-6, as_weight=0.123456)
    worse = row(psnr=12.1, tv_weight=1.0, as_weight=1.0)
    content = written(tmp_path / "new" / "tuned.json", "mine", worse, best, command="a test")
    assert content["settings"]["c"] == {"IG": {"tv_weight": 1e-6, "as_weight": 0.123456}}
    study = content["studies"]["mine"]
    assert study["grid"] == [worse, best | {"psnr": 12.3457}]
    assert study["made"]["command"] == "a test" and "date" in study["made"]


def test_a_study_is_added_to_what_ships_when_there_is_no_file(tmp_path):
    content = written(tmp_path / "tuned.json", "mine", row(tv_weight=1.0))
    mine = content["studies"].pop("mine")
    assert len(mine["grid"]) == 1 and content["studies"] == SHIPPED["studies"]
    assert content["settings"] == SHIPPED["settings"] | {"c": {"IG": {"tv_weight": 1.0}}}


def test_a_study_replaces_its_own_settings_in_a_file_and_leaves_other_arms_conditions_and_studies(
    tmp_path,
):
    path = tmp_path / "tuned.json"
    other = {"made": {"by": "hand"}, "grid": []}
    before = {
        "c": {"IG": {"tv_weight": 1}, "GI-PIP": {"as_weight": 1, "tv_weight": 1}},
        "d": {"IG": {"tv_weight": 2}},
    }
    path.write_text(json.dumps({"settings": before, "studies": {"other": other, "mine": other}}))
    content = written(path, "mine", row(arm="GI-PIP", as_weight=3.0), row("e", tv_weight=4.0))
    assert content["settings"] == {
        "c": {"IG": {"tv_weight": 1}, "GI-PIP": {"as_weight": 3}},
        "d": before["d"],
        "e": {"IG": {"tv_weight": 4}},
    }
    assert content["studies"]["other"] == other and len(content["studies"]["mine"]["grid"]) == 2


# The studies -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["main", "resnet18-8", "conditions", "defenses", "gan"])
def test_a_study_tunes_without_offset_on_enough_tuning_images_that_can_be_drawn(name, studies):
    study = studies.STUDIES[name]
    for about in study.conditions:
        units = tuning_units(dataset="cifar10", **about)
        drawn = [len(scenario.batch()) for scenario in units]
        assert sum(drawn) >= (32 if drawn[0] >= 8 else 16)
    arms = studies.study_arms(study).values()
    ours = [attack for arm in arms for attack in arm.attacks if isinstance(attack, GIPIP)]
    assert {attack.prior.offset for attack in ours} == {0}
    assert {attack.iterations for attack in ours} == {study.iterations}


@pytest.mark.parametrize("name", ["conditions", "variants", "defenses"])
def test_with_and_without_the_anomaly_score_differ_in_nothing_else(name, studies):
    arms = studies.study_arms(studies.STUDIES[name])
    without, ours = arms["InvertingGradients"], arms[EQUAL]
    assert ours.after == "InvertingGradients" and ours.settings == ("as_weight",)
    for attack in ours.attacks:
        shared = {name: getattr(attack, name) for name in InvertingGradients.model_fields}
        assert shared == without.attacks[0].model_dump()


def test_the_variants_differ_in_autoencoder_and_offset_and_start_from_the_same_total_variation(
    prior, studies
):
    arms = studies.study_arms(studies.STUDIES["variants"])
    ours = {name: arm.attacks for name, arm in arms.items() if name != "InvertingGradients"}
    offsets = {name: {attack.prior.offset for attack in found} for name, found in ours.items()}
    shapes = {"width6": (6, 3), "depth2": (12, 2), "depth4": (12, 4)}
    expected = dict.fromkeys([EQUAL, "anomaly score alone", *shapes], {0})
    expected |= dict.fromkeys(["c calibrated", "c calibrated, per batch"], {prior.offset})
    assert offsets == expected | {"c as released": {0.001}}
    for name, shape in shapes.items():
        autoencoder = ours[name][0].prior.autoencoder
        assert autoencoder.arguments == dict(zip(("width", "depth"), shape, strict=True))
    first = [name for name, arm in arms.items() if not arm.after]
    assert first == ["InvertingGradients", "anomaly score alone"]


def test_a_study_gives_every_arm_the_same_evaluations_from_the_settings_that_ship(
    studies, tmp_path
):
    condition = {"model": "convnet16", "epochs": 40}
    study = studies.Study(studies.equal_tv, [condition], 1)
    arms = {
        name: arm._replace(attacks=arm.attacks[:1])
        for name, arm in studies.study_arms(study).items()
    }
    how = {"evaluations": 2, "store": tmp_path, "executor": Notes()}
    tried = studies.tune_all(study, "cifar10", arms, **how)
    assert tried.groupby("arm").size().to_dict() == {"InvertingGradients": 2, EQUAL: 2}
    assert set(tried["images"]) == {16}
    (key,) = set(tried["condition"])
    starts = tried.groupby("arm")["settings"].first()
    assert starts["InvertingGradients"] == SHIPPED["settings"][key]["InvertingGradients"]
    best = tried.loc[tried[tried["arm"] != EQUAL]["psnr"].idxmax(), "settings"]
    assert {point["tv_weight"] for point in tried[tried["arm"] == EQUAL]["settings"]} == {
        best["tv_weight"]
    }


# What ships --------------------------------------------------------------------

CASES = {
    f"cifar10/{model}/B={size}": (model, size)
    for model in ("convnet", "resnet18")
    for size in (1, 4, 8)
}


@pytest.mark.parametrize("condition", CASES)
@pytest.mark.parametrize("attack", ["GIPIP", "InvertingGradients"])
def test_the_settings_that_notebook_02_takes_are_the_best_of_their_own_grid(condition, attack):
    model, size = CASES[condition]
    study = SHIPPED["studies"].get(f"{model}-{size}", SHIPPED["studies"]["main"])
    tried = [row for row in study["grid"] if (row["arm"], row["condition"]) == (attack, condition)]
    chosen = SHIPPED["settings"][condition][attack]
    at_choice = [row["psnr"] for row in tried if row["settings"] == chosen]
    assert at_choice == [max(row["psnr"] for row in tried)]


def test_every_shipped_setting_is_in_the_grid_of_a_study():
    tried = [
        (row["condition"], row["arm"], row["settings"])
        for study in SHIPPED["studies"].values()
        for row in study["grid"]
    ]
    chosen = [
        (condition, arm, settings)
        for condition, arms in SHIPPED["settings"].items()
        for arm, settings in arms.items()
    ]
    assert [row for row in chosen if row not in tried] == []


@pytest.mark.parametrize("condition", CASES)
def test_tuned_attacks_carry_the_shipped_weights(prior, condition):
    model, size = CASES[condition]
    assert Scenario(model=model, batch_size=size).condition == condition
    settings = SHIPPED["settings"][condition]
    ours, baseline = GIPIP.tuned(condition, prior=prior), InvertingGradients.tuned(condition)
    assert (ours.tv_weight, ours.as_weight) == (
        settings["GIPIP"]["tv_weight"],
        settings["GIPIP"]["as_weight"],
    )
    assert (
        baseline.tv_weight == settings["InvertingGradients"]["tv_weight"]
        and ours.learning_rate == baseline.learning_rate
    )


def test_tuned_gipip_sets_c_to_zero_as_it_was_tuned(prior):
    assert prior.offset > 0 and GIPIP.tuned("cifar10/convnet/B=1", prior=prior).prior.offset == 0


def test_single_settings_of_a_tuned_attack_can_be_changed(prior):
    attack = GIPIP.tuned("cifar10/convnet/B=1", prior=prior, iterations=7, tv_weight=0.5)
    assert (attack.iterations, attack.tv_weight) == (7, 0.5)


def test_a_condition_without_tuned_weights_is_an_error_that_says_which_there_are(prior):
    with pytest.raises(
        DataError,
        match="InvertingGradients are shipped for 'cifar10/lenet/B=1'.*cifar10/convnet/B=1, ",
    ):
        InvertingGradients.tuned(ONE)
    with pytest.raises(
        DataError, match="GIPIP are shipped for 'imagenet224/convnet/B=1'. Shipped: none"
    ):
        GIPIP.tuned("imagenet224/convnet/B=1", prior=prior)
    with pytest.raises(
        DataError, match="No tuned weights of no such arm are shipped for 'cifar10/convnet/B=1'"
    ):
        InvertingGradients.tuned("cifar10/convnet/B=1", arm="no such arm")
