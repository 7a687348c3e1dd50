"""GradInversion: the private batch's BatchNorm statistics and a group of seeds, on a
tiny network.
"""

import json

import pydantic
import pytest
import torch
from torch import nn

from gipip.attacks.gradinversion import GradInversion
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.objectives import total_variation
from gipip.attacks.view import View
from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import UpdateError
from gipip.federation.client import Client, FedAvg
from gipip.federation.defenses import Sparsification
from gipip.federation.models import build_model, client_model

LOCAL = [None, FedAvg(steps=3, batch_size=1, learning_rate=0.1)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
        nn.Sigmoid(),
    ]
    model = client_model(
        nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 5)), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    model(torch.rand(16, 3, 8, 8))  # in train mode: moves the running statistics
    return model.eval()


@pytest.fixture
def batch():
    return LabeledImages(
        torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4])
    )


def share(model, batch, **options):
    return Client(model).share(batch, **{"statistics": "shared"} | options)


def terms_at(attack, model, update, *groups):
    """The terms with these images as the seeds' candidates."""
    return attack.terms(
        View.of(model, update),
        {"images": torch.cat([model.normalize(images) for images in groups])},
    )


# The statistics ----------------------------------------------------------------


def test_an_update_without_statistics_is_refused_with_the_remedy(model, batch):
    with pytest.raises(
        UpdateError,
        match="BatchNorm statistics, which this update does not hold.*statistics='shared'",
    ):
        GradInversion()(model, share(model, batch, statistics="withheld"))


def test_a_model_without_batch_norm_is_refused_though_its_client_shares_statistics():
    model, batch = build_model("lenet"), load_dataset("cifar10").private()
    with pytest.raises(UpdateError, match="with a model that has BatchNorm"):
        GradInversion()(model, share(model, batch))


@pytest.mark.parametrize("fedavg", LOCAL, ids=["FedSGD", "FedAvg"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_at_the_true_images_gradient_and_statistics_match(model, batch, mode, fedavg):
    terms = terms_at(
        GradInversion(statistics_weight=1),
        model,
        share(model, batch, mode=mode, fedavg=fedavg),
        batch.images,
        batch.images,
    )
    assert terms["gradient matching"].abs() < 1e-5 and terms["BatchNorm statistics"] < 1e-10


def test_the_statistics_term_is_the_mean_over_layers_and_channels_of_both_squared_differences(
    model, batch
):
    other = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    shares = [
        share(model, LabeledImages(images, batch.labels)).statistics
        for images in (batch.images, other)
    ]
    expected = torch.stack(
        [
            (a - b).square().mean()
            for pair in zip(*shares, strict=True)
            for a, b in zip(*pair, strict=True)
        ]
    ).mean()
    found = terms_at(GradInversion(statistics_weight=3, seeds=1), model, share(model, batch), other)
    torch.testing.assert_close(found["BatchNorm statistics"], 3 * expected)
    half = terms_at(
        GradInversion(statistics_weight=3, seeds=2), model, share(model, batch), other, batch.images
    )
    torch.testing.assert_close(
        half["BatchNorm statistics"], 1.5 * expected
    )  # the mean over the seeds


def test_the_statistics_term_falls_when_only_it_is_minimised(model, batch):
    attack = GradInversion(
        iterations=80, seeds=1, statistics_weight=1e3, tv_weight=0, learning_rate=0.05
    )
    history = attack(model, share(model, batch)).history["BatchNorm statistics"]
    assert history[-1] < history[0] / 10


# The group of seeds ------------------------------------------------------------


def test_equal_seeds_are_consistent_and_others_are_as_far_as_their_spread(model, batch):
    update, other = share(model, batch), 1 - batch.images
    consistency = [
        terms_at(GradInversion(group_weight=2), model, update, batch.images, images)[
            "group consistency"
        ]
        for images in (batch.images, other)
    ]
    assert consistency[0] == 0
    spread = (
        ((batch.images - other) / 0.25 / 2).square().mean()
    )  # normalised; each is half the difference from the mean
    torch.testing.assert_close(consistency[1], 2 * spread)


def test_the_returned_seed_is_the_one_whose_gradient_is_nearest(model, batch):
    attack, update = GradInversion(seeds=3, iterations=8, group_weight=0), share(model, batch)
    view = View.of(model, update)
    noise = [
        torch.rand(batch.images.shape, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 2)
    ]
    for place in range(3):
        groups = noise[:place] + [batch.images] + noise[place:]
        found = view.images(attack.candidate(view, {"images": model.normalize(torch.cat(groups))}))
        torch.testing.assert_close(found, batch.images)


def test_the_images_of_a_result_are_one_seeds(model, batch):
    finals = []

    class Watched(GradInversion):
        def candidate(self, view, variables):
            finals[:] = view.images(variables["images"].detach()).chunk(self.seeds)
            return super().candidate(view, variables)

    attack, update = Watched(seeds=3, iterations=8), share(model, batch)
    images = attack(model, update).images
    matching = [
        terms_at(InvertingGradients(), model, update, final)["gradient matching"]
        for final in finals
    ]
    assert (
        torch.equal(images, finals[torch.stack(matching).argmin()])
        and len({distance.item() for distance in matching}) == 3
    )


def test_with_one_seed_and_no_weights_of_its_own_it_is_inverting_gradients(model, batch):
    update = share(model, batch)
    alone = GradInversion(seeds=1, statistics_weight=0, group_weight=0, iterations=9)(model, update)
    torch.testing.assert_close(alone.images, InvertingGradients(iterations=9)(model, update).images)
    assert set(alone.history) == {
        "gradient matching",
        "total variation",
        "BatchNorm statistics",
        "group consistency",
    }


def test_total_variation_is_that_of_all_seeds(model, batch):
    other = torch.rand(2, 3, 8, 8)
    found = terms_at(GradInversion(tv_weight=0.5), model, share(model, batch), batch.images, other)[
        "total variation"
    ]
    expected = sum(total_variation(model.normalize(images)) for images in (batch.images, other)) / 4
    torch.testing.assert_close(found, expected)


def test_masked_matching_is_zero_at_the_true_images_behind_a_sparsified_gradient(model, batch):
    update = share(model, batch, defenses=[Sparsification(sparsity=0.8)])
    masked, plain = (
        terms_at(GradInversion(masked=m), model, update, batch.images, batch.images)[
            "gradient matching"
        ]
        for m in (True, False)
    )
    assert masked.abs() < 1e-6 and plain > 1e-3


@pytest.mark.parametrize("fedavg", LOCAL, ids=["FedSGD", "FedAvg"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gradient_of_the_whole_cost_agrees_with_finite_differences(model, batch, mode, fedavg):
    model, attack = model.double(), GradInversion(tv_weight=0.1)
    view = View.of(model, share(model, batch, mode=mode, fedavg=fedavg))
    images = torch.randn(
        4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()

    def cost(x):
        return sum(attack.terms(view, {"images": x}).values())

    (gradient,) = torch.autograd.grad(cost(images), images)
    direction = gradient / gradient.norm()
    numeric = (cost(images + 1e-6 * direction) - cost(images - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(numeric, gradient.norm(), rtol=1e-4, atol=1e-8)


# The result and the settings ---------------------------------------------------


def test_a_result_has_the_batchs_shape_and_ends_with_its_cost(model, batch):
    result = GradInversion(seeds=3, iterations=6)(model, share(model, batch))
    assert (
        result.images.shape == (2, 3, 8, 8)
        and result.images.min() >= 0
        and result.images.max() <= 1
    )
    assert sum(values[-1].item() for values in result.history.values()) == pytest.approx(
        result.cost, rel=1e-5
    )


def test_the_assumptions_say_that_the_statistics_were_shared(model, batch):
    update = share(model, batch)
    about = GradInversion().assumptions(update)["BatchNorm"]
    assert "statistics of the private batch shared (an extra assumption)" in about
    assert "shared" not in InvertingGradients().assumptions(update)["BatchNorm"]


@pytest.mark.parametrize(
    "settings", [{"seeds": 0}, {"statistics_weight": -1}, {"group_weight": -1}]
)
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(pydantic.ValidationError, match=next(iter(settings))):
        GradInversion(**settings)


def test_the_settings_survive_json():
    attack = GradInversion(seeds=3, statistics_weight=0.5)
    assert GradInversion(**json.loads(attack.model_dump_json())) == attack
