"""What the last layer's gradient gives away, against the features that a forward pass computes."""

import dataclasses

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

import gipip
from gipip.errors import UpdateError


@pytest.fixture(scope="module")
def data():
    return gipip.load_dataset("cifar10")


def true_features(model, batch, mode="eval"):
    """What enters the model's last layer."""
    entered = []
    *_, last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    hook = last.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].double()))
    with torch.no_grad():
        model.train(mode == "train")(batch.images.to(next(model.parameters())))
    hook.remove()
    model.eval()
    return entered[0]


def distances(recovered, truth):
    """Relative errors of each image's features; images of one label are interchangeable."""
    errors = torch.cdist(recovered.features, truth) / truth.norm(dim=1)
    rows, columns = linear_sum_assignment(errors.clamp(max=10))
    return errors[rows, columns]


def recovered_and_errors(model, batch, mode="eval", **options):
    update = gipip.Client(model).share(batch, mode=mode, **options)
    recovered = gipip.recover_features(model, update)
    return recovered, distances(recovered, true_features(model, batch, mode))


@pytest.mark.parametrize("name", ["convnet16", "convnet", "resnet18"])
@pytest.mark.parametrize("size", [1, 4, 8])
def test_untrained_clients_give_away_every_image_exactly(data, name, size):
    recovered, errors = recovered_and_errors(gipip.build_model(name), data.tuning(size, seed=1))
    assert recovered.status == "exact"
    assert errors.max() < 1e-6


def test_the_features_come_in_the_order_of_the_labels(data):
    model, batch = gipip.build_model("convnet16"), data.tuning(8, seed=2)
    recovered = gipip.recover_features(model, gipip.Client(model).share(batch))
    truth = true_features(model, batch)
    assert (recovered.features - truth).norm() < 1e-6 * truth.norm()
    assert torch.equal(recovered.labels, batch.labels)
    with torch.no_grad():
        assert torch.allclose(recovered.logits.float(), model(batch.images), atol=1e-5)


def test_repeated_labels_are_told_apart(data):
    batch = data.tuning(8, seed=3, distinct_labels=False)
    assert len(batch.labels.unique()) < 8
    recovered, errors = recovered_and_errors(gipip.build_model("resnet18"), batch)
    assert recovered.status == "exact"
    assert errors.max() < 1e-3


@pytest.mark.parametrize("epochs", [40, 100])
def test_most_batches_of_two_fall_apart_on_trained_clients(data, epochs):
    model, exact = gipip.load_model("convnet16", "cifar10", epochs), 0
    for seed in range(5):
        recovered, errors = recovered_and_errors(model, data.tuning(2, seed=seed))
        exact += recovered.status == "exact" and bool(errors.max() < 1e-3)
    assert exact >= 4


@pytest.mark.parametrize(("epochs", "size"), [(0, 8), (60, 4), (100, 4), (100, 8)])
def test_no_wrong_answer_is_called_exact_and_errors_are_foretold(data, epochs, size):
    model = gipip.load_model("convnet16", "cifar10", epochs)
    for seed in range(4):
        batch = data.tuning(size, seed=seed, distinct_labels=False)
        recovered, errors = recovered_and_errors(model, batch)
        if recovered.status == "exact":
            assert errors.max() < 0.1
        if recovered.residual < 5e-6:
            assert errors.median() < 10 * recovered.errors.median()


def test_withheld_labels_are_found_with_the_features(data):
    model = gipip.load_model("convnet16", "cifar10", 40)
    batch = data.tuning(2, seed=1)
    recovered, errors = recovered_and_errors(model, batch, labels="withheld")
    assert recovered.status == "exact"
    assert sorted(recovered.labels.tolist()) == sorted(batch.labels.tolist())
    assert errors.max() < 1e-4


def test_clipping_does_not_protect_features(data):
    clipping = gipip.Clipping(max_norm=0.01)
    model, batch = gipip.build_model("convnet16"), data.tuning(4, seed=1)
    recovered, errors = recovered_and_errors(model, batch, defenses=[clipping])
    assert recovered.status == "exact"
    assert errors.max() < 1e-5


def test_batch_statistics_do_not_protect_features(data):
    model, batch = gipip.build_model("convnet16"), data.tuning(4, seed=1)
    recovered, errors = recovered_and_errors(model, batch, mode="train")
    assert recovered.status == "exact"
    assert errors.max() < 1e-4


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"defenses": [gipip.GaussianNoise(std=1e-4)]}, 0.03),
        ({"defenses": [gipip.Clipping(max_norm=0.1), gipip.GaussianNoise(std=1e-5)]}, 0.02),
        ({"defenses": [gipip.DPSGD(max_norm=1, noise_multiplier=1e-3)]}, 0.1),
        ({"defenses": [gipip.Sparsification(sparsity=0.5)]}, 0.1),
        ({"fedavg": gipip.FedAvg(steps=2)}, 0.005),
        ({"fedavg": gipip.FedAvg(steps=8)}, 0.02),
    ],
    ids=["noise", "clipping and noise", "DP-SGD", "sparsity", "2 steps", "8 steps"],
)
def test_what_other_defences_leave_is_approximate_and_its_error_foretold(data, options, bound):
    model, batch = gipip.build_model("convnet16"), data.tuning(4, seed=1)
    recovered, errors = recovered_and_errors(model, batch, **options)
    assert recovered.status == "approximate"
    assert errors.max() < bound
    assert 0.3 < errors.median() / recovered.errors.median() < 3


def test_features_that_soteria_leaves_are_recovered(data):
    model, batch = gipip.build_model("convnet16"), data.tuning(4, seed=1)
    update = gipip.Client(model).share(batch, defenses=[gipip.Soteria(pruned=0.2)])
    recovered = gipip.recover_features(model, update)
    truth = true_features(model, batch)
    lost = truth[:, ~recovered.known].norm() / truth.norm()
    errors = (recovered.features - truth)[:, recovered.known].norm(dim=1) / truth.norm(dim=1)
    assert recovered.status == "approximate"
    assert lost > 0.5  # of which nothing is said
    assert errors.max() < 1e-3


def test_a_layer_without_bias_gives_features_away(data):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10, False))
    model, batch = gipip.client_model(network, (0.5,) * 3, (0.25,) * 3), data.tuning(4, seed=1)
    recovered, errors = recovered_and_errors(model, batch)
    assert recovered.status == "exact"
    assert errors.max() < 1e-4


def test_as_many_images_as_classes_are_refused(data):
    model = gipip.build_model("convnet16")
    update = gipip.Client(model).share(data.tuning(10))
    with pytest.raises(UpdateError, match="fewer images than classes"):
        gipip.recover_features(model, update)


def test_a_frozen_last_layer_is_refused(data):
    model = gipip.build_model("convnet16")
    for parameter in list(model.parameters())[-2:]:
        parameter.requires_grad_(False)
    update = gipip.Client(model).share(data.tuning(2))
    with pytest.raises(UpdateError, match="frozen"):
        gipip.recover_features(model, update)


def test_the_result_cannot_be_changed(data):
    model = gipip.build_model("convnet16")
    recovered = gipip.recover_features(model, gipip.Client(model).share(data.tuning(1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recovered.status = "exact"
