"""Tuning: in stages on tuning images, with the same effort for every arm, and the
settings that ship.
"""

import importlib.util
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas
import pytest

from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.data.datasets import Dataset, load_dataset
from gipip.errors import DataError
from gipip.experiments.arms import EQUAL
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.sweep import execute
from gipip.experiments.tuning import Arm, Study, read_tuned, tune, write_tuned
from gipip.federation.defenses import Sparsification
from gipip.priors.autoencoder import load_prior

SHIPPED = read_tuned()
ONE, TWO = "cifar10/lenet/B=1", "cifar10/lenet/B=2"
SCENARIOS = (
    *(Scenario(pool="tuning", model="lenet", seed=seed) for seed in (0, 1)),
    Scenario(pool="tuning", model="lenet", batch_size=2),
)
TV, RATES, AS = (1e-5, 1e-2), (0.05, 0.3, 1.0), (0.1, 2.0)


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


@pytest.fixture(scope="module")
def tuned_lenet(prior, tmp_path_factory):
    """Settings, grid and the runs of a small study; drawing a private image is an error."""

    def private(*arguments, **options):
        raise AssertionError("a private image was drawn")

    arms = {
        "IG": Arm(InvertingGradients(iterations=2), ({"tv_weight": TV}, {"learning_rate": RATES})),
        "GI-PIP": Arm(GIPIP(prior=prior, iterations=2), ({"as_weight": AS},), after="IG"),
        "GI-PIP alone": Arm(
            GIPIP(prior=prior, iterations=2), ({"tv_weight": TV, "as_weight": AS},)
        ),
    }
    store = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch, Notes() as executor:
        patch.setattr(Dataset, "private", private)
        settings, grid = tune(Study(SCENARIOS, arms), store=store, executor=executor)
    return settings, grid, executor.runs


def rows(grid, condition, arm) -> list[dict]:
    return grid[(grid["condition"] == condition) & (grid["arm"] == arm)].to_dict("records")


def best(rows) -> dict:
    return max(rows, key=lambda row: row["psnr"])["settings"]


@pytest.mark.parametrize("condition", [ONE, TWO])
def test_a_stage_tries_all_combinations_of_its_own_settings(tuned_lenet, condition):
    _, grid, _ = tuned_lenet
    tried = [row["settings"] for row in rows(grid, condition, "GI-PIP alone")]
    assert tried == [
        {"tv_weight": tv, "as_weight": weight} for tv, weight in itertools.product(TV, AS)
    ]


@pytest.mark.parametrize("condition", [ONE, TWO])
def test_a_later_stage_keeps_the_winner_of_the_earlier_one_and_tries_nothing_else(
    tuned_lenet, condition
):
    settings, grid, _ = tuned_lenet
    tried = rows(grid, condition, "IG")
    assert [row["settings"] for row in tried[:2]] == [{"tv_weight": tv} for tv in TV]
    winner = best(tried[:2])
    assert [row["settings"] for row in tried[2:]] == [
        winner | {"learning_rate": rate} for rate in RATES
    ]
    assert settings[condition]["IG"] == best(tried[2:])


@pytest.mark.parametrize("condition", [ONE, TWO])
def test_an_arm_after_another_starts_from_that_ones_settings_of_the_same_condition(
    tuned_lenet, condition
):
    settings, grid, _ = tuned_lenet
    tried = [row["settings"] for row in rows(grid, condition, "GI-PIP")]
    assert tried == [settings[condition]["IG"] | {"as_weight": weight} for weight in AS]
    assert settings[condition]["IG"].keys() == {
        "tv_weight",
        "learning_rate",
    }  # the winner it came after is left as it was


def test_the_settings_are_each_conditions_and_arms_combination_of_highest_psnr(tuned_lenet):
    settings, grid, _ = tuned_lenet
    assert settings.keys() == {ONE, TWO}
    for condition, arm in itertools.product(settings, ("GI-PIP", "GI-PIP alone")):
        assert settings[condition][arm] == best(rows(grid, condition, arm))


def test_a_row_is_the_mean_over_all_scenarios_of_its_condition(tuned_lenet, prior):
    _, grid, _ = tuned_lenet
    assert len(grid) == 2 * (2 + 3 + 2 + 4)
    row = rows(grid, ONE, "GI-PIP alone")[1]
    attack = GIPIP(prior=prior, iterations=2, **row["settings"])
    results = [execute(Run("GI-PIP", scenario, attack)) for scenario in SCENARIOS[:2]]
    for metric in ("psnr", "ssim", "lpips"):
        mean = sum(result.metrics[metric].mean() for result in results) / 2
        assert row[metric] == pytest.approx(mean)


def test_what_no_stage_tries_stays_as_the_arms_attack_has_it(tuned_lenet):
    _, _, runs = tuned_lenet
    assert {run.attack.iterations for run in runs} == {2} and {run.scenario for run in runs} == set(
        SCENARIOS
    )
    assert {run.attack.learning_rate for run in runs if run.arm == "GI-PIP alone"} == {
        InvertingGradients().learning_rate
    }


def test_a_defended_condition_is_tuned_apart_from_the_undefended_one(tmp_path):
    scenarios = (
        SCENARIOS[0],
        SCENARIOS[0].model_copy(update={"defenses": (Sparsification(sparsity=0.9),)}),
    )
    arms = {"IG": Arm(InvertingGradients(iterations=2, masked=True), ({"tv_weight": TV},))}
    with Notes() as executor:
        settings, grid = tune(Study(scenarios, arms), store=tmp_path, executor=executor)
    assert list(settings) == [ONE, f"{ONE}/sparsity 0.9"]
    assert grid["psnr"].nunique() == 4


def test_private_images_are_refused_before_anything_is_computed():
    arms = {"IG": Arm(InvertingGradients(), ({"tv_weight": TV},))}
    message = "on tuning images only.*is on the private pool. Use pool='tuning'"
    with pytest.raises(DataError, match=message):
        tune(Study((*SCENARIOS, Scenario(model="lenet")), arms), store="not needed")


@pytest.mark.parametrize("stage", [{"tv_wieght": (0.1, 0.2)}, {"tv_weight": (0.1, -0.2)}])
def test_a_setting_that_the_attack_does_not_have_or_allow_is_refused(stage):
    with pytest.raises(ValueError, match=next(iter(stage))):
        tune(Study(SCENARIOS[:1], {"IG": Arm(InvertingGradients(), (stage,))}), store="not needed")


def test_tuning_images_are_never_private_ones():
    data = load_dataset("cifar10")
    pools = [
        {image.numpy().tobytes() for image in pool.pixels}
        for pool in (data.tuning_pool, data.private_pool, data.auxiliary_pool)
    ]
    assert all(not first & second for first, second in itertools.combinations(pools, 2))


def test_tuning_is_a_sweep_that_the_store_spares_the_second_time(prior, tmp_path):
    stages = ({"tv_weight": (1e-3,)}, {"as_weight": (0.5,)})
    small = Study(SCENARIOS[:1], {"GI-PIP": Arm(GIPIP(prior=prior, iterations=1), stages)})
    with Notes() as executor:
        settings, grid = tune(small, store=tmp_path, executor=executor)
        assert len(executor.runs) == 2
        again = tune(small, store=tmp_path, executor=executor)
        assert len(executor.runs) == 2
    assert settings == again[0] == {ONE: {"GI-PIP": {"tv_weight": 1e-3, "as_weight": 0.5}}}
    assert grid.equals(again[1])


# The file ----------------------------------------------------------------------

GRID = pandas.DataFrame(
    [
        {
            "condition": "c",
            "arm": "GI-PIP",
            "settings": {"tv_weight": 1e-6, "as_weight": 0.123456},
            "psnr": 12.345678,
        }
    ]
)


def test_what_is_written_holds_exact_settings_and_the_whole_grid(tmp_path):
    settings = {"c": {"GI-PIP": {"tv_weight": 1e-6, "as_weight": 0.123456}}}
    written = json.loads(
        write_tuned(
            tmp_path / "new" / "tuned.json", "mine", settings, GRID, {"by": "a test"}
        ).read_text()
    )
    assert written["settings"]["c"] == settings["c"]
    assert written["studies"]["mine"] == {
        "made": {"by": "a test"},
        "grid": [GRID.to_dict("records")[0] | {"psnr": 12.3457}],
    }


def test_a_study_is_added_to_what_ships_when_there_is_no_file(tmp_path):
    written = json.loads(
        write_tuned(
            tmp_path / "tuned.json", "mine", {"c": {"IG": {"tv_weight": 1}}}, GRID, {}
        ).read_text()
    )
    assert written == {
        "settings": SHIPPED["settings"] | {"c": {"IG": {"tv_weight": 1}}},
        "studies": SHIPPED["studies"]
        | {"mine": {"made": {}, "grid": written["studies"]["mine"]["grid"]}},
    }


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
    write_tuned(
        path, "mine", {"c": {"GI-PIP": {"as_weight": 3}}, "e": {"IG": {"tv_weight": 4}}}, GRID, {}
    )
    written = json.loads(path.read_text())
    expected = {
        "c": {"IG": {"tv_weight": 1}, "GI-PIP": {"as_weight": 3}},
        "d": before["d"],
        "e": {"IG": {"tv_weight": 4}},
    }
    assert written["settings"] == expected
    assert written["studies"]["other"] == other and len(written["studies"]["mine"]["grid"]) == 1


# The studies -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["main", "conditions", "defenses", "gan"])
def test_a_study_tunes_without_offset_on_tuning_images_that_can_be_drawn(name, studies):
    study = studies.study(name, iterations=7)
    assert {scenario.pool for scenario in study.scenarios} == {"tuning"}
    assert all(len(scenario.batch()) == scenario.batch_size for scenario in study.scenarios)
    attacks = [arm.attack for arm in study.arms.values()]
    assert {attack.prior.offset for attack in attacks if isinstance(attack, GIPIP)} == {0}
    assert {attack.iterations for attack in attacks} == {7}


@pytest.mark.parametrize("name", ["conditions", "variants", "defenses"])
def test_with_and_without_the_anomaly_score_differ_in_nothing_else(name, studies):
    arms = studies.study(name).arms
    without, ours = arms["InvertingGradients"], arms[EQUAL]
    assert ours.after == "InvertingGradients"
    assert [list(stage) for stage in ours.stages] == [["as_weight"]]
    shared = {name: getattr(ours.attack, name) for name in InvertingGradients.model_fields}
    assert shared == without.attack.model_dump()


def test_the_variants_differ_in_autoencoder_and_offset_and_start_from_the_same_total_variation(
    prior, studies
):
    arms = studies.study("variants").arms
    attacks = {name: arm.attack for name, arm in arms.items() if isinstance(arm.attack, GIPIP)}
    shapes = {"width6": (6, 3), "depth2": (12, 2), "depth4": (12, 4)}
    expected = dict.fromkeys([EQUAL, "anomaly score alone", *shapes], 0)
    expected |= dict.fromkeys(["c calibrated", "c calibrated, per batch"], prior.offset)
    expected |= {"c as released": 0.001}
    assert {name: attack.prior.offset for name, attack in attacks.items()} == expected
    for name, shape in shapes.items():
        autoencoder = attacks[name].prior.autoencoder
        assert autoencoder.arguments == dict(zip(("width", "depth"), shape, strict=True))
    first = [name for name, arm in arms.items() if arm.after is None]
    assert first == ["InvertingGradients", "anomaly score alone"]


def test_the_main_study_tries_the_same_total_variation_for_both_attacks(studies):
    study = studies.study("main")
    tried = {tuple(arm.stages[0]["tv_weight"]) for arm in study.arms.values()}
    assert tried == {studies.TV_WEIGHTS}


def test_the_settings_of_an_arm_are_those_of_the_run_they_were_tuned_with():
    scenario = Scenario(
        pool="tuning", model="lenet", seed=3, model_seed=4, mode="train", labels="withheld"
    )
    assert (
        scenario.condition
        == Run(
            "IG", scenario.model_copy(update={"pool": "private"}), InvertingGradients()
        ).scenario.condition
        == ONE
    )


# What ships --------------------------------------------------------------------

MAIN = SHIPPED["studies"]["main"]
CASES = {
    f"cifar10/{model}/B={size}": (model, size)
    for model in ("convnet", "resnet18")
    for size in (1, 4, 8)
}


@pytest.mark.parametrize("condition", CASES)
@pytest.mark.parametrize("attack", ["GIPIP", "InvertingGradients"])
def test_the_main_studys_shipped_settings_are_the_best_of_their_own_grid(condition, attack):
    tried = [row for row in MAIN["grid"] if (row["arm"], row["condition"]) == (attack, condition)]
    chosen = SHIPPED["settings"][condition][attack]
    at_choice = [row["psnr"] for row in tried if row["settings"] == chosen]
    assert at_choice == [max(row["psnr"] for row in tried)]


def test_the_main_studys_shipped_grid_holds_each_combination_of_the_study_once(studies):
    expected = []
    for name, tv in itertools.product(CASES, studies.TV_WEIGHTS):
        expected.append((name, "InvertingGradients", {"tv_weight": tv}))
        for weight in studies.AS_WEIGHTS:
            expected.append((name, "GIPIP", {"tv_weight": tv, "as_weight": weight}))
    tried = [(row["condition"], row["arm"], row["settings"]) for row in MAIN["grid"]]
    assert len(tried) == len(expected) and all(row in tried for row in expected)


def test_the_main_study_was_made_with_the_shipped_prior_on_the_stated_batches(prior, studies):
    assert MAIN["made"]["prior"] == prior.with_offset(0).fingerprint
    drawn = [(s.model, str(s.batch_size)) for s in studies.study("main").scenarios]
    for model, sizes in MAIN["made"]["batches"].items():
        assert sizes == {size: drawn.count((model, size)) for size in sizes}


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
