"""GAN-based inversion with a tiny untrained generator: what it can make is found, and
the parameter search goes beyond it.
"""

import json

import pydantic
import pytest
import torch
from torch import nn

from gipip.attacks import ATTACKS
from gipip.attacks.gias import GIAS, LatentSearch
from gipip.attacks.view import View
from gipip.data.datasets import LabeledImages
from gipip.errors import UpdateError
from gipip.evaluation.metrics import psnr
from gipip.federation.client import Client
from gipip.federation.models import client_model, model_fingerprint
from gipip.priors.gan import GenerativePrior, Generator


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(0)
    generator = Generator(width=8, latent_size=8, image_size=16)
    for layer in generator.layers:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        generator(torch.randn(256, 8))  # in train mode: sets the running statistics
        generator.layers[-2].weight.mul_(4)  # images of some contrast
    return GenerativePrior(generator, {"images": 1900})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(768, 5)
    )
    return client_model(network, mean=(0.5,) * 3, std=(0.25,) * 3).eval()


def shared(model, images):
    return Client(model).share(LabeledImages(images, torch.arange(len(images))))


@pytest.fixture(scope="module")
def in_range(prior, model):
    """Two images that the generator made, and their update."""
    images = prior.sample(2, seed=99)
    return images, shared(model, images)


@pytest.fixture(scope="module")
def stripes(model):
    """Two images that the generator cannot make, and their update."""
    images = torch.zeros(2, 3, 16, 16)
    images[0, :, ::4], images[0, :, 1::4] = 1, 1
    images[1, 0, :, ::8] = 1
    return images, shared(model, images)


def start_of(attack, model, update):
    """The latent search that a GIAS begins with."""
    return LatentSearch(
        prior=attack.prior,
        tv_weight=attack.tv_weight,
        seed=attack.seed,
        iterations=attack.latent_iterations,
        restarts=attack.latent_restarts,
        learning_rate=attack.latent_learning_rate,
    )(model, update)


def short(prior, **changes):
    return GIAS(**{"prior": prior, "latent_iterations": 15, "iterations": 15} | changes)


# The latent search -------------------------------------------------------------


def test_the_latent_search_finds_images_that_the_generator_made(prior, model, in_range):
    images, update = in_range
    found = LatentSearch(prior=prior, iterations=150, restarts=2, tv_weight=0)(model, update)
    chance = torch.stack([psnr(prior.sample(2, seed=seed), images).mean() for seed in range(5)])
    assert psnr(found.images, images).min() > chance.max() + 10


def test_the_latent_search_gives_images_that_the_generator_can_make(prior, model, stripes):
    found = LatentSearch(prior=prior, iterations=30)(model, stripes[1])
    assert error_of_the_nearest(prior, found.images) < 1e-3


def test_restarts_of_the_latent_search_are_those_of_its_seeds(prior, model, in_range):
    single = [
        LatentSearch(prior=prior, iterations=5, seed=seed)(model, in_range[1]).cost
        for seed in (3, 4)
    ]
    together = LatentSearch(prior=prior, iterations=5, seed=3, restarts=2)(model, in_range[1])
    assert together.restart_costs == pytest.approx(single, rel=1e-5) and together.cost == min(
        together.restart_costs
    )


def test_the_cost_of_the_latent_search_is_gradient_matching_and_weighted_total_variation(
    prior, model, in_range
):
    history = LatentSearch(prior=prior, iterations=3, tv_weight=0.5)(model, in_range[1]).history
    double = LatentSearch(prior=prior, iterations=3, tv_weight=1.0)(model, in_range[1]).history
    assert set(history) == {"gradient matching", "total variation"}
    torch.testing.assert_close(double["total variation"][0], 2 * history["total variation"][0])


# The parameter search ----------------------------------------------------------


def error_of_the_nearest(prior, images):
    """Mean squared error of the nearest images that the generator makes, by Adam from
    eight starts: the largest of the batch.
    """
    latents = torch.randn(
        8, len(images), prior.generator.latent_size, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    adam = torch.optim.Adam([latents], lr=0.1)
    for _ in range(200):
        adam.zero_grad()
        errors = (
            (prior(latents.flatten(0, 1)).view(8, *images.shape) - images)
            .square()
            .mean(dim=(2, 3, 4))
        )
        errors.sum().backward()
        adam.step()
    return errors.min(dim=0).values.max().item()


def test_the_parameter_search_starts_at_the_latent_search_and_lowers_its_cost(
    prior, model, stripes
):
    attack = short(prior, latent_iterations=30, iterations=60, tv_weight=0)
    result, start = attack(model, stripes[1]), start_of(attack, model, stripes[1])
    costs = sum(result.history.values())
    assert costs[0].item() == pytest.approx(start.cost, rel=1e-4)
    assert result.cost == pytest.approx(costs[-1].item()) and result.cost < 0.8 * start.cost


def test_the_parameter_search_leaves_what_the_generator_can_make(prior, model, stripes):
    attack = short(prior, iterations=60, tv_weight=0, learning_rate=0.01)
    result, start = attack(model, stripes[1]), start_of(attack, model, stripes[1])
    assert error_of_the_nearest(prior, result.images) > 10 * error_of_the_nearest(
        prior, start.images
    )
    assert result.images.min() >= 0 and result.images.max() <= 1


def test_the_start_is_the_best_restart_of_the_latent_search(prior, model, in_range):
    attack = short(prior, latent_restarts=3, seed=5, iterations=1)
    start = start_of(attack, model, in_range[1])
    assert len(set(start.restart_costs)) == 3
    assert sum(attack(model, in_range[1]).history.values())[0].item() == pytest.approx(
        min(start.restart_costs), rel=1e-4
    )


def view_at(attack, model, update, latent):
    view = View.of(model, update)
    view.start = {"latent": latent}
    return view, {name: tensor.clone() for name, tensor in attack.variables(view).items()}


def test_every_image_has_a_generator_copy_of_its_own(prior, model, in_range):
    attack, latent = short(prior), torch.randn(2, 8)
    view, variables = view_at(attack, model, in_range[1], latent)
    before = attack.candidate(view, variables)
    torch.testing.assert_close(before, model.normalize(prior(latent)))
    for name, variable in variables.items():
        if name != "latent":
            variable[0] += 0.05
    after = attack.candidate(view, variables)
    assert torch.equal(after[1], before[1]) and (after[0] - before[0]).abs().max() > 0.01


def test_all_weights_of_the_copies_and_no_latents_are_optimised(prior, model, in_range):
    attack, latent = short(prior), torch.randn(2, 8)
    _, variables = view_at(attack, model, in_range[1], latent)
    optimized = attack.optimizer(variables)[0].param_groups[0]["params"]
    assert sum(tensor.numel() for tensor in optimized) == 2 * sum(
        weight.numel() for weight in prior.generator.parameters()
    )
    assert all(tensor is not variables["latent"] for tensor in optimized)


@pytest.mark.parametrize("kind", [LatentSearch, GIAS])
def test_gradient_of_the_whole_cost_agrees_with_finite_differences(prior, model, kind):
    generator = torch.Generator().manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 5, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(144, 5)
    )
    model = client_model(network, mean=(0.5,) * 3, std=(0.25,) * 3).double()
    attack = kind(prior=prior, tv_weight=0.1)
    view = View.of(model, shared(model, torch.rand(2, 3, 16, 16, generator=generator)))
    view.start = {"latent": torch.randn(2, 8, dtype=torch.float64, generator=generator)}
    view.generator.manual_seed(0)
    variables = {
        name: variable.requires_grad_() for name, variable in attack.variables(view).items()
    }

    def cost(shift):
        return sum(
            attack.terms(
                view, {name: value + shift.get(name, 0) for name, value in variables.items()}
            ).values()
        )

    gradients = dict(
        zip(variables, torch.autograd.grad(cost({}), list(variables.values())), strict=True)
    )
    for name, gradient in gradients.items():
        direction = gradient / gradient.norm()
        numeric = (cost({name: 1e-6 * direction}) - cost({name: -1e-6 * direction})) / 2e-6
        torch.testing.assert_close(numeric, gradient.norm(), rtol=1e-4, atol=1e-8)


# Seeds, restarts, stopping -----------------------------------------------------


def test_the_same_seed_gives_identical_images_and_another_seed_others(prior, model, in_range):
    first, again, other = (
        short(prior, iterations=3, latent_iterations=3, seed=seed)(model, in_range[1]).images
        for seed in (1, 1, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_restart_of_gias_searches_from_other_latents(prior, model, in_range):
    result = short(prior, iterations=3, latent_iterations=3, restarts=3, latent_restarts=2)(
        model, in_range[1]
    )
    assert len(set(result.restart_costs)) == 3 and result.cost == min(result.restart_costs)


def test_neither_the_prior_nor_the_model_nor_the_global_generator_is_touched(
    prior, model, in_range
):
    before = prior.fingerprint, model_fingerprint(model), torch.get_rng_state()
    short(prior, iterations=3, latent_iterations=3)(model, in_range[1])
    assert (prior.fingerprint, model_fingerprint(model)) == before[:2] and torch.equal(
        torch.get_rng_state(), before[2]
    )


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopIteration])
def test_stopping_in_the_parameter_search_gives_back_what_there_is(prior, model, in_range, stop):
    seen = []

    def watch(iteration, images, cost):
        seen.append(images)
        if len(seen) == 4:  # the latent search's only restart has 2 calls
            raise stop

    attack = short(prior, latent_iterations=8, latent_restarts=1, iterations=100, restarts=2)
    result = attack(model, in_range[1], watch=watch, watch_every=4)
    assert (
        torch.equal(result.images, seen[-1])
        and result.interrupted
        and len(result.restart_costs) == 1
    )
    assert result.notes == ("stopped by the user after 8 of 100 iterations",)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopIteration])
def test_stopping_in_the_latent_search_gives_back_its_images_and_starts_no_parameter_search(
    prior, model, in_range, stop
):
    def watch(iteration, images, cost):
        seen.append(images)
        raise stop

    seen = []
    result = short(prior, latent_iterations=50, iterations=100, restarts=2)(
        model, in_range[1], watch=watch, watch_every=5
    )
    assert len(seen) == 1 and torch.equal(result.images, seen[0]) and result.interrupted
    assert (
        result.notes == ("stopped by the user after 5 of 50 iterations",)
        and len(result.history["total variation"]) == 6
    )


# Configuration -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [LatentSearch, GIAS])
def test_the_assumptions_name_the_auxiliary_images(prior, kind, in_range):
    assert kind(prior=prior).assumptions(in_range[1])["auxiliary data"] == "1900 images"
    nameless = GenerativePrior(prior.generator)
    assert (
        kind(prior=nameless).assumptions(in_range[1])["auxiliary data"]
        == "an unknown number of images"
    )


@pytest.mark.parametrize("kind", [LatentSearch, GIAS])
def test_json_holds_the_generators_fingerprint_in_place_of_its_weights(prior, kind):
    attack = kind(prior=prior, seed=3)
    dumped = json.loads(attack.model_dump_json())
    assert dumped["prior"] == prior.fingerprint
    assert ATTACKS[kind.name](**dumped | {"prior": prior}) == attack


@pytest.mark.parametrize("kind", [LatentSearch, GIAS])
@pytest.mark.parametrize("size", [32, 64])
def test_an_update_of_another_image_size_than_the_generators_is_refused(prior, kind, size):
    model = client_model(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, 5)), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    with pytest.raises(
        UpdateError,
        match=f"makes 16×16 images, but the update is of {size}×{size}.*train_generator",
    ):
        kind(prior=prior)(model, shared(model, torch.rand(1, 3, size, size)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prior": None},
        {"latent_iterations": 0},
        {"latent_restarts": 0},
        {"latent_learning_rate": 0},
    ],
)
def test_a_missing_prior_and_impossible_stages_are_refused_by_name(prior, settings):
    with pytest.raises(pydantic.ValidationError, match=next(iter(settings), "prior")):
        GIAS(**({"prior": prior} if settings and "prior" not in settings else {}) | settings)
