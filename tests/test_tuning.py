"""Tuning: the best point of a grid on tuning images, and the weights that ship."""

import itertools
import json
import math

import distributed
import pandas
import pytest

from gipip import experiments, tuning
from gipip.attacks import GIPIP, InvertingGradients
from gipip.data import Dataset, load_dataset
from gipip.errors import BatchSizeError, DataError
from gipip.experiments import ResultStore, execute
from gipip.files import DATA
from gipip.priors import load_prior
from gipip.tuning import tune, write_tuned

SHIPPED = json.loads((DATA / "tuned.json").read_text())
POINT = ["attack", "model", "batch_size", "tv_weight", "as_weight"]


@pytest.fixture(scope="module")
def prior():
    return load_prior()


@pytest.fixture(scope="module")
def tuned_lenet(prior, tmp_path_factory):
    """Settings, grid and the runs of a small grid, executed one after the other; drawing a private image is an error."""
    runs, store = [], ResultStore(tmp_path_factory.mktemp("store"))

    def sweep(asked, **options):
        assert options == {"store": "a folder", "workers": 1}
        runs.extend(asked)
        return experiments.Results(execute(run, store) for run in asked)

    def private(*arguments, **options):
        raise AssertionError("a private image was drawn")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "sweep", sweep)
        patch.setattr(Dataset, "private", private)
        settings, grid = tune(
            prior, batches={"lenet": {1: 2, 2: 1}}, iterations=4, tv_weights=(1e-5, 1e-2), as_weights=(0.1, 2.0),
            store="a folder", workers=1,
        )  # fmt: skip
    return settings, grid, runs


def test_the_settings_are_the_grids_points_of_highest_psnr(tuned_lenet):
    settings, grid, _ = tuned_lenet
    assert settings.keys() == {"cifar10"} and settings["cifar10"].keys() == {"lenet"} and settings["cifar10"]["lenet"].keys() == {"1", "2"}
    for size, attack in itertools.product((1, 2), ("GIPIP", "InvertingGradients")):
        part = grid[(grid["batch_size"] == size) & (grid["attack"] == attack)]
        best = max(part.to_dict("records"), key=lambda row: row["psnr"])
        chosen = settings["cifar10"]["lenet"][str(size)][attack]
        assert chosen == {name: best[name] for name in chosen}
        assert chosen.keys() == ({"tv_weight", "as_weight"} if attack == "GIPIP" else {"tv_weight"})


def test_every_point_of_the_grid_is_the_mean_over_its_batches(tuned_lenet):
    _, grid, runs = tuned_lenet
    assert len(grid) == 2 * (2 + 2 * 2) and len(runs) == 3 * (2 + 2 * 2)
    point = grid.iloc[0]
    results = [execute(run) for run in runs if run.arm == point["attack"] and run.attack.tv_weight == point["tv_weight"]]
    means = [result.metrics["psnr"].mean() for result in results if result.run.scenario.batch_size == point["batch_size"]]
    assert len(means) == 2 and point["psnr"] == pytest.approx(sum(means) / 2)


def test_both_attacks_get_the_same_tuning_images_and_weights_of_total_variation_and_no_offset(tuned_lenet):
    _, _, runs = tuned_lenet
    tried = {kind: {(run.scenario, run.attack.tv_weight) for run in runs if run.arm == kind} for kind in ("GIPIP", "InvertingGradients")}
    assert tried["GIPIP"] == tried["InvertingGradients"] and {run.scenario.pool for run in runs} == {"tuning"}
    assert {run.attack.prior.offset for run in runs if run.arm == "GIPIP"} == {0.0}
    assert {run.attack.iterations for run in runs} == {4}


def test_tuning_images_are_never_private_ones():
    data = load_dataset("cifar10")
    pools = [{image.numpy().tobytes() for image in pool.pixels} for pool in (data.tuning_pool, data.private_pool, data.auxiliary_pool)]
    assert all(not first & second for first, second in itertools.combinations(pools, 2))


def test_tuning_is_a_sweep_that_the_store_spares_the_second_time(prior, tmp_path, monkeypatch):
    options = {"batches": {"lenet": {1: 1}}, "iterations": 1, "tv_weights": (1e-3,), "as_weights": (0.5,), "store": tmp_path}
    with distributed.LocalCluster(1, threads_per_worker=1, processes=False, dashboard_address=":0") as cluster:
        first = tune(prior, **options, scheduler=cluster.scheduler_address)
    monkeypatch.setattr(distributed, "Client", None)
    again = tune(prior, **options)
    assert again[0] == first[0] and again[1].equals(first[1])


def test_what_is_written_holds_exact_weights_and_the_whole_grid(tmp_path):
    grid = pandas.DataFrame({"attack": ["GIPIP"], "tv_weight": [1e-6], "as_weight": [0.123456], "psnr": [12.345678]})
    settings = {"cifar10": {"convnet": {"1": {"GIPIP": {"tv_weight": 1e-6, "as_weight": 0.123456}}}}}
    written = json.loads(write_tuned(tmp_path / "new" / "tuned.json", settings, grid, {"by": "a test"}).read_text())
    assert written["settings"] == settings and written["made"] == {"by": "a test"}
    assert written["grid"] == [{"attack": "GIPIP", "tv_weight": 1e-6, "as_weight": 0.123456, "psnr": 12.3457}]


# What ships --------------------------------------------------------------------------------------------------------------------------

CASES = [(model, int(size)) for model, sizes in SHIPPED["settings"]["cifar10"].items() for size in sizes]


@pytest.mark.parametrize(("model", "size"), CASES)
@pytest.mark.parametrize("attack", ["GIPIP", "InvertingGradients"])
def test_the_shipped_weights_are_the_best_of_their_own_grid(model, size, attack):
    rows = [row for row in SHIPPED["grid"] if (row["attack"], row["model"], row["batch_size"]) == (attack, model, size)]
    chosen = SHIPPED["settings"]["cifar10"][model][str(size)][attack]
    at_choice = [row["psnr"] for row in rows if all(row[name] == value for name, value in chosen.items())]
    assert at_choice == [max(row["psnr"] for row in rows)]


def test_the_shipped_grid_tries_the_same_total_variation_for_both_attacks_and_holds_each_point_once():
    grid = pandas.DataFrame(SHIPPED["grid"])
    assert not grid.duplicated(POINT).any()
    for _, part in grid.groupby(["model", "batch_size"]):
        weights = {attack: set(rows["tv_weight"]) for attack, rows in part.groupby("attack")}
        assert weights["GIPIP"] == weights["InvertingGradients"] == set(tuning.TV_WEIGHTS)
        assert set(part[part["attack"] == "GIPIP"]["as_weight"]) == set(tuning.AS_WEIGHTS)


def test_the_shipped_weights_were_tuned_with_the_shipped_prior_on_the_stated_batches(prior):
    assert SHIPPED["made"]["prior"] == prior.with_offset(0).fingerprint
    batches = {model: {int(size): count for size, count in sizes.items()} for model, sizes in SHIPPED["made"]["batches"].items()}
    assert batches == tuning.BATCHES and set(CASES) == {(model, size) for model, sizes in batches.items() for size in sizes}


@pytest.mark.parametrize(("model", "size"), CASES)
def test_tuned_attacks_carry_the_shipped_weights(prior, model, size):
    settings = SHIPPED["settings"]["cifar10"][model][str(size)]
    ours, baseline = GIPIP.tuned("cifar10", size, prior=prior, model=model), InvertingGradients.tuned("cifar10", size, model=model)
    assert (ours.tv_weight, ours.as_weight) == (settings["GIPIP"]["tv_weight"], settings["GIPIP"]["as_weight"])
    assert baseline.tv_weight == settings["InvertingGradients"]["tv_weight"]
    assert ours.prior.offset == 0 and math.isclose(ours.learning_rate, baseline.learning_rate)


def test_single_settings_of_a_tuned_attack_can_be_changed(prior):
    attack = GIPIP.tuned("cifar10", 1, prior=prior, iterations=7, tv_weight=0.5)
    assert (attack.iterations, attack.tv_weight) == (7, 0.5)


def test_a_case_without_tuned_weights_is_an_error_that_says_which_there_are(prior):
    with pytest.raises(DataError, match="No tuned weights are shipped for 'cifar10' and 'lenet'. Run `gipip tune`"):
        InvertingGradients.tuned("cifar10", 1, model="lenet")
    with pytest.raises(DataError, match="'imagenet64' and 'convnet'"):
        GIPIP.tuned("imagenet64", 1, prior=prior)
    with pytest.raises(BatchSizeError, match="batch sizes 1, 4, 8, not for 3"):
        GIPIP.tuned("cifar10", 3, prior=prior)
