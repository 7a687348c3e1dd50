"""Scenarios and their keys, the store, single runs, and the tables of results."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pydantic
import pytest
import torch

import gipip
from gipip.attacks.dlg import DLG
from gipip.attacks.gias import GIAS
from gipip.attacks.gipip import GIPIP
from gipip.attacks.gradinversion import GradInversion
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.data.datasets import LabeledImages, load_dataset, named_tensors
from gipip.errors import DamagedFileError, DataError, ModelError, StoreError
from gipip.evaluation.statistics import paired_difference
from gipip.experiments import version
from gipip.experiments.arms import runs, with_and_without
from gipip.experiments.results import Results, quality_table
from gipip.experiments.scenario import Run, Scenario
from gipip.experiments.shipped import ShippedResults, ship
from gipip.experiments.store import Result, ResultStore
from gipip.experiments.sweep import execute, sweep
from gipip.federation import models
from gipip.federation.client import FedAvg
from gipip.federation.defenses import DPSGD, Clipping, GaussianNoise, Soteria, Sparsification
from gipip.files import read_tensors, write_tensors
from gipip.priors.autoencoder import AnomalyScore, Autoencoder, load_prior

LENET, SHORT = Scenario(model="lenet"), InvertingGradients(iterations=3)
DEFENSES = (
    DPSGD(max_norm=1, noise_multiplier=0.1),
    GaussianNoise(std=1e-3),
    Sparsification(sparsity=0.9),
    Clipping(max_norm=2),
)


class IsInterrupted(InvertingGradients):
    """An attack during which the user presses Ctrl-C, in its third iteration."""

    def project(self, view, variables):
        super().project(view, variables)
        if len(presses) == 2:
            raise KeyboardInterrupt
        presses.append("not yet")


presses: list[str] = []


@pytest.fixture(scope="module")
def prior():
    return load_prior()


@pytest.fixture
def trained_lenet(tmp_path, monkeypatch):
    """The state of a LeNet that "ships" as trained for 3 epochs; that of epoch 5 ships too."""
    states = {
        epochs: models.build_model("lenet", seed=100 + epochs).state_dict() for epochs in (3, 5)
    }
    tensors = {
        f"{epochs}/{name}": value
        for epochs, state in states.items()
        for name, value in state.items()
    }
    write_tensors(
        tmp_path / "client-cifar10-lenet.safetensors",
        tensors,
        {"num_classes": 10, "accuracy": {"3": 0.4, "5": 0.5}},
    )
    monkeypatch.setattr(models, "DATA", tmp_path)
    return states[3]


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "store")


@pytest.fixture(scope="module")
def result():
    return execute(Run("IG", LENET, SHORT))


def made_up(arm, psnr, *, attack=SHORT, about=(), **scenario):
    """A result with the given PSNR of each image, and nothing else of interest."""
    count = len(psnr)
    run = Run(arm, Scenario(batch_size=count, **scenario), attack)
    metrics = pandas.DataFrame(
        {"image": range(count), "matched": range(count), "psnr": psnr, "ssim": 0.5, "lpips": 0.1}
    )
    assumptions = {
        "labels": "given",
        "BatchNorm": "eval mode",
        "local training": "none (FedSGD)",
        "defence": "none",
    }
    assumptions |= {"auxiliary data": "none"} | dict(about)
    details = {
        "assumptions": assumptions,
        "returned": "last iterate",
        "seconds": 1.5,
        "made": {"machine": "a CPU", "code": "0123456789ab"},
    }
    images, labels = torch.rand(count, 3, 8, 8), torch.arange(count)
    return Result(run, images, images, labels, {"cost": torch.ones(4)}, metrics, details)


def same(a, b):
    """Whether two results are the same bit for bit, but for how long they took."""
    tensors = [[r.images, r.truth, r.labels, *r.history.values()] for r in (a, b)]
    details = [
        {name: value for name, value in r.details.items() if name != "seconds"} for r in (a, b)
    ]
    equal = all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(*tensors, strict=True))
    return (
        equal
        and list(a.history) == list(b.history)
        and details[0] == details[1]
        and a.metrics.equals(b.metrics)
    )


# Scenario and Run --------------------------------------------------------------


def test_scenarios_and_runs_are_frozen_and_refuse_unknown_fields():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        LENET.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Run("IG", LENET, SHORT).arm = "other"
    with pytest.raises(pydantic.ValidationError, match="batchsize"):
        Scenario(batchsize=4)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"pool": "auxiliary"},
        {"mode": "training"},
        {"labels": "stolen"},
        {"statistics": "given"},
        {"epochs": -1},
        {"fedavg": {"steps": 0}},
        {"fedavg": {"epochs": 1}},
        {"defenses": ["noise"]},
        {"defenses": [{"kind": "clipping"}]},
    ],
)
def test_a_scenario_out_of_range_is_refused_at_once(wrong):
    with pytest.raises(pydantic.ValidationError):
        Scenario(**wrong)


def test_a_scenario_survives_json():
    scenario = Scenario(
        pool="tuning",
        model="resnet18",
        batch_size=4,
        seed=7,
        mode="train",
        labels="withheld",
        distinct_labels=False,
    )
    assert Scenario.model_validate_json(scenario.model_dump_json()) == scenario


def test_a_scenario_with_classes_epochs_local_training_and_defences_survives_json():
    fedavg = FedAvg(steps=4, batch_size=2, learning_rate=0.1)
    scenario = Scenario(
        classes=(3, 5),
        epochs=40,
        statistics="shared",
        fedavg=fedavg,
        defenses=(*DEFENSES, Soteria(pruned=0.5)),
    )
    again = Scenario.model_validate_json(scenario.model_dump_json())
    assert again == scenario and hash(again) == hash(scenario)
    assert again.fedavg == fedavg and [type(defense) for defense in again.defenses] == [
        DPSGD,
        *map(type, DEFENSES[1:]),
        Soteria,
    ]
    config = json.loads(json.dumps(Run("IG", scenario, SHORT).config()))["scenario"]
    assert Scenario(**config) == scenario


@pytest.mark.parametrize(
    ("scenario", "condition"),
    [
        ({}, "cifar10/convnet/B=1"),
        ({"model": "convnet16", "epochs": 40, "batch_size": 4}, "cifar10/convnet16@40/B=4"),
        ({"fedavg": FedAvg(steps=5)}, "cifar10/convnet/B=1/FedAvg 5"),
        ({"defenses": DEFENSES[1:3]}, "cifar10/convnet/B=1/noise 0.001/sparsity 0.9"),
        (
            {"epochs": 3, "fedavg": FedAvg(steps=2), "defenses": (Soteria(pruned=0.5),)},
            "cifar10/convnet@3/B=1/FedAvg 2/Soteria 50 %",
        ),
        (
            {"defenses": (DPSGD(max_norm=1, noise_multiplier=0.1, seed=7),)},
            "cifar10/convnet/B=1/DP-SGD C=1 σ=0.1",
        ),
    ],
)
def test_a_condition_names_data_set_model_epochs_batch_size_local_training_and_defences(
    scenario, condition
):
    assert Scenario(**scenario).condition == condition


def test_a_condition_does_not_tell_images_seeds_or_labels_apart():
    others = [
        {"pool": "tuning"},
        {"seed": 3},
        {"model_seed": 3},
        {"labels": "withheld"},
        {"distinct_labels": False},
        {"classes": (1, 2)},
    ]
    assert {Scenario(**other).condition for other in others} == {Scenario().condition}


def test_a_scenario_draws_its_classes_only():
    batches = [
        Scenario(classes=(9, 1), batch_size=2, seed=seed, pool=pool).batch()
        for seed in range(5)
        for pool in ("private", "tuning")
    ]
    assert all(sorted(batch.labels.tolist()) == [1, 9] for batch in batches)
    data = load_dataset("cifar10")
    assert (
        batches[0].indices.tolist()
        == data.restricted((1, 9)).private(batch_size=2).indices.tolist()
    )


def test_a_reconstruction_is_sought_among_all_images_of_the_scenarios_pool_and_classes():
    data = load_dataset("cifar10")
    for pool in ("private", "tuning"):
        whole = getattr(data, f"{pool}_pool").indices
        assert set(Scenario(pool=pool).candidates().indices.tolist()) == set(whole.tolist())
    some = Scenario(classes=(9, 1)).candidates()
    assert set(some.labels.tolist()) == {1, 9} and 50 <= len(some) <= 52


def test_a_reconstruction_is_sought_among_a_thousand_images_of_a_large_pool_and_its_batch(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path))
    labels = torch.arange(1_200) // 120
    pixels = torch.arange(1_200).remainder(256).to(torch.uint8).view(-1, 1, 1, 1)
    pool = LabeledImages(pixels.expand(-1, 3, 64, 64).contiguous(), labels)
    tensors = named_tensors(tuning=pool[[0, 1]], private=pool)
    write_tensors(tmp_path / "imagenet64-many.safetensors", tensors, {})
    for seed in range(5):
        scenario = Scenario(dataset="imagenet64-many", batch_size=10, seed=seed)
        found, own = scenario.candidates().indices.tolist(), scenario.batch().indices.tolist()
        assert 1_000 <= len(found) <= 1_010 and set(own) <= set(found)
        assert len(found) == len(set(found))
    assert scenario.candidates().labels[:1_000].bincount().tolist() == [100] * 10


def test_a_scenario_of_a_trained_client_has_the_weights_of_that_epoch(trained_lenet):
    model = Scenario(model="lenet", epochs=3, model_seed=7).client_model()
    assert all(
        torch.equal(value, trained_lenet[name]) for name, value in model.state_dict().items()
    )


def test_what_a_scenario_shares_is_what_it_says():
    scenario = Scenario(
        model="lenet",
        batch_size=2,
        labels="withheld",
        fedavg=FedAvg(steps=3),
        defenses=DEFENSES[1:],
    )
    update = scenario.update(scenario.client_model())
    assert (update.labels, update.statistics, update.fedavg) == (None, None, FedAvg(steps=3))
    assert update.defenses == ("noise 0.001", "sparsity 0.9", "clip 2")
    assert sum(float(gradient.square().sum()) for gradient in update.gradients) <= 4 * (1 + 1e-5)
    with_statistics = Scenario(statistics="shared")
    assert (
        len(with_statistics.update(with_statistics.client_model()).statistics) == 6
    )  # the ConvNet's BatchNorm layers


def test_a_runs_configuration_is_json_that_rebuilds_scenario_and_attack():
    run = Run("any name", LENET, InvertingGradients(tv_weight=0.1, seed=3))
    config = json.loads(json.dumps(run.config()))
    assert Scenario(**config["scenario"]) == run.scenario
    assert (
        config["attack"].pop("name") == "InvertingGradients"
        and InvertingGradients(**config["attack"]) == run.attack
    )


def test_a_scenario_gives_the_pools_images_and_the_seeds_weights():
    batches = {
        pool: Scenario(pool=pool, seed=2).batch().fingerprint for pool in ("private", "tuning")
    }
    data = load_dataset("cifar10")
    assert batches == {
        "private": data.private(seed=2).fingerprint,
        "tuning": data.tuning(seed=2).fingerprint,
    }
    first, again, other = (
        Scenario(model="lenet", model_seed=seed).client_model().state_dict() for seed in (0, 0, 1)
    )
    name = "network.0.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


# Keys --------------------------------------------------------------------------


def test_equal_content_has_one_key_whatever_the_arms_name(prior):
    runs = [Run(arm, Scenario(), GIPIP(prior=prior.with_offset(0))) for arm in ("GI-PIP", "ours")]
    runs.append(
        Run(
            "in full",
            Scenario(dataset="cifar10", seed=0),
            GIPIP(prior=load_prior().with_offset(0), as_weight=0.2, restarts=1),
        )
    )
    assert len({run.key() for run in runs}) == 1


def test_every_field_of_the_scenario_changes_the_key(trained_lenet):
    changes = [
        {},
        {"pool": "tuning"},
        {"model": "convnet"},
        {"model_seed": 1},
        {"batch_size": 2},
        {"seed": 1},
        {"classes": (1, 2)},
    ]
    changes += [
        {"distinct_labels": False},
        {"mode": "train"},
        {"labels": "withheld"},
        {"statistics": "shared"},
        {"epochs": 3},
    ]
    changes += [
        {"fedavg": FedAvg(**about)}
        for about in ({}, {"steps": 2}, {"batch_size": 1}, {"learning_rate": 0.1})
    ]
    changes += [
        {"defenses": defenses}
        for defenses in (DEFENSES[1:3], DEFENSES[2:0:-1], *zip(DEFENSES, strict=True))
    ]
    changes += [
        {"defenses": (GaussianNoise(std=1e-3, seed=1),)},
        {"defenses": (GaussianNoise(std=1e-2),)},
        {"epochs": 5},
    ]
    assert {name for change in changes for name in change} | {"dataset"} == set(
        Scenario.model_fields
    )
    assert len(
        {Run("IG", Scenario(**{"model": "lenet"} | change), SHORT).key() for change in changes}
    ) == len(changes)


def test_every_field_of_the_attack_changes_the_key(prior):
    other = {
        "iterations": 7,
        "restarts": 2,
        "seed": 1,
        "returns": "lowest_cost",
        "tv_weight": 0.5,
        "learning_rate": 0.2,
    }
    other |= {
        "schedule": "steps",
        "signed": False,
        "masked": True,
        "prior": prior.with_offset(0.5),
        "as_weight": 0.7,
        "score_per": "batch",
    }
    assert other.keys() == GIPIP.model_fields.keys()
    attacks = [
        GIPIP(prior=prior),
        *(GIPIP(**{"prior": prior, name: value}) for name, value in other.items()),
    ]
    attacks += [InvertingGradients(), DLG()]
    assert len({Run("an arm", LENET, attack).key() for attack in attacks}) == len(attacks)


def test_the_priors_weights_and_offset_change_the_key_and_its_provenance_does_not():
    torch.manual_seed(0)
    score = AnomalyScore(Autoencoder(), 0.1, {"images": 10})
    priors = [
        score,
        AnomalyScore(score.autoencoder, 0.1, {"images": 99}),
        score.with_offset(0.2),
        AnomalyScore(Autoencoder(), 0.1),
    ]
    keys = [Run("GI-PIP", LENET, GIPIP(prior=each)).key() for each in priors]
    assert keys[0] == keys[1] and len(set(keys)) == 3


_KEYS = """import sys
from pathlib import Path
from gipip import GIPIP, InvertingGradients, Run, Scenario, load_prior
from gipip.federation import models
print(Run("c", Scenario(model="lenet"), InvertingGradients(iterations=3)).key())
withheld = Scenario(batch_size=2, labels="withheld")
print(Run("d", withheld, GIPIP(prior=load_prior(), as_weight=0.1)).key())
models.DATA = Path(sys.argv[1])
print(Run("e", Scenario(model="lenet", epochs=3), InvertingGradients(iterations=3)).key())
"""


def test_keys_are_the_same_in_another_process_but_for_a_trained_client_of_other_weights(
    prior, trained_lenet
):
    withheld = Scenario(batch_size=2, labels="withheld")
    runs = [Run("a", LENET, SHORT), Run("b", withheld, GIPIP(prior=prior, as_weight=0.1))]
    trained = Run("IG", Scenario(model="lenet", epochs=3), SHORT).key()
    tensors, about = read_tensors(models.DATA / "client-cifar10-lenet.safetensors")
    tensors["3/network.0.weight"] = tensors["3/network.0.weight"] + 1
    write_tensors(models.DATA / "client-cifar10-lenet.safetensors", tensors, about)
    command = [sys.executable, "-c", _KEYS, str(models.DATA)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    *same_ones, other = process.stdout.split()
    assert same_ones == [run.key() for run in runs] and other != trained


def versions(package):
    """The versions of the code of three attacks in a copy of gipip."""
    file = package / "experiments" / "version.py"
    spec = importlib.util.spec_from_file_location("version_of_a_copy", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {attack.name: module.code_version(attack) for attack in (InvertingGradients, GIAS, DLG)}


@pytest.fixture
def package(tmp_path):
    return Path(shutil.copytree(Path(gipip.__file__).parent, tmp_path / "gipip"))


THIS_VERSION = {
    attack.name: version.code_version(attack) for attack in (InvertingGradients, GIAS, DLG)
}


def changed(package):
    """The attacks whose version is another one in the copy."""
    return {attack for attack, found in versions(package).items() if found != THIS_VERSION[attack]}


def test_comments_docstrings_and_where_the_package_lies_change_no_version(package):
    assert len(set(THIS_VERSION.values())) == 3
    for name in ("attacks/loop.py", "attacks/gias.py", "federation/client.py"):
        file = package / name
        file.write_text(file.read_text().replace('"""', '"""In other words: ', 1) + "# a remark\n")
    assert changed(package) == set()


@pytest.mark.parametrize(
    ("name", "attacks"),
    [
        ("attacks/gias.py", {"gias"}),
        ("priors/gan.py", {"gias"}),
        ("attacks/inverting_gradients.py", {"ig", "gias"}),
        ("attacks/loop.py", {"ig", "gias", "dlg"}),
        ("attacks/base.py", {"ig", "gias", "dlg"}),
        ("attacks/engines/__init__.py", {"ig", "gias", "dlg"}),
        ("attacks/engines/products.py", {"ig", "gias", "dlg"}),
        ("federation/defenses.py", {"ig", "gias", "dlg"}),
        ("evaluation/metrics.py", {"ig", "gias", "dlg"}),
        ("experiments/scenario.py", {"ig", "gias", "dlg"}),
        ("attacks/__init__.py", set()),
        ("attacks/a_new_one.py", set()),
        ("federation/training.py", set()),
        ("experiments/sweep.py", set()),
        ("figures.py", set()),
    ],
)
def test_a_statement_changes_the_versions_of_the_attacks_that_depend_on_it(package, name, attacks):
    with (package / name).open("a") as file:
        file.write("\nNEW = 1\n")
    assert changed(package) == attacks


def test_a_result_of_other_code_is_not_reused(store, result):
    store.save(result)
    path = store.path(result.run)
    assert result.run.key(code="other") != result.run.key() == path.stem
    path.rename(path.with_stem(result.run.key(code="other")))
    assert store.load(result.run) is None


def darkening(factor):
    """An attack that is not gipip's, as it is while its author tries out factors."""
    source = f"""def project(self, view, variables):
        InvertingGradients.project(self, view, variables)
        variables["images"].data.mul_({factor})"""
    methods = {}
    exec(source, {"InvertingGradients": InvertingGradients, "__name__": __name__}, methods)
    return type("Darkening", (InvertingGradients,), {"__module__": __name__, **methods})


def test_a_result_of_an_own_attack_is_not_reused_when_its_methods_have_changed():
    keys = [Run("own", LENET, darkening(factor)()).key() for factor in (0.5, 0.5, 0.9)]
    assert keys[0] == keys[1] != keys[2]
    shipped = [Run("own", LENET, darkening(factor)()).key(code="") for factor in (0.5, 0.9)]
    assert shipped[0] == shipped[1]


_OWN = """{lines}import sys, gipip
from gipip.experiments.pool import Processes
class Own(gipip.InvertingGradients):
    def project(self, view, variables):
        if self.schedule in {{"steps", "cosine", "constant"}}:
            return [(lambda text: text + "!")(text) for text in ("a", "b")]
run = gipip.Run("own", gipip.Scenario(model="lenet"), Own())
if sys.argv[1:]:
    with Processes(1) as pool:
        print(pool.submit(run.key).result())
else:
    print(run.key())
"""


def test_an_own_attacks_key_is_the_same_in_a_worker_and_another_day():
    def key(code, *arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    here = key(_OWN.format(lines=""))
    assert here == key(_OWN.format(lines=""), "in a worker") == key(_OWN.format(lines="\n\n"))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [("scenario", {"model": "nope", "x": 1}), ("scenario", "lenet"), ("attack", "IG"), ("arm", 3)],
)
def test_a_run_of_something_else_is_refused_and_the_field_is_named(field, wrong):
    about = {"arm": "IG", "scenario": LENET, "attack": SHORT} | {field: wrong}
    with pytest.raises(pydantic.ValidationError, match=field):
        Run(**about)


# The store ---------------------------------------------------------------------


def test_a_result_comes_back_from_the_store_bit_for_bit(store, result):
    store.save(result)
    loaded = store.load(result.run)
    assert same(loaded, result) and loaded.details == result.details
    assert loaded.frame().equals(result.frame())


def test_a_run_that_was_not_executed_has_no_result(store):
    assert store.load(Run("IG", LENET, SHORT)) is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def alter(path):
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def replace_by_another_runs(path):
    store = ResultStore(path.parent / "other")
    other = execute(Run("IG", Scenario(model="lenet", seed=1), SHORT), store)
    path.write_bytes(store.path(other.run).read_bytes())


def replace_by_weights(path):
    write_tensors(path, {"layer.weight": torch.ones(2)}, {"what": "no result"})


@pytest.mark.parametrize("damage", [cut, alter, replace_by_another_runs, replace_by_weights])
def test_a_damaged_result_is_reported_set_aside_and_computed_again(store, result, damage):
    store.save(result)
    path = store.path(result.run)
    damage(path)
    damaged = path.read_bytes()
    with pytest.warns(
        UserWarning, match=f"{path.name}.*set aside as {path.stem}.damaged-.*computed again"
    ):
        assert store.load(result.run) is None
    assert not path.exists() and [
        aside.read_bytes() for aside in store.folder.glob("*.damaged-*")
    ] == [damaged]
    assert same(execute(result.run, store), result)
    assert same(store.load(result.run), result)


def test_temporary_files_of_a_crashed_writer_are_never_read(store, result):
    path = store.path(result.run)
    store.save(result)
    path.rename(path.with_name(f".{path.name}.abc123.tmp"))
    assert store.load(result.run) is None
    assert not list(store.folder.glob("*.damaged-*"))


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_computed(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match="cannot be written.*Give a folder you may write to"):
            sweep([Run("IG", LENET, SHORT)], store=folder)


def test_a_disk_that_is_full_when_the_result_is_saved_is_a_store_error(store, result, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        store.save(result)
    assert not list(store.folder.iterdir())


def test_making_a_store_leaves_nothing_in_the_folder(store):
    assert not list(store.folder.iterdir())


# A single run ------------------------------------------------------------------


def test_a_result_holds_images_aligned_to_the_truth_metrics_history_and_provenance(result):
    assert result.images.shape == result.truth.shape == (1, 3, 32, 32)
    assert torch.equal(result.truth, LENET.batch().images) and torch.equal(
        result.labels, LENET.batch().labels
    )
    assert {name: len(values) for name, values in result.history.items()} == {
        "gradient matching": 4,
        "total variation": 4,
    }
    metrics = {"psnr", "ssim", "ssim_padded", "lpips", "identified", "feature_mse"}
    assert metrics <= set(result.metrics)
    assert result.metrics["candidates"].tolist() == [256]
    assert result.details["made"]["versions"]["torch"] == torch.__version__


def test_reconstructions_are_aligned_to_the_images_they_are_matched_with():
    result = execute(
        Run("IG", Scenario(model="lenet", batch_size=4), InvertingGradients(iterations=60))
    )
    mse = (result.images - result.truth).square().mean((1, 2, 3))
    np.testing.assert_allclose(result.metrics["psnr"], -10 * mse.log10(), rtol=1e-4)


def test_the_same_run_gives_the_same_bits_again_and_whatever_the_number_of_threads(prior):
    run = Run("GI-PIP", Scenario(batch_size=2), GIPIP(prior=prior, iterations=2))
    first = execute(run)
    torch.set_num_threads(2)
    try:
        torch.rand(3)  # nor does the global generator matter
        assert same(execute(run), first)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_a_stored_result_is_loaded_and_not_computed(store, result, monkeypatch):
    store.save(result)
    monkeypatch.setattr(InvertingGradients, "__call__", None)
    assert same(execute(result.run, store), result)


@pytest.fixture
def shipped(result, store, tmp_path):
    """The folder of a result that ships, computed by other code."""
    result.details["made"]["code"] = "other code"
    store.save(result)
    ship([store.path(result.run)], tmp_path / "study" / "02.safetensors")
    store.path(result.run).unlink()
    return tmp_path / "study"


def test_a_sweep_computes_what_does_not_ship_and_says_what_other_code_computed(
    shipped, result, store
):
    other = Run("other", LENET.model_copy(update={"seed": 7}), SHORT)
    found = sweep([other, result.run], store=store, shipped=ShippedResults(shipped))
    assert found[1].run == result.run and not store.path(result.run).exists()
    assert store.path(other).exists() and found[0].details["made"]["code"] != "other code"
    assert found[1].frame()["code"].tolist() == ["other code"]


def test_what_ships_is_what_was_computed_but_for_images_of_8_bits(shipped, result):
    found = ShippedResults(shipped).load(result.run)
    assert (found.images - result.images).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(found.truth, result.truth) and torch.equal(found.labels, result.labels)
    assert found.metrics.equals(result.metrics)
    assert ShippedResults(shipped).seconds == result.details["seconds"]


def test_a_damaged_file_of_shipped_results_is_an_error(shipped):
    (shipped / "02.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DamagedFileError, match="no readable safetensors file"):
        ShippedResults(shipped)


def test_results_of_several_versions_of_the_code_or_none_at_all_do_not_ship(
    result, store, tmp_path
):
    paths = []
    for seed, code in enumerate(("one", "another")):
        run = Run("IG", LENET.model_copy(update={"seed": seed}), SHORT)
        made = result.details["made"] | {"code": code}
        store.save(dataclasses.replace(result, run=run, details=result.details | {"made": made}))
        paths.append(store.path(run))
    with pytest.raises(DataError, match="InvertingGradients by other code. Compute all"):
        ship(paths, tmp_path / "02.safetensors")
    with pytest.raises(DataError, match="no such results"):
        ship([], tmp_path / "02.safetensors")
    assert not (tmp_path / "02.safetensors").exists()


def test_the_headlines_results_ship():
    priors = [load_prior("imagenet64").with_offset(0)]
    pair = with_and_without("imagenet64/resnet18/B=1", priors, iterations=1000)
    scenarios = [Scenario(dataset="imagenet64", model="resnet18", seed=seed) for seed in range(8)]
    there = ShippedResults()
    assert all(there.load(run) for run in runs(scenarios, pair, reseed=False))


def test_an_interrupted_attack_stores_nothing_passes_the_interrupt_on_and_restores_the_threads(
    store,
):
    presses.clear()
    run = Run("IG", LENET, IsInterrupted(iterations=10))
    torch.set_num_threads(2)
    try:
        with pytest.raises(KeyboardInterrupt):
            execute(run, store)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert len(presses) == 2 and not list(store.folder.iterdir())


def test_a_defended_locally_trained_scenario_is_attacked_as_such_and_comes_back_from_the_store(
    store,
):
    scenario = Scenario(
        model="lenet", batch_size=2, fedavg=FedAvg(steps=2, batch_size=1), defenses=DEFENSES[1:3]
    )
    result = execute(Run("IG", scenario, SHORT), store)
    assert same(store.load(result.run), result)
    plain = execute(Run("IG", Scenario(model="lenet", batch_size=2), SHORT))
    assert torch.equal(result.truth, plain.truth) and not torch.equal(result.images, plain.images)
    row = Results([store.load(result.run)]).frame().iloc[0]
    assert (
        row["local training"].startswith("2 steps")
        and row["defence"] == "noise 0.001, then sparsity 0.9"
    )
    assert plain.frame().iloc[0][["local training", "defence"]].tolist() == [
        "none (FedSGD)",
        "none",
    ]


def test_shared_statistics_reach_the_attack_that_needs_them():
    scenario = Scenario(model="convnet16", statistics="shared")
    result = execute(Run("GradInversion", scenario, GradInversion(iterations=1)))
    assert (
        "BatchNorm statistics" in result.history
        and "an extra assumption" in result.frame()["BatchNorm"][0]
    )


def test_an_epoch_that_does_not_ship_is_an_error_that_says_which_do(trained_lenet):
    with pytest.raises(
        ModelError, match=r"no 'lenet' trained for 4 epochs on 'cifar10' .*\[3, 5\]"
    ):
        Scenario(model="lenet", epochs=4).client_model()


# Results -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    aware = {"auxiliary data": "1900 images"}
    return Results(
        [made_up("IG", [10.0 + seed], seed=seed) for seed in range(3)]
        + [
            made_up("GI-PIP", [12.0 + 2 * seed], seed=seed, about=aware.items())
            for seed in range(4)
        ]
        + [made_up("IG", [20.0, 22.0]), made_up("GI-PIP", [19.0, 25.0], about=aware.items())]
    )


def test_results_are_a_sequence_and_a_slice_of_them_are_results(results):
    assert (
        len(results) == 9
        and results[-1].run.arm == "GI-PIP"
        and [r.run.scenario.seed for r in results[:3]] == [0, 1, 2]
    )
    assert isinstance(results[:3], Results)


def test_select_takes_arms_and_scenario_fields(results):
    assert [r.run.scenario.seed for r in results.select(arm="GI-PIP", batch_size=1)] == [0, 1, 2, 3]
    assert len(results.select(seed=0)) == 4 and len(results.select(model="resnet18")) == 0
    with pytest.raises(AttributeError, match="batchsize"):
        results.select(batchsize=1)


def test_images_and_truth_are_those_of_all_results_in_order(results):
    assert results.images.shape == results.truth.shape == (11, 3, 8, 8)
    assert torch.equal(results.images[3], results[3].images[0])


def test_the_frame_has_a_row_an_image_with_arm_scenario_and_assumptions(results):
    frame = results.frame()
    assert len(frame) == 11 and list(frame["psnr"][:3]) == [10, 11, 12]
    assert frame.groupby("arm")["auxiliary data"].unique().map(list).to_dict() == {
        "IG": ["none"],
        "GI-PIP": ["1900 images"],
    }
    expected = {
        "batch_size": 2,
        "seed": 0,
        "model_seed": 0,
        "image": 1,
        "labels": "given",
        "BatchNorm": "eval mode",
        "machine": "a CPU",
    }
    assert expected.items() <= frame.iloc[-1].to_dict().items()


def test_the_frame_has_a_column_for_every_field_of_the_scenario_or_its_assumption():
    frame = made_up("IG", [1.0, 2.0], classes=(3, 5), epochs=40, mode="train").frame()
    told = {"statistics": "BatchNorm", "fedavg": "local training", "defenses": "defence"}
    assert {told.get(name, name) for name in Scenario.model_fields} <= set(frame.columns)
    assert (
        list(frame["classes"]) == [(3, 5)] * 2
        and set(frame["epochs"]) == {40}
        and set(frame["mode"]) == {"train"}
    )


def test_batches_of_other_classes_are_other_batches():
    frames = [
        made_up("IG", [1.0], **about).frame()
        for about in ({}, {"classes": (3,)}, {"classes": (5,)}, {"distinct_labels": False})
    ]
    assert pandas.concat(frames)["batch"].nunique() == 4


def test_the_table_has_a_row_an_arm_and_setting_with_intervals_and_assumptions(results):
    table = quality_table(results.frame(), ["psnr"])
    assert list(zip(table["attack"], table["batch size"], table["images"], strict=True)) == [
        ("IG", 1, 3),
        ("GI-PIP", 1, 4),
        ("IG", 2, 2),
        ("GI-PIP", 2, 2),
    ]
    assert (
        table["psnr"][0].startswith("11.000 [") and table["psnr"][2] == "21.000 (no interval)"
    )  # of one batch
    assert list(table["auxiliary data"]) == ["none", "1900 images"] * 2 and set(
        table["labels"]
    ) == {"given"}


def test_the_table_does_not_average_over_different_assumptions():
    parts = [
        made_up("IG", [10.0]),
        made_up("IG", [30.0], mode="train", about={"BatchNorm": "train mode"}.items()),
    ]
    table = quality_table(Results(parts).frame(), ["psnr"])
    assert list(table["BatchNorm"]) == ["eval mode", "train mode"] and table["psnr"][1].startswith(
        "30.000"
    )


def test_the_table_does_not_average_over_untrained_and_trained_clients():
    results = Results(
        made_up("IG", [psnr], model="convnet16", epochs=epochs)
        for epochs, psnr in {0: 30.0, 40: 20.0}.items()
    )
    table = quality_table(results.frame(), ["psnr"])
    assert list(table["model"]) == ["convnet16", "convnet16@40"]
    assert [text.split()[0] for text in table["psnr"]] == ["30.000", "20.000"]


def test_the_table_shows_the_share_identified_among_how_many_and_nothing_where_not_measured():
    parts = [made_up("IG", [10.0, 11.0], seed=seed) for seed in range(2)]
    for part, found in zip(parts, ([0.0, 1.0], [0.0, 0.0]), strict=True):
        part.metrics["identified"], part.metrics["candidates"] = found, 256
    earlier = made_up("earlier", [10.0, 11.0])
    table = quality_table(Results([*parts, earlier]).frame())
    assert table["identified"][0].startswith("0.250 [") and table["candidates"][0] == 256
    assert table.loc[1, ["identified", "candidates"]].isna().all()
    assert "ssim_padded" not in table and table["lpips"].notna().all()


def test_an_effect_is_the_mean_difference_over_the_images_both_arms_attacked(results):
    effect = results.effect("GI-PIP", "IG", batch_size=1)  # seed 3 was attacked by one arm only
    assert (effect.mean, effect.count) == (3.0, 3)  # 12 − 10, 14 − 11, 16 − 12
    assert effect == paired_difference([12, 14, 16], [10, 11, 12])


def test_an_effect_counts_batches_and_pairs_images_within_them(results):
    effect = results.effect("GI-PIP", "IG")
    assert effect.mean == pytest.approx((2 + 3 + 4 - 1 + 3) / 5) and effect.count == 4
    assert results.effect("IG", "GI-PIP").mean == pytest.approx(-effect.mean)
    assert results.effect("GI-PIP", "IG", "ssim").mean == 0


def test_an_effect_pairs_images_in_whatever_order_they_were_attacked():
    psnr = {
        ("ours", 0): [20.0, 22.0],
        ("ours", 1): [30.0, 31.0],
        ("theirs", 1): [27.0, 30.0],
        ("theirs", 0): [19.0, 19.0],
        ("theirs", 2): [5.0, 5.0],  # attacked by one arm only
    }
    results = Results(made_up(arm, values, seed=seed) for (arm, seed), values in psnr.items())
    effect = results.effect("ours", "theirs")
    assert effect == paired_difference([20, 22, 30, 31], [19, 19, 27, 30], groups=[0, 0, 1, 1])
    assert results.effect("theirs", "ours").mean == -2


def test_an_effect_of_real_attacks_is_that_of_their_images_on_the_same_private_ones():
    scenarios = [Scenario(model="convnet16", batch_size=2, mode=mode) for mode in ("eval", "train")]
    results = Results(execute(Run(scenario.mode, scenario, SHORT)) for scenario in scenarios)
    assert torch.equal(results[0].truth, results[1].truth)
    psnr = [
        -10 * (result.images - result.truth).square().mean((1, 2, 3)).log10() for result in results
    ]
    expected = (psnr[0] - psnr[1]).mean().item()
    assert results.effect("eval", "train").mean == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"classes": (3,)},
        {"model_seed": 1},
        {"pool": "tuning"},
        {"distinct_labels": False},
    ],
)
def test_an_effect_on_other_images_or_weights_is_refused(other):
    results = Results([made_up("IG", [10.0]), made_up("GI-PIP", [12.0], **other)])
    with pytest.raises(DataError, match="share no image. Give both the same batches"):
        results.effect("GI-PIP", "IG")


def test_an_effect_pairs_the_same_client_weights():
    psnr = {("IG", 0): 10.0, ("IG", 1): 20.0, ("GI-PIP", 0): 11.0, ("GI-PIP", 1): 23.0}
    results = Results(made_up(arm, [value], model_seed=seed) for (arm, seed), value in psnr.items())
    assert results.effect("GI-PIP", "IG").mean == 2
    assert results.effect("GI-PIP", "IG", model_seed=1).mean == 3


def test_an_effect_of_nothing_shared_is_an_error(results):
    apart = Results([made_up("IG", [10.0], seed=0), made_up("GI-PIP", [12.0], seed=1)])
    with pytest.raises(DataError, match="'GI-PIP'.* and .*'IG'.* share no image"):
        apart.effect("GI-PIP", "IG")
    with pytest.raises(DataError, match="nothing to compare.*'DLG'"):
        results.effect("DLG", "IG")
    with pytest.raises(DataError, match="nothing to compare.*resnet18"):
        results.effect("GI-PIP", "IG", model="resnet18")


def test_an_effect_with_several_results_for_one_image_is_an_error_until_one_is_selected():
    results = Results(
        made_up(arm, [10.0], mode=mode) for arm in ("IG", "GI-PIP") for mode in ("eval", "train")
    )
    with pytest.raises(DataError, match="several results for one image"):
        results.effect("GI-PIP", "IG")
    assert results.effect("GI-PIP", "IG", mode="train").mean == 0


def test_a_frame_of_no_results_is_an_error_that_says_so(results):
    with pytest.raises(DataError, match="There are no results"):
        results.select(seed=99).frame()
