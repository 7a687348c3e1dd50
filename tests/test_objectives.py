"""The terms of the cost: closed forms, and gradients against finite differences in float64."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from gipip.attacks.dlg import DLG
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.objectives import Gradients, cosine_distance, squared_distance, total_variation
from gipip.attacks.view import View
from gipip.data.datasets import load_dataset
from gipip.federation.client import Client, FedAvg
from gipip.federation.defenses import Sparsification
from gipip.federation.models import build_model
from gipip.priors.autoencoder import AnomalyScore, Autoencoder


@pytest.fixture(scope="module")
def data():
    return load_dataset("cifar10")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def gradients(*tensors):
    return Gradients(torch.as_tensor(tensor) for tensor in tensors)


def test_cosine_distance_is_0_for_equal_1_for_orthogonal_and_2_for_opposite_gradients():
    a, b = gradients([1.0, 0.0], [2.0]), gradients([0.0, 3.0], [0.0])
    assert cosine_distance(a, a).item() == pytest.approx(0, abs=1e-7)
    assert cosine_distance(a, b).item() == 1
    assert cosine_distance(a, gradients(*(-x for x in a))).item() == pytest.approx(2)


def test_cosine_distance_ignores_the_gradients_length():
    a, b = (gradients(torch.randn(3), torch.randn(2, 2)) for _ in range(2))
    longer = gradients(*(7 * x for x in a))
    torch.testing.assert_close(cosine_distance(a, b), cosine_distance(longer, b))


def test_cosine_distance_is_one_angle_over_all_parameters_and_not_one_per_layer():
    a, b = gradients([3.0], [1.0]), gradients([3.0], [-1.0])
    assert cosine_distance(a, b).item() == pytest.approx(1 - (9 - 1) / 10)  # per layer: 0 + 2


def test_cosine_distance_of_millions_of_numbers_is_precise_in_float32():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3_000_000, generator=generator)
    b = a + 0.02 * torch.randn(3_000_000, generator=generator)
    exact = 1 - torch.cosine_similarity(a.double(), b.double(), dim=0)
    assert cosine_distance(gradients(a), gradients(b)).item() == pytest.approx(
        exact.item(), rel=1e-5
    )


def test_squared_distance_sums_over_all_parameters():
    a, b = gradients([1.0, 2.0], [[3.0]]), gradients([0.0, 4.0], [[0.0]])
    assert squared_distance(a, b).item() == 1 + 4 + 9


def test_gradient_lists_of_different_length_are_never_compared():
    for distance in (cosine_distance, squared_distance):
        with pytest.raises(ValueError, match="shorter|longer"):
            distance(gradients([1.0]), gradients([1.0], [1.0]))


def test_total_variation_of_a_hand_worked_image():
    image = torch.tensor([[[[0.0, 1.0, 3.0], [0.0, 1.0, 5.0]]]])
    assert total_variation(image).item() == pytest.approx((1 + 2 + 1 + 4) / 4 + (0 + 0 + 2) / 3)


def test_total_variation_of_a_constant_image_is_zero():
    assert total_variation(torch.full((2, 3, 4, 4), 0.3)).item() == 0


def test_total_variation_is_the_mean_over_the_batch():
    images = torch.rand(3, 3, 5, 4)
    torch.testing.assert_close(
        total_variation(images),
        torch.stack([total_variation(image[None]) for image in images]).mean(),
    )


@pytest.mark.parametrize("distance", [cosine_distance, squared_distance])
def test_gradients_of_the_distances_agree_with_finite_differences(distance):
    target = gradients(torch.randn(4).double(), torch.randn(2, 3).double())
    assert gradcheck(lambda a, b: distance(gradients(a, b), target), (doubles(4), doubles(2, 3)))


def test_gradient_of_the_total_variation_agrees_with_finite_differences():
    assert gradcheck(total_variation, (doubles(2, 3, 5, 4),))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("per", ["image", "batch"])
def test_gradient_of_the_anomaly_score_agrees_with_finite_differences(per, offset):
    score = AnomalyScore(Autoencoder(width=3, depth=2).double(), offset)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: score(x, per=per), (images,))


ATTACKS = {
    "IG": InvertingGradients(tv_weight=0.01),
    "GIPIP": GIPIP(prior=AnomalyScore(Autoencoder(), 0.01), tv_weight=0.01, as_weight=0.5),
    "GIPIP per batch": GIPIP(
        prior=AnomalyScore(Autoencoder(), 0.01), tv_weight=0.01, as_weight=0.5, score_per="batch"
    ),
    "DLG": DLG(),
}


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("network", ["lenet", "convnet"])
def test_gradient_of_the_whole_cost_agrees_with_finite_differences(data, network, attack, mode):
    check_cost(data, network, attack, mode)


def test_gradient_of_the_whole_cost_agrees_with_finite_differences_on_resnet18(data):
    check_cost(data, "resnet18", "GIPIP", "eval")


@pytest.mark.parametrize("attack", ["IG", "DLG"])
@pytest.mark.parametrize("network", ["lenet", "convnet"])
def test_gradient_of_the_whole_cost_agrees_with_finite_differences_through_local_training(
    data, network, attack
):
    check_cost(data, network, attack, "eval", FedAvg(steps=3, batch_size=1, learning_rate=0.1))


def check_cost(data, network, name, mode, fedavg=None):
    """Central differences along random directions. The step is tiny: where it crosses a
    kink of a ReLU the gradient itself jumps.
    """
    model, attack = build_model(network).double(), ATTACKS[name]
    view = View.of(model, Client(model).share(data.private(batch_size=2), mode=mode, fedavg=fedavg))
    lower, upper = view.model.normalize.box
    variables = attack.variables(view) | {
        "images": (lower + (upper - lower) * torch.rand(view.shape, dtype=torch.float64))
    }
    variables = {key: value.requires_grad_() for key, value in variables.items()}

    def cost(shift):
        return sum(
            attack.terms(
                view, {key: value + shift.get(key, 0) for key, value in variables.items()}
            ).values()
        )

    gradients = dict(
        zip(variables, torch.autograd.grad(cost({}), list(variables.values())), strict=True)
    )
    for key, gradient in gradients.items():
        for direction in (gradient / gradient.norm(), torch.randn_like(gradient)):
            step = 1e-7
            numeric = (cost({key: step * direction}) - cost({key: -step * direction})) / (2 * step)
            torch.testing.assert_close(numeric, (gradient * direction).sum(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("network", ["lenet", "convnet", "resnet18"])
def test_gradient_matching_is_zero_at_the_truth_and_not_with_wrong_labels(data, network, mode):
    model, batch, attack = (
        build_model(network),
        data.private(batch_size=2),
        InvertingGradients(tv_weight=0),
    )
    view = View.of(model, Client(model).share(batch, mode=mode))
    truth = {"images": model.normalize(batch.images)}
    assert (
        attack.terms(view, truth)["gradient matching"].abs() < 1e-4
    )  # some ReLUs' inputs are zero but for rounding
    view.labels = (batch.labels + 1) % 10
    assert attack.terms(view, truth)["gradient matching"] > 0.1


def test_squared_distance_is_zero_at_the_truth_with_certain_labels(data):
    model, batch, attack = build_model("lenet"), data.private(), DLG()
    view = View.of(model, Client(model).share(batch))
    certain = 100.0 * nn.functional.one_hot(batch.labels, 10)
    assert (
        attack.terms(view, {"images": model.normalize(batch.images), "labels": certain})[
            "gradient matching"
        ]
        < 1e-8
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("network", ["lenet", "convnet"])
def test_matching_is_zero_at_the_truth_after_local_training_but_not_for_who_ignores_it(
    data, network, mode
):
    model, batch, attack = (
        build_model(network),
        data.private(batch_size=4),
        InvertingGradients(tv_weight=0),
    )
    update = Client(model).share(
        batch, mode=mode, fedavg=FedAvg(steps=3, batch_size=2, learning_rate=0.1)
    )
    truth = {"images": model.normalize(batch.images)}
    assert attack.terms(View.of(model, update), truth)["gradient matching"].abs() < 1e-5
    ignorant = View.of(model, dataclasses.replace(update, fedavg=None))
    assert attack.terms(ignorant, truth)["gradient matching"] > 0.01


def test_only_masked_matching_is_zero_at_the_truth_behind_a_sparsified_gradient(data):
    model, batch = build_model("lenet"), data.private(batch_size=2)
    update = Client(model).share(batch, defenses=[Sparsification(sparsity=0.9)])
    truth = {"images": model.normalize(batch.images)}
    masked, unmasked = (
        attack.terms(View.of(model, update), truth)["gradient matching"].item()
        for attack in (InvertingGradients(masked=True), InvertingGradients(masked=False))
    )
    kept = sum(gradient.square().sum() for gradient in update.gradients).sqrt()
    whole = sum(gradient.square().sum() for gradient in Client(model).share(batch).gradients).sqrt()
    assert masked == pytest.approx(0, abs=1e-6)
    assert (
        unmasked == pytest.approx(1 - (kept / whole).item(), abs=1e-6) and unmasked > 0.005
    )  # the cosine to a part of oneself


def test_masked_matching_of_a_gradient_without_zeros_is_plain_matching(data):
    model, batch = build_model("lenet"), data.private(batch_size=2)
    view = View.of(model, Client(model).share(batch))
    variables = {"images": torch.randn(view.shape)}
    masked, plain = (
        InvertingGradients(masked=choice).terms(view, variables)["gradient matching"]
        for choice in (True, False)
    )
    torch.testing.assert_close(masked, plain, rtol=1e-6, atol=0)
