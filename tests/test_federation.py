"""What crosses the wire: the gradient of one batch, and nothing the client withholds."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from gipip.data import LabeledImages, load_dataset
from gipip.errors import LabelError, ModelError, UpdateError
from gipip.federation import Client
from gipip.models import build_model, client_model, model_fingerprint


@pytest.fixture(scope="module")
def data():
    return load_dataset("cifar10")


@pytest.fixture
def softmax_regression():
    model = client_model(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), mean=(0.5,) * 3, std=(0.25,) * 3)
    return model.double()


def test_the_update_equals_the_gradient_of_softmax_regression_worked_by_hand(softmax_regression):
    batch = LabeledImages(torch.rand(4, 3, 2, 2), torch.tensor([0, 2, 1, 2]))
    update = Client(softmax_regression).share(batch)
    x = ((batch.images.double() - 0.5) / 0.25).flatten(1)
    layer = softmax_regression.network[1]
    residual = (x @ layer.weight.T + layer.bias).softmax(1) - nn.functional.one_hot(batch.labels, 3)
    torch.testing.assert_close(update.gradients[0], residual.T @ x / 4)
    torch.testing.assert_close(update.gradients[1], residual.mean(0))


@pytest.mark.parametrize("name", ["convnet", "lenet"])
def test_the_update_equals_backward_on_the_mean_cross_entropy(data, name):
    model, batch = build_model(name), data.private(batch_size=4, seed=1)
    update = Client(model).share(batch)
    nn.functional.cross_entropy(model(batch.images), batch.labels).backward()
    assert update.parameter_names == tuple(name for name, _ in model.named_parameters())
    for gradient, parameter in zip(update.gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_update_says_what_it_was_computed_on(data):
    model = build_model("lenet")
    update = Client(model).share(data.private(batch_size=4), mode="train")
    assert (update.batch_size, update.image_shape, update.mode) == (4, (3, 32, 32), "train")
    assert update.model_fingerprint == model_fingerprint(model)


def test_given_labels_are_shared_and_withheld_ones_are_nowhere_in_the_update(data):
    client, batch = Client(build_model("lenet")), data.private(batch_size=4)
    assert torch.equal(client.share(batch).labels, batch.labels)
    withheld = client.share(batch, labels="withheld")
    assert withheld.labels is None
    integers = [value for value in vars(withheld).values() if isinstance(value, torch.Tensor) and not value.is_floating_point()]
    assert integers == []


def test_neither_images_nor_a_graph_to_them_are_shared(data):
    batch = data.private(batch_size=2)
    update = Client(build_model("lenet")).share(batch)
    assert not any(gradient.requires_grad for gradient in update.gradients)
    assert all(gradient.shape != batch.images.shape for gradient in update.gradients)


def test_train_and_eval_mode_differ_on_a_network_with_batch_norm(data):
    client, batch = Client(build_model("convnet")), data.private(batch_size=4)
    evaluated, trained = (client.share(batch, mode=mode).gradients[0] for mode in ("eval", "train"))
    assert not torch.allclose(evaluated, trained, rtol=0.1)


def test_train_and_eval_mode_agree_on_a_network_without_batch_norm(data):
    client, batch = Client(build_model("lenet")), data.private(batch_size=4)
    evaluated, trained = (client.share(batch, mode=mode).gradients for mode in ("eval", "train"))
    assert all(map(torch.equal, evaluated, trained))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_sharing_leaves_the_clients_model_as_it_was(data, mode):
    model = build_model("convnet")
    before = copy.deepcopy(model.state_dict())
    Client(model).share(data.private(batch_size=4), mode=mode)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("label", [-100, -1, 10])
def test_a_label_out_of_range_is_refused_with_the_range(label):
    batch = LabeledImages(torch.rand(2, 3, 32, 32), torch.tensor([3, label]))
    with pytest.raises(LabelError, match=f"Label {label} is out of range.*10 classes.*0 to 9.*num_classes"):
        Client(build_model("lenet")).share(batch)


def test_images_of_a_size_the_model_cannot_take_are_refused_with_the_remedy():
    batch = LabeledImages(torch.rand(1, 3, 64, 64), torch.tensor([3]))
    with pytest.raises(ModelError, match=r"\(1, 3, 64, 64\).*image_size=64"):
        Client(build_model("lenet")).share(batch)


def test_an_update_cannot_be_used_with_a_model_without_normalisation_layer(data):
    model = build_model("lenet")
    update = Client(model).share(data.private())
    with pytest.raises(ModelError, match="no normalisation layer.*client_model"):
        update.check(model.network)


def test_frozen_parameters_are_not_shared(data):
    model = build_model("lenet")
    model.network[0].requires_grad_(False)
    update = Client(model).share(data.private())
    assert update.parameter_names == tuple(name for name, _ in model.named_parameters())[2:]
    update.check(model)


def test_an_update_passes_the_check_against_its_own_model_and_no_other(data):
    model = build_model("lenet")
    update = Client(model).share(data.private())
    update.check(model)
    with pytest.raises(UpdateError, match="other weights.*very model that the server sent"):
        update.check(build_model("lenet", seed=1))
    with pytest.raises(UpdateError, match="8 gradients do not fit the model's 26 parameters.*another architecture"):
        update.check(build_model("convnet"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(data, value):
    model = build_model("lenet")
    update = Client(model).share(data.private())
    update.gradients[2][0, 0, 0, 0] = value
    with pytest.raises(UpdateError, match="gradient of network.2.weight holds NaN or infinite"):
        update.check(model)


def test_an_update_with_a_gradient_too_many_is_refused(data):
    model = build_model("lenet")
    update = Client(model).share(data.private())
    longer = dataclasses.replace(update, gradients=(*update.gradients, torch.zeros(1)))
    with pytest.raises(UpdateError, match="9 gradients do not fit"):
        longer.check(model)
