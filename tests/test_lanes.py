"""Attempts computed at once are those computed one after another."""

import pytest
import torch

import gipip
from gipip.attacks import base
from gipip.errors import EngineError, UpdateError
from gipip.priors import GenerativePrior, Generator

DATA = gipip.load_dataset("cifar10")


def _updates(model, count, batch_size=2, **options):
    return [
        gipip.Client(model).share(DATA.tuning(batch_size=batch_size, seed=seed), **options)
        for seed in range(count)
    ]


@pytest.fixture
def generator():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GenerativePrior(Generator(width=8, latent_size=8))


def _attack(name, generator, **options):
    options = {"iterations": 4, **options}
    return {
        "IG": lambda: gipip.InvertingGradients(signed=False, **options),
        "masked": lambda: gipip.InvertingGradients(signed=False, masked=True, **options),
        "GIPIP": lambda: gipip.GIPIP(prior=gipip.load_prior(), signed=False, **options),
        "LatentSearch": lambda: gipip.LatentSearch(prior=generator, **options),
        "GIAS": lambda: gipip.GIAS(prior=generator, latent_iterations=2, **options),
        "GradInversion": lambda: gipip.GradInversion(signed=False, **options),
        "DLG": lambda: gipip.DLG(inner_iterations=2, **options),
    }[name]()


def _same(found, expected):
    torch.testing.assert_close(found.images, expected.images, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.history, expected.history, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        torch.tensor(found.restart_costs),
        torch.tensor(expected.restart_costs),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("labels", ["given", "withheld"])
@pytest.mark.parametrize(
    "name", ["IG", "masked", "GIPIP", "LatentSearch", "GIAS", "GradInversion", "DLG"]
)
def test_many_updates_and_restarts_give_what_each_gives_alone(name, labels, generator):
    model, attack = gipip.build_model("convnet16").double(), _attack(name, generator, restarts=2)
    updates = _updates(model, 3, batch_size=1, labels=labels, statistics="shared")
    for found, update in zip(attack.many(model, updates, together=4), updates, strict=True):
        _same(found, attack(model, update, together=1))


def test_restarts_at_once_are_those_one_after_another_under_local_training(generator):
    model, attack = gipip.build_model("lenet").double(), _attack("IG", generator, restarts=3)
    [update] = _updates(model, 1, fedavg=gipip.FedAvg(steps=2, batch_size=1))
    _same(attack(model, update, together=3), attack(model, update, together=1))


def test_a_large_network_or_batch_statistics_are_attacked_one_by_one(generator, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        base.Attack, "_attempt", lambda self, lanes, *rest: sizes.append(len(lanes)) or _stop()
    )
    for model, mode in [("convnet16", "eval"), ("lenet", "train"), ("lenet", "eval")]:
        model = gipip.build_model(model)
        [update] = _updates(model, 1, mode=mode)
        with pytest.raises(Stopped):
            _attack("IG", generator, restarts=3)(model, update)
    assert sizes == [1, 1, 3]


class Stopped(Exception):
    pass


def _stop():
    raise Stopped


def test_no_more_than_a_bounded_number_is_computed_at_once(generator):
    model, attack = (
        gipip.build_model("lenet").double(),
        _attack("IG", generator, restarts=11, iterations=1),
    )
    [update] = _updates(model, 1)
    assert len(set(attack(model, update).restart_costs)) == 11


@pytest.mark.parametrize(
    ("options", "shared"),
    [({"engine": "eager"}, {}), ({"chunk_size": 1}, {}), ({}, {"mode": "train"})],
)
def test_attempts_that_cannot_be_computed_at_once_are_refused(options, shared, generator):
    model = gipip.build_model("lenet")
    with pytest.raises(EngineError, match="2 attempts at once cannot be computed"):
        _attack("IG", generator).many(model, _updates(model, 2, **shared), together=2, **options)


def test_an_attempt_that_fails_does_not_spoil_the_others(generator):
    model = gipip.build_model("lenet")
    updates = _updates(model, 2)

    class Fails(gipip.InvertingGradients):
        def terms(self, view, variables):
            bad = torch.where(view.labels.sum() == updates[0].labels.sum(), float("nan"), 0.0)
            return {name: term + bad for name, term in super().terms(view, variables).items()}

    with pytest.warns(UserWarning, match="the cost was not finite at iteration 0"):
        failed, found = Fails(iterations=30).many(model, updates)
    assert failed.returned == "lowest attacker-visible cost"
    assert torch.isfinite(found.history["gradient matching"]).all()
    assert found.returned == "last iterate"


def test_a_number_of_attempts_below_one_is_refused(generator):
    model = gipip.build_model("lenet")
    with pytest.raises(EngineError, match="that needs a positive number"):
        _attack("IG", generator).many(model, _updates(model, 2), together=0)


def test_stopping_ends_all_and_gives_what_there_is(generator):
    model = gipip.build_model("lenet")

    def stop(iteration, images, cost):
        assert images.shape == (2, 3, 32, 32)
        raise StopIteration

    found = _attack("IG", generator, iterations=50).many(
        model, _updates(model, 3), watch=stop, watch_every=5
    )
    assert [reconstruction.interrupted for reconstruction in found] == [True] * 3
    restarts = _attack("IG", generator, iterations=50, restarts=3)(
        model, _updates(model, 1)[0], watch=stop, watch_every=5
    )
    assert (
        restarts.notes == ("stopped by the user after 5 of 50 iterations",)
        and len(restarts.restart_costs) == 3
    )
    assert all(len(reconstruction.history["total variation"]) == 6 for reconstruction in found)


def test_updates_that_cannot_be_attacked_together_are_refused(generator):
    model = gipip.build_model("lenet")
    with pytest.raises(UpdateError, match="must be of one batch size"):
        _attack("IG", generator).many(
            model, [*_updates(model, 1), *_updates(model, 1, batch_size=3)]
        )


def test_no_updates_give_no_reconstructions(generator):
    assert _attack("IG", generator).many(gipip.build_model("lenet"), []) == []
