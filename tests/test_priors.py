"""What every prior does: its course of training, its files, and what it refuses."""

import itertools

import pytest
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import DamagedFileError, DataError, GipipError, UpdateError
from gipip.files import write_tensors
from gipip.priors.autoencoder import AnomalyScore, Autoencoder, load_prior, train_autoencoder
from gipip.priors.base import Network, Prior, Training
from gipip.priors.gan import (
    GenerativePrior,
    Generator,
    GeneratorTraining,
    load_generator,
    train_generator,
)

SMALL = {  # a setting of each that trains in a moment
    train_autoencoder: {"width": 4, "depth": 2, "batch_size": 8},
    train_generator: {"width": 4, "latent_size": 6, "batch_size": 8},
}


@pytest.fixture(autouse=True)
def _few_samples(monkeypatch):
    monkeypatch.setattr(GeneratorTraining, "samples", 16)


@pytest.fixture(scope="module")
def images():
    """32 real images of 16×16 pixels."""
    auxiliary = load_dataset("cifar10").auxiliary()[:32]
    return LabeledImages(auxiliary.pixels[:, :, ::2, ::2].contiguous(), auxiliary.labels)


@pytest.fixture(params=list(SMALL), ids=lambda training: training.__name__)
def train(request, images):
    """Trains on 32 images, or others, by 2 small steps, or other settings."""
    training = request.param
    return lambda auxiliary=images, **changes: training(
        auxiliary, **{"steps": 2} | SMALL[training] | changes
    )


# The course of a training, by one that follows a script ---------------------------


class Counter(Network):
    """A network whose only weight counts the steps of its training."""

    arguments = {}

    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))

    def misfit(self, image_shape):
        return "" if image_shape[-1] == 16 else "a counter takes 16 pixels."


class Counted(Prior):
    kind, network_class = "counter", Counter


class Scripted(Training[Counted]):
    """Its measure is the next of a list; Ctrl-C comes before step `interrupt`."""

    prior, measure, every = Counted, "error", 1

    def __init__(self, auxiliary, errors, interrupt=None, **options):
        super().__init__(Counter(), auxiliary, **options)
        self.errors, self.interrupt = iter(errors), interrupt

    def advance(self):
        if self.steps == self.interrupt:
            raise KeyboardInterrupt
        self.network.steps.data += 1

    def judge(self):
        return {"error": next(self.errors)}


@pytest.mark.parametrize(
    ("errors", "best"), [([3, 1, 2], 2), ([1, 2, 3], 1), ([3, 2, 1], 3), ([1, 1, 1], 1)]
)
def test_the_weights_of_the_lowest_measure_are_kept_the_first_of_equal_ones(images, errors, best):
    training = Scripted(images, errors)
    assert training.run(3).network.steps == best
    assert training.history == {"step": [1, 2, 3], "error": errors}


def test_patience_ends_a_training_that_gets_no_better(images):
    training = Scripted(images, [5, 4, 6, 6, 3, 7, 7, 7, 1], patience=3)
    assert training.run(9).network.steps == 5 and training.steps == 8


@pytest.mark.parametrize(
    ("interrupt", "judged", "best"), [(5, [2, 4, 5], 4), (4, [2, 4], 4), (1, [1], 1)]
)
def test_an_interrupted_training_is_judged_once_more_and_gives_the_best_so_far(
    images, monkeypatch, interrupt, judged, best
):
    monkeypatch.setattr(Scripted, "every", 2)
    training = Scripted(images, [3, 2, 2] if interrupt > 1 else [3], interrupt)
    assert training.run(9).network.steps == best
    assert training.interrupted and training.history["step"] == judged


def test_a_training_interrupted_before_its_first_step_gives_no_prior(images):
    with pytest.raises(KeyboardInterrupt):
        Scripted(images, [], interrupt=0).run(9)


@pytest.mark.parametrize("error", [float("nan"), float("inf")])
def test_a_measure_that_is_not_finite_is_an_error_with_the_remedy(images, error):
    message = "counter's training diverged: not finite after 2 steps.*smaller learning_rate"
    with pytest.raises(GipipError, match=message):
        Scripted(images, [1, error, 0.5]).run(3)


def test_images_that_the_network_is_not_for_or_only_one_are_refused(images):
    with pytest.raises(DataError, match="1 images.*at least 2"):
        Scripted(images[:1], [])
    wide = LabeledImages(images.pixels.repeat(1, 1, 1, 2), images.labels)
    with pytest.raises(DataError, match="cannot be trained on: a counter takes 16 pixels"):
        Scripted(wide, [])


# What is trained ------------------------------------------------------------------


def test_training_is_determined_by_its_seed_and_leaves_the_global_generator_alone(train):
    before = torch.get_rng_state()
    prints = [train(seed=seed).fingerprint for seed in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prior_knows_how_it_was_trained_and_is_never_trained_further(train, images):
    prior = train()
    about = prior.provenance
    assert (about["data"], about["images"]) == (images.fingerprint, 32)
    assert {"width": 4, "steps": 2, "seed": 0}.items() <= about["settings"].items()
    assert about["history"]["step"] == [2] and "interrupted" not in about
    assert not any(parameter.requires_grad for parameter in prior.parameters())
    assert not prior.network.training


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("steps", value) for value in (-1, 0, 1.5, "many", None)],
        *[("width", value) for value in (0, -4)],
        *[("batch_size", value) for value in (0, 2.5)],
        *[("learning_rate", float(value)) for value in ("nan", "inf", "0", "-0.1", "1e38")],
        *[("seed", value) for value in (-1, 2**63, 0.5)],
        ("momentum", 0.9),
    ],
)
def test_settings_that_nothing_can_be_trained_with_are_refused_by_name(train, name, value):
    with pytest.raises(ValidationError, match=f"train_.*\n{name}\n"):
        train(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("depth", value) for value in (0, -1)],
        *[("validation_fraction", value) for value in (0.0, 1.0, float("nan"))],
        ("patience", 0),
    ],
)
def test_settings_of_the_autoencoder_alone_are_refused_too(images, name, value):
    with pytest.raises(ValidationError, match=f"train_autoencoder\n{name}\n"):
        train_autoencoder(images, **{"steps": 1, name: value})


def test_a_tensor_in_place_of_labelled_images_is_refused(train, images):
    with pytest.raises(ValidationError, match="instance of LabeledImages"):
        train(images.images)


@pytest.mark.parametrize("rate", [1e30])
def test_a_training_that_diverges_is_an_error_and_not_a_prior(train, rate):
    with pytest.raises(GipipError, match="diverged.*smaller learning_rate"):
        train(learning_rate=rate)


# The store ------------------------------------------------------------------------


def test_a_finished_training_is_loaded_from_the_store_the_second_time(train, tmp_path, monkeypatch):
    first = train(store=tmp_path)
    monkeypatch.setattr(Training, "run", None)  # training again would fail
    again = train(store=str(tmp_path))
    assert (again.fingerprint, again.provenance) == (first.fingerprint, first.provenance)


def test_other_settings_or_images_are_another_training(train, images, tmp_path):
    for changes in ({}, {}, {"seed": 1}, {"steps": 1}, {"auxiliary": images[:20]}):
        train(store=tmp_path, **changes)
    assert len(list((tmp_path / "priors").iterdir())) == 4


def test_a_stored_prior_that_cannot_be_read_is_set_aside_and_trained_again(train, tmp_path):
    first = train(store=tmp_path)
    (path,) = tmp_path.glob("priors/*")
    write_tensors(path, {"of an earlier version": torch.ones(1)}, {})
    with pytest.warns(UserWarning, match="set aside as .*damaged-.* computed again"):
        again = train(store=tmp_path)
    assert again.fingerprint == first.fingerprint
    assert train(store=tmp_path).fingerprint == first.fingerprint  # from the store


def test_an_interrupted_training_says_so_and_is_not_stored(images, tmp_path, monkeypatch):
    calls, forward = itertools.count(), Autoencoder.forward

    def interrupted(network, batch):
        if next(calls) == 1:  # in the second step
            raise KeyboardInterrupt
        return forward(network, batch)

    monkeypatch.setattr(Autoencoder, "forward", interrupted)
    prior = train_autoencoder(images, **SMALL[train_autoencoder], steps=3, store=tmp_path)
    assert prior.provenance["interrupted"] and prior.provenance["history"]["step"] == [1]
    assert prior.offset == pytest.approx(prior.provenance["history"]["validation"][0], rel=1e-4)
    assert not (tmp_path / "priors").exists()


# Files ----------------------------------------------------------------------------


@pytest.fixture(params=["autoencoder", "generator"])
def saved(request, tmp_path):
    about = {"images": 64, "history": {"step": [1]}}
    if request.param == "autoencoder":
        prior = AnomalyScore(Autoencoder(width=4, depth=2), 0.25, about)
    else:
        prior = GenerativePrior(Generator(4, 6, 16), about)
    return prior, prior.save(tmp_path / "prior.safetensors")


def test_what_is_saved_comes_back_with_the_same_fingerprint_and_provenance(saved):
    prior, path = saved
    loaded = type(prior).load(path)
    assert (loaded.fingerprint, loaded.provenance) == (prior.fingerprint, prior.provenance)
    assert not loaded.network.training
    weights, expected = loaded.state_dict(), prior.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, part):
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[: int(part * len(content))])
    with pytest.raises(DamagedFileError, match="prior.safetensors"):
        type(saved[0]).load(saved[1])


@pytest.mark.parametrize("place", [0.2, 0.5, 0.999])
def test_a_file_with_one_flipped_bit_is_refused(saved, place):
    content = bytearray(saved[1].read_bytes())
    content[int(place * len(content))] ^= 1
    saved[1].write_bytes(content)
    with pytest.raises(DamagedFileError, match="prior.safetensors"):
        type(saved[0]).load(saved[1])


@pytest.mark.parametrize("change", ["none", "tensors", "network", "argument", "provenance"])
def test_a_whole_file_that_holds_something_else_is_refused_with_the_remedy(saved, tmp_path, change):
    prior, kind = saved[0], saved[0].kind
    metadata = {kind: prior.network.arguments, "provenance": {}, "offset": 0.1}
    tensors = prior.network.state_dict()
    if change == "none":
        metadata = {}
    elif change == "tensors":
        tensors = {"weights": torch.zeros(3)}
    elif change == "network":
        metadata[kind] = metadata[kind] | {"width": 5}
    elif change == "argument":
        metadata[kind] = metadata[kind] | {"height": 2}
    else:
        del metadata["provenance"]
    path = write_tensors(tmp_path / "other.safetensors", tensors, metadata)
    message = f"(?s)other.safetensors holds no {kind}.*gipip train {kind}"
    with pytest.raises(DamagedFileError, match=message):
        type(prior).load(path)


def test_an_autoencoder_without_its_offset_and_the_file_of_another_prior_are_refused(tmp_path):
    network = Autoencoder(4, 2)
    metadata = {"autoencoder": network.arguments, "provenance": {}}
    path = write_tensors(tmp_path / "other.safetensors", network.state_dict(), metadata)
    with pytest.raises(DamagedFileError, match="holds no autoencoder.*offset"):
        AnomalyScore.load(path)
    with pytest.raises(DamagedFileError, match="holds no generator"):
        GenerativePrior.load(path)


def test_a_safetensors_file_that_gipip_did_not_write_is_refused(saved, tmp_path):
    path = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"weights": torch.zeros(3)}, path)
    with pytest.raises(DamagedFileError, match="was not written by gipip"):
        type(saved[0]).load(path)


@pytest.mark.parametrize(("load", "kind"), [(load_prior, "autoencoder"), (load_generator, "gen")])
def test_a_prior_that_does_not_ship_is_refused_with_the_remedy(load, kind):
    with pytest.raises(DataError, match=f"No {kind}.*'mnist' ships.*train_{kind}"):
        load("mnist")


# What it is for -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "fits", "others"),
    [
        (lambda: AnomalyScore(Autoencoder(4, 3)), (3, 8, 24), [(3, 12, 16), (1, 8, 8), (3, 8)]),
        (lambda: AnomalyScore(Autoencoder(4, 4)), (3, 16, 32), [(3, 24, 16)]),
        (lambda: GenerativePrior(Generator(4, 6, 16)), (3, 16, 16), [(3, 32, 32), (3, 16, 32)]),
    ],
    ids=["autoencoder", "deeper autoencoder", "generator"],
)
def test_an_update_of_images_that_a_prior_is_not_for_is_refused_with_their_size(
    prior, fits, others
):
    prior = prior()
    prior.check(fits)
    for shape in others:
        size = "×".join(map(str, shape[1:]))
        with pytest.raises(UpdateError, match=f"does not fit the update.*{size}.*gipip.train_"):
            prior.check(shape)
