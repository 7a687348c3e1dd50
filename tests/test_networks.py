"""Any image classifier: grey images, two classes, other losses; and the table in the docs."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import gipip
from gipip.errors import ModelError, UpdateError
from gipip.federation.client import local_update
from gipip.federation.models import trainable

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def networks(monkeypatch):
    """The script that writes the table."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("networks")


QUICK = ["LeNet-5, grey images", "mobilenet_v3_small, one logit", "squeezenet1_1", "alexnet"]


@pytest.mark.parametrize("name", QUICK)
def test_a_classifier_is_attacked_as_the_table_says(name, networks):
    (expected,) = [row for row in networks.read_rows("networks") if row["network"] == name]
    assert networks.row(name) == expected


def test_the_page_holds_the_table_of_all_networks(networks):
    rows = {row["network"] for row in networks.read_rows("networks")}
    assert rows == set(networks.NETWORKS)
    found = networks.SECTION.search(networks.PAGE.read_text())
    assert found[0] == networks.section(), "run python benchmarks/networks.py"


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def grey_batch(count=2):
    generator = torch.Generator().manual_seed(1)
    return gipip.LabeledImages(
        torch.rand(count, 1, 32, 32, generator=generator), torch.arange(count)
    )


def test_grey_images_are_attacked_and_measured():
    layers = nn.Conv2d(1, 6, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 14 * 14, 10)
    model = gipip.client_model(nn.Sequential(*layers), (0.13,), (0.31,))
    batch = grey_batch()
    found = gipip.InvertingGradients(iterations=30)(model, gipip.Client(model).share(batch))
    assert found.images.shape == (2, 1, 32, 32) and found.engine == "traced"
    table = gipip.evaluate(found, batch, model=model, pool=batch)
    assert table.notna().all(axis=None)
    coloured = gipip.evaluate(
        found.images.expand(-1, 3, -1, -1), batch.images.expand(-1, 3, -1, -1)
    )
    for metric in ("psnr", "ssim", "lpips"):
        assert table[metric].tolist() == pytest.approx(coloured[metric].tolist(), rel=1e-4)


def test_a_prior_of_coloured_images_is_refused_for_grey_ones():
    model = gipip.client_model(nn.Sequential(nn.Flatten(), nn.Linear(1024, 10)))
    with pytest.raises(UpdateError, match="prior does not fit"):
        gipip.GIPIP(prior=gipip.load_prior())(model, gipip.Client(model).share(grey_batch()))


def test_grey_images_are_refused_by_a_model_that_normalises_three_channels():
    network = nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))
    model = gipip.client_model(network, (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(ModelError, match="mean and std are of 3 channels"):
        gipip.Client(model).share(grey_batch())


# Losses ------------------------------------------------------------------------


@pytest.fixture
def one_logit():
    layers = nn.Flatten(), nn.Linear(3 * 8 * 8, 6), nn.Tanh(), nn.Linear(6, 1)
    return gipip.client_model(nn.Sequential(*layers))


def coloured(labels):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(len(labels), 3, 8, 8, generator=generator)
    return gipip.LabeledImages(images, torch.tensor(labels))


def test_one_logit_is_trained_with_binary_cross_entropy(one_logit):
    batch = coloured([1, 0, 1])
    logits = one_logit(batch.images).squeeze(1)
    nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float()).backward()
    update = gipip.SharedUpdate.from_gradients(
        one_logit, batch_size=3, image_shape=(3, 8, 8), labels=batch.labels
    )
    torch.testing.assert_close(update.gradients, gipip.Client(one_logit).share(batch).gradients)


@pytest.mark.parametrize("label", [0, 1])
def test_the_label_and_the_features_of_a_binary_classifier_are_read_off(one_logit, label):
    batch = coloured([label])
    update = gipip.Client(one_logit).share(batch, labels="withheld")
    result = gipip.InvertingGradients(iterations=2)(one_logit, update)
    assert result.labels.tolist() == [label]
    found = gipip.recover_features(one_logit, update)
    truth = one_logit.network[:3](batch.images).double()
    assert found.status == "exact"
    torch.testing.assert_close(found.features, truth.detach(), rtol=1e-3, atol=1e-4)


def smoothing(share):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(3 * 8 * 8, 6), nn.Tanh(), nn.Linear(6, 5)
    return gipip.client_model(nn.Sequential(*layers), label_smoothing=share)


def test_label_smoothing_is_that_of_pytorch_for_client_and_attack():
    batch, model = coloured([2, 4]), smoothing(0.2)
    loss = nn.CrossEntropyLoss(label_smoothing=0.2)(model(batch.images), batch.labels)
    expected = torch.autograd.grad(loss, list(trainable(model).values()))
    update = gipip.Client(model).share(batch)
    torch.testing.assert_close(update.gradients, expected)
    attack = gipip.InvertingGradients(iterations=400, tv_weight=0)
    assert attack(model, update).cost < attack(smoothing(0.0), update).cost / 10
    dpsgd = gipip.DPSGD(max_norm=1e9, noise_multiplier=0)
    defended = gipip.Client(model).share(batch, defenses=[dpsgd])
    torch.testing.assert_close(defended.gradients, expected)


def test_the_traced_gradient_of_smoothed_labels_is_the_eager_one():
    batch, model = coloured([2, 4]), smoothing(0.2).double()
    attack, update = gipip.InvertingGradients(iterations=3), gipip.Client(model).share(batch)
    eager, traced = (attack(model, update, engine=engine) for engine in ("eager", "traced"))
    assert traced.engine == "traced"
    torch.testing.assert_close(traced.history, eager.history, rtol=1e-9, atol=1e-11)


def test_labels_are_inferred_from_a_smoothed_loss():
    batch, model = coloured([1, 1, 4]), smoothing(0.2)
    with torch.no_grad():
        model.network[3].weight.mul_(1e-3)  # as near to uniform predictions as an untrained network
    update = gipip.Client(model).share(batch, labels="withheld")
    result = gipip.InvertingGradients(iterations=1)(model, update)
    assert result.labels.tolist() == [1, 1, 4]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_an_impossible_smoothing_is_refused(share):
    with pytest.raises(ModelError, match="label_smoothing=.*from 0 to less than 1"):
        smoothing(share)


# What acts at random -----------------------------------------------------------


def test_dropout_is_off_and_batchnorm_is_not_in_train_mode():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten()
    network = nn.Sequential(*layers, nn.Linear(144, 5))
    model, batch = gipip.client_model(network), coloured([0, 1])
    first, second = (gipip.Client(model).share(batch, mode="train") for _ in range(2))
    assert all(map(torch.equal, first.gradients, second.gradients))
    found = gipip.InvertingGradients(iterations=2)(model, first)
    assert found.engine == "traced" and not found.notes
    network[2] = nn.Identity()
    expected = local_update(network.train(), trainable(network), batch.images, batch.labels)
    assert all(map(torch.equal, first.gradients, expected))


# Layers without a second derivative in PyTorch ------------------------------------


class Formula(nn.Module):
    """What an activation computes, in operations that autograd differentiates twice."""

    def __init__(self, formula):
        super().__init__()
        self.formula = formula

    def forward(self, x):
        return self.formula(x)


ACTIVATIONS = {
    nn.Hardsigmoid: lambda x: nn.functional.relu6(x + 3) / 6,
    nn.Hardswish: lambda x: x * nn.functional.relu6(x + 3) / 6,
    nn.SiLU: lambda x: x * x.sigmoid(),
    nn.Mish: lambda x: x * nn.functional.softplus(x).tanh(),
    nn.GELU: lambda x: x * torch.special.ndtr(x),
}


def activated(layer):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 6, 3), layer, nn.Flatten(), nn.Linear(216, 5)
    model = gipip.client_model(nn.Sequential(*layers)).double()
    with torch.no_grad():
        model.network[0].weight.mul_(10)  # beyond the pieces' ends
    return model


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_an_activation_is_differentiated_twice_as_its_formula(kind):
    model, same, batch = activated(kind()), activated(Formula(ACTIVATIONS[kind])), coloured([2, 4])
    update = gipip.Client(model).share(batch)
    attack = gipip.InvertingGradients(iterations=3, signed=False)
    traced, eager = attack(model, update), attack(same, update, engine="eager")
    assert traced.engine == "traced" and not traced.notes
    torch.testing.assert_close(traced.history, eager.history, rtol=1e-8, atol=1e-10)


def test_a_layer_that_cannot_be_differentiated_twice_is_named_with_the_remedy():
    def shifted(x):
        grid = nn.functional.affine_grid(torch.eye(2, 3).double().expand(len(x), 2, 3), x.shape)
        return nn.functional.grid_sample(x, grid + 0.1, align_corners=False)

    attack, batch = gipip.InvertingGradients(iterations=1), coloured([2, 4])
    for layer, engine in ((Formula(shifted), "auto"), (nn.Hardsigmoid(), "eager")):
        model = activated(layer)
        update = gipip.Client(model).share(batch)
        with pytest.raises(
            ModelError, match="no derivative in PyTorch.*_backward.*engine to 'auto'"
        ):
            attack(model, update, engine=engine)
