"""What crosses the wire: the gradient of one batch or what local training changes, and
nothing the client withholds.
"""

import copy
import dataclasses

import pydantic
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import DataError, DefenseError, LabelError, ModelError, UpdateError
from gipip.federation.client import Client, FedAvg, local_update
from gipip.federation.defenses import DPSGD, Clipping, GaussianNoise, Soteria, Sparsification
from gipip.federation.models import (
    build_model,
    client_model,
    entering,
    model_fingerprint,
    trainable,
)
from gipip.federation.training import accuracy, train_federated


@pytest.fixture(scope="module")
def data():
    return load_dataset("cifar10")


@pytest.fixture
def softmax_regression():
    model = client_model(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), mean=(0.5,) * 3, std=(0.25,) * 3
    )
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
    integers = [
        value
        for value in vars(withheld).values()
        if isinstance(value, torch.Tensor) and not value.is_floating_point()
    ]
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
    with pytest.raises(
        LabelError, match=f"Label {label} is out of range.*10 classes.*0 to 9.*num_classes"
    ):
        Client(build_model("lenet")).share(batch)


@pytest.mark.parametrize("labels", [torch.tensor([1, 2]).int(), torch.tensor([1.0, 2.0])], ids=str)
@pytest.mark.usefixtures("unchecked")
def test_labels_of_another_type_are_refused(labels):
    with pytest.raises((LabelError, DataError), match="int64"):
        Client(build_model("lenet")).share(LabeledImages(torch.rand(2, 3, 32, 32), labels))


def test_images_of_a_size_the_model_cannot_take_are_refused_with_the_remedy():
    batch = LabeledImages(torch.rand(1, 3, 64, 64), torch.tensor([3]))
    with pytest.raises(ModelError, match=r"\(1, 3, 64, 64\).*image_size=64"):
        Client(build_model("lenet")).share(batch)


def test_a_batch_too_small_for_batch_norm_in_train_mode_is_refused(data):
    layers = [nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.BatchNorm1d(4), nn.Linear(4, 10)]
    client = Client(client_model(nn.Sequential(*layers), (0.5,) * 3, (0.25,) * 3))
    assert client.share(data.private(2), mode="train").batch_size == 2
    with pytest.raises(ModelError, match="cannot take a batch.*more than 1 value per channel"):
        client.share(data.private(1), mode="train")


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"mode": "Train"}, UpdateError, "Unknown mode='Train'. Expected 'eval' or 'train'"),
        ({"labels": "give"}, UpdateError, "Unknown labels='give'. Expected 'given' or 'withheld'"),
        ({"labels": None}, UpdateError, "Unknown labels=None"),
        ({"statistics": "yes"}, UpdateError, "Unknown statistics='yes'. Expected 'shared' or"),
        ({"statistics": True}, UpdateError, "Unknown statistics=True"),
        ({"fedavg": 3}, UpdateError, r"Expected gipip.FedAvg\(steps=…\) as fedavg; got 3"),
        ({"defenses": Clipping(max_norm=1)}, DefenseError, "Expected a list.*got Clipping"),
        ({"defenses": ["clip"]}, DefenseError, r"Expected a list.*got \['clip'\]"),
        ({"defenses": [Clipping]}, DefenseError, "Expected a list.*got .*Clipping"),
        ({"defenses": None}, DefenseError, "Expected a list.*got None"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_an_option_that_is_not_known_is_refused_with_those_that_are(data, options, error, reason):
    with pytest.raises(error, match=reason):
        Client(build_model("lenet")).share(data.private(), **options)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.rand(1, 3, 32, 32), r"torch.float32 of shape \(1, 3, 32, 32\)"),
        (None, "a NoneType"),
        (LabeledImages(torch.rand(0, 3, 32, 32), torch.zeros(0, dtype=torch.int64)), "a Labeled"),
    ],
    ids=["tensor", "None", "no images"],
)
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_batch_is_refused(batch, found):
    with pytest.raises(DataError, match=f"Expected a batch of gipip.LabeledImages; got {found}"):
        Client(build_model("lenet")).share(batch)


def test_a_model_that_gives_no_logits_is_refused(data):
    class Pair(nn.Sequential):
        def forward(self, inputs):
            return super().forward(inputs), inputs

    network = Pair(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(ModelError, match="gives a tuple; expected logits"):
        Client(client_model(network, (0.5,) * 3, (0.25,) * 3)).share(data.private())


@pytest.mark.parametrize("fedavg", [None, FedAvg(steps=2)], ids=["FedSGD", "FedAvg"])
def test_a_parameter_that_the_network_does_not_use_gets_the_gradient_zero(data, fedavg):
    class WithSpare(nn.Sequential):
        def forward(self, inputs):
            return self[0](inputs)

    used = build_model("lenet")
    network = WithSpare(used.network, nn.Linear(3, 4))
    unused = client_model(
        network, used.normalize.mean.flatten().tolist(), used.normalize.std.flatten().tolist()
    )
    plain, padded = (Client(each).share(data.private(), fedavg=fedavg) for each in (used, unused))
    assert all(map(torch.equal, plain.gradients, padded.gradients[:-2]))
    assert [gradient.shape for gradient in padded.gradients[-2:]] == [(4, 3), (4,)]
    assert not any(gradient.any() for gradient in padded.gradients[-2:])
    padded.check(unused)


def test_an_update_can_be_shared_where_gradients_are_switched_off(data):
    client = Client(build_model("lenet"))
    with torch.no_grad():
        update = client.share(data.private())
    assert all(map(torch.equal, update.gradients, client.share(data.private()).gradients))


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
    with pytest.raises(UpdateError, match="another architecture.*model that the client trained"):
        update.check(build_model("convnet"))
    with pytest.raises(UpdateError, match=r"shape \(10, 768\).* has .*shape \(7, 768\)"):
        update.check(build_model("lenet", 7))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named(data, value):
    model = build_model("lenet")
    update = Client(model).share(data.private())
    update.gradients[2][0, 0, 0, 0] = value
    with pytest.raises(UpdateError, match="gradient of network.2.weight holds NaN or infinite"):
        update.check(model)


@pytest.mark.parametrize(
    ("change", "held"),
    [
        (lambda gradients: (*gradients, torch.zeros(1)), r"None, 'torch.float32 of shape \(1,\)'"),
        (lambda gradients: gradients[:-1], "'network.7.bias', None"),
        (lambda gradients: (*gradients[:-1], None), "'network.7.bias', 'a NoneType'"),
        (lambda gradients: (gradients[0].double(), *gradients[1:]), "weight', 'torch.float64"),
        (lambda gradients: (gradients[0].half(), *gradients[1:]), "weight', 'torch.float16"),
    ],
    ids=["one too many", "one too few", "None", "float64", "float16"],
)
@pytest.mark.usefixtures("unchecked")
def test_gradients_that_are_not_the_models_are_refused(data, change, held):
    model = build_model("lenet")
    update = Client(model).share(data.private())
    changed = dataclasses.replace(update, gradients=change(update.gradients))
    with pytest.raises(UpdateError, match=f"holds .*{held}.* where the model has"):
        changed.check(model)


# Local training (FedAvg) -------------------------------------------------------


def network_with_batch_norm(seed=0):
    """Two BatchNorm layers on 6×6 images, in double precision, with running statistics
    that are not those of any batch.
    """
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(20, 3),
    ]
    model = client_model(nn.Sequential(*layers), mean=(0.5,) * 3, std=(0.25,) * 3)
    model(torch.rand(16, 3, 6, 6))  # in train mode: moves them
    return model.double().eval()


@pytest.fixture
def five_images():
    return LabeledImages(
        torch.rand(5, 3, 6, 6, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 2, 1, 2, 0]),
    )


def change_by_sgd(model, batch, minibatches, learning_rate):
    """(θ before − θ after) / (learning rate · steps) of torch's own SGD on a copy."""
    trained = copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=learning_rate)
    for rows in minibatches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(
            trained(batch.images[rows].double()), batch.labels[rows]
        ).backward()
        optimizer.step()
    scale = learning_rate * len(minibatches)
    return [
        (before - after).detach() / scale
        for before, after in zip(model.parameters(), trained.parameters(), strict=True)
    ]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("size", [None, 5, 9])
def test_one_local_step_on_the_whole_batch_shares_the_gradient_of_fedsgd(five_images, mode, size):
    client = Client(network_with_batch_norm())
    gradient = client.share(five_images, mode=mode).gradients
    changed = client.share(
        five_images, mode=mode, fedavg=FedAvg(steps=1, batch_size=size, learning_rate=0.3)
    ).gradients
    torch.testing.assert_close(changed, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("fedavg", "minibatches"),
    [
        (FedAvg(steps=3, learning_rate=0.3), [[0, 1, 2, 3, 4]] * 3),
        (FedAvg(steps=3, batch_size=2, learning_rate=0.3), [[0, 1], [2, 3], [4]]),
        (FedAvg(steps=5, batch_size=2, learning_rate=0.3), [[0, 1], [2, 3], [4], [0, 1], [2, 3]]),
        (FedAvg(steps=7, batch_size=1, learning_rate=0.1), [[0], [1], [2], [3], [4], [0], [1]]),
    ],
    ids=["whole batch", "one pass", "from the beginning again", "single images"],
)
def test_local_training_shares_what_torchs_sgd_changes_on_the_same_mini_batches(
    five_images, fedavg, minibatches, mode
):
    model = network_with_batch_norm()
    update = Client(model).share(five_images, mode=mode, fedavg=fedavg)
    expected = change_by_sgd(
        copy.deepcopy(model).train(mode == "train"), five_images, minibatches, fedavg.learning_rate
    )
    torch.testing.assert_close(list(update.gradients), expected, rtol=1e-7, atol=1e-10)
    assert update.fedavg == fedavg and not any(
        gradient.requires_grad for gradient in update.gradients
    )


def test_local_training_leaves_frozen_parameters_and_the_clients_model_alone(five_images):
    model = network_with_batch_norm()
    model.network[0].requires_grad_(False)
    before = model_fingerprint(model)
    update = Client(model).share(five_images, mode="train", fedavg=FedAvg(steps=3))
    assert model_fingerprint(model) == before
    assert len(update.gradients) == len(list(model.parameters())) - 2
    update.check(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"epochs": 2},
    ],
)
def test_impossible_local_training_is_refused_by_name(settings):
    with pytest.raises(pydantic.ValidationError, match=next(iter(settings))):
        FedAvg(**settings)


LOCAL = [None, FedAvg(steps=3, batch_size=2, learning_rate=0.2)]


def smooth(inputs=27):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 2), nn.Sigmoid(), nn.Linear(2, 3)
    ).double()
    return network, trainable(network)


@pytest.mark.parametrize("fedavg", LOCAL, ids=["FedSGD", "FedAvg"])
def test_the_gradient_of_an_update_in_the_inputs_agrees_with_finite_differences(fedavg):
    network, parameters = smooth()
    inputs, labels = (
        torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor([2, 0, 1]),
    )
    assert gradcheck(
        lambda x: local_update(network, parameters, x, labels, fedavg, create_graph=True), (inputs,)
    )


@pytest.mark.parametrize("fedavg", LOCAL, ids=["FedSGD", "FedAvg"])
def test_the_gradient_of_an_update_in_soft_labels_agrees_with_finite_differences(fedavg):
    network, parameters = smooth()
    inputs, logits = (
        torch.randn(3, 3, 3, 3, dtype=torch.float64),
        torch.randn(3, 3, dtype=torch.float64, requires_grad=True),
    )
    assert gradcheck(
        lambda y: local_update(
            network, parameters, inputs, y.softmax(1), fedavg, create_graph=True
        ),
        (logits,),
    )


@pytest.mark.parametrize("fedavg", LOCAL, ids=["FedSGD", "FedAvg"])
def test_an_update_is_the_same_with_and_without_a_graph(fedavg):
    network, parameters = smooth()
    inputs, labels = (
        torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True),
        torch.tensor([2, 0, 1]),
    )
    plain, graph = (
        local_update(network, parameters, inputs, labels, fedavg, create_graph=choice)
        for choice in (False, True)
    )
    torch.testing.assert_close(plain, graph)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(plain[0].sum(), inputs)


def test_one_hot_labels_give_the_update_of_their_classes():
    network, parameters = smooth()
    inputs, labels = torch.randn(3, 3, 3, 3, dtype=torch.float64), torch.tensor([2, 0, 1])
    one_hot = nn.functional.one_hot(labels, 3).double()
    torch.testing.assert_close(
        local_update(network, parameters, inputs, one_hot),
        local_update(network, parameters, inputs, labels),
    )


# BatchNorm statistics ----------------------------------------------------------


@pytest.mark.parametrize("fedavg", LOCAL, ids=["FedSGD", "FedAvg"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_shared_statistics_are_mean_and_biased_variance_of_what_enters_each_batch_norm(
    five_images, mode, fedavg
):
    model = network_with_batch_norm()
    shared = (
        Client(model).share(five_images, mode=mode, statistics="shared", fedavg=fedavg).statistics
    )
    model.train(mode == "train")
    x, expected = (five_images.images.double() - 0.5) / 0.25, []
    for layer in model.network:
        if isinstance(layer, nn.BatchNorm2d):
            values = x.transpose(0, 1).flatten(1)
            mean = values.sum(1) / values.shape[1]
            expected.append((mean, ((values - mean[:, None]) ** 2).sum(1) / values.shape[1]))
        x = layer(x)
    assert len(shared) == 2
    torch.testing.assert_close(shared, tuple(expected))
    assert not any(value.requires_grad for pair in shared for value in pair)


def test_statistics_are_withheld_unless_shared(five_images):
    assert Client(network_with_batch_norm()).share(five_images).statistics is None


def test_a_network_without_batch_norm_has_no_statistics_to_share(data):
    assert Client(build_model("lenet")).share(data.private(), statistics="shared").statistics == ()


def test_collecting_statistics_leaves_no_hook_behind_even_after_an_error():
    network = network_with_batch_norm().network
    with pytest.raises(ZeroDivisionError), entering(network, nn.BatchNorm2d) as seen:
        raise ZeroDivisionError
    network(torch.rand(1, 3, 6, 6, dtype=torch.float64))
    assert seen == []


# Defences ----------------------------------------------------------------------


@pytest.mark.parametrize("fedavg", [None, FedAvg(steps=2, learning_rate=0.1)])
def test_defenses_are_applied_in_their_order(five_images, fedavg):
    client, defenses = (
        Client(network_with_batch_norm()),
        [GaussianNoise(std=0.1), Clipping(max_norm=0.5)],
    )
    update = client.share(five_images, fedavg=fedavg, defenses=defenses)
    by_hand = defenses[1](defenses[0](client.share(five_images, fedavg=fedavg)))
    assert all(map(torch.equal, update.gradients, by_hand.gradients))
    assert update.defenses == ("noise 0.1", "clip 0.5")
    reverse = client.share(five_images, fedavg=fedavg, defenses=defenses[::-1])
    norms = [
        sum(gradient.square().sum() for gradient in found.gradients).sqrt().item()
        for found in (update, reverse)
    ]
    assert (
        norms[0] == pytest.approx(0.5) and norms[1] > 0.6
    )  # noise after clipping lengthens the gradient again
    update.check(client.model)


def test_a_defence_is_given_the_clients_model_and_batch(five_images):
    seen = []

    def defence(update, *, model, batch):
        seen.append((model, batch))
        return update

    client = Client(network_with_batch_norm())
    client.share(five_images, defenses=[defence])
    assert seen == [(client.model, five_images)]


@pytest.mark.parametrize("defence", [Soteria(pruned=0.5), DPSGD(max_norm=1, noise_multiplier=0.1)])
def test_defences_that_look_at_the_batch_work_when_a_client_shares(five_images, defence):
    client = Client(network_with_batch_norm())
    bare, update = client.share(five_images), client.share(five_images, defenses=[defence])
    assert update.defenses == (str(defence),) and bare.defenses == ()
    assert not all(map(torch.equal, bare.gradients, update.gradients))


# Federated training ------------------------------------------------------------


@pytest.fixture
def bright_or_dark():
    """40 images in two classes that their brightness tells apart."""
    labels = torch.arange(40) % 2
    images = 0.3 * torch.rand(
        40, 3, 6, 6, generator=torch.Generator().manual_seed(0)
    ) + 0.6 * labels.view(-1, 1, 1, 1)
    return LabeledImages(images, labels)


def in_single_precision():
    return network_with_batch_norm().float()


def test_federated_training_learns_and_gives_a_copy_in_eval_mode(bright_or_dark):
    model = in_single_precision()
    before = model_fingerprint(model)
    trained = train_federated(model, bright_or_dark, steps=30, batch_size=8)
    losses = [
        nn.functional.cross_entropy(each(bright_or_dark.images), bright_or_dark.labels).item()
        for each in (model, trained)
    ]
    assert losses[1] < losses[0] / 3 and accuracy(trained, bright_or_dark) == 1
    assert model_fingerprint(model) == before and all(
        parameter.grad is None for parameter in model.parameters()
    )
    assert not any(module.training for module in trained.modules())


def test_federated_training_is_determined_by_its_seed_and_leaves_the_global_generator_alone(
    bright_or_dark,
):
    model = in_single_precision()
    before = torch.get_rng_state()
    prints = [
        model_fingerprint(train_federated(model, bright_or_dark, steps=3, batch_size=4, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_federated_training_ends_with_the_running_statistics_of_all_images(bright_or_dark):
    trained = train_federated(in_single_precision(), bright_or_dark, steps=3, batch_size=4)
    entering = (
        trained.network[0](trained.normalize(bright_or_dark.images)).transpose(0, 1).flatten(1)
    )
    torch.testing.assert_close(trained.network[1].running_mean, entering.mean(1).detach())
    torch.testing.assert_close(trained.network[1].running_var, entering.var(1).detach())


@pytest.mark.parametrize(
    "defenses",
    [[], [Sparsification(sparsity=0.9)], [GaussianNoise(std=1.0), Clipping(max_norm=0.1)]],
)
def test_a_federated_step_is_one_of_sgd_along_the_clipped_update_under_the_clients_defences(
    softmax_regression, defenses
):
    model = softmax_regression.float()
    equal = LabeledImages(
        torch.rand(1, 3, 2, 2).repeat(6, 1, 1, 1), torch.ones(6, dtype=torch.int64)
    )  # whichever are drawn
    shared = Client(model).share(equal[:4], defenses=defenses).gradients
    trained = train_federated(
        model, equal, steps=1, batch_size=4, learning_rate=0.2, defenses=defenses
    )
    scale = min(
        1.0, 1 / torch.cat([gradient.flatten() for gradient in shared]).norm().item()
    )  # the server's clipping
    for before, after, gradient in zip(
        model.parameters(), trained.parameters(), shared, strict=True
    ):
        torch.testing.assert_close(after, before - 0.2 * scale * gradient, atol=1e-5, rtol=1e-4)


class Recorded(DPSGD):
    """DP-SGD that keeps the batches and says nothing of them."""

    max_norm: float = 1.0
    noise_multiplier: float = 1.0
    _batches: list = pydantic.PrivateAttr(default_factory=list)

    def noisy_mean(self, model, batch, size, seed):
        self._batches.append(batch)
        return [torch.zeros_like(parameter) for parameter in model.parameters()]


def test_under_dpsgd_each_image_is_in_each_batch_by_itself_with_the_sample_rate(softmax_regression):
    labels = torch.arange(400) % 3
    images = LabeledImages(torch.rand(400, 3, 2, 2), labels)
    defence = Recorded()
    train_federated(
        softmax_regression.float(), images, steps=300, batch_size=40, defenses=[defence]
    )
    drawn = torch.zeros(300, 400)
    for step, batch in enumerate(defence._batches):
        assert len(batch.indices.unique()) == len(batch)
        drawn[step, batch.indices] = 1
    sizes, times = drawn.sum(dim=1).numpy(), drawn.sum(dim=0).numpy()
    # Binomial(400, 0.1) images a batch and Binomial(300, 0.1) batches an image
    assert abs(sizes.mean() - 40) < 3 * (36 / 300) ** 0.5
    assert sizes.var() == pytest.approx(36, rel=3 * (2 / 300) ** 0.5)
    assert times.var() == pytest.approx(27, rel=3 * (2 / 400) ** 0.5)
    following = drawn[1:] * drawn[:-1]
    assert following.mean() == pytest.approx(0.01, abs=3 * (0.01 / following.numel()) ** 0.5)


def test_a_step_under_dpsgd_divides_the_sum_by_the_expected_size_not_by_the_batchs(
    softmax_regression,
):
    model = softmax_regression.float()
    equal = LabeledImages(
        torch.rand(1, 3, 2, 2).repeat(8, 1, 1, 1), torch.ones(8, dtype=torch.int64)
    )
    single = Client(model).share(equal[:1], defenses=[Clipping(max_norm=0.1)]).gradients
    counts = set()
    for seed in range(12):
        silent = DPSGD(max_norm=0.1, noise_multiplier=0)
        trained = train_federated(
            model, equal, steps=1, batch_size=2, learning_rate=1, defenses=[silent], seed=seed
        )
        moved = [a - b for a, b in zip(model.parameters(), trained.parameters(), strict=True)]
        count = round(2 * (moved[0].norm() / single[0].norm()).item())
        for found, gradient in zip(moved, single, strict=True):
            torch.testing.assert_close(found, count / 2 * gradient, atol=1e-6, rtol=1e-4)
        counts.add(count)
    assert 0 in counts and len(counts) > 2  # an empty batch moves nothing but by its noise


def test_after_dpsgd_a_model_holds_nothing_of_the_data_but_in_its_weights(bright_or_dark):
    model, defence = in_single_precision(), DPSGD(max_norm=1, noise_multiplier=1)
    trained = train_federated(model, bright_or_dark, steps=22, batch_size=4, defenses=[defence])
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(trained.named_buffers())[name], buffer)
    assert not any(map(torch.equal, model.parameters(), trained.parameters()))


def test_after_dpsgd_other_defences_see_the_noisy_gradients_alone(bright_or_dark):
    seen = []

    class Seen(Clipping):
        def __call__(self, update, **private):
            seen.append((update, private))
            return super().__call__(update, **private)

    defenses = [DPSGD(max_norm=1, noise_multiplier=1), Seen(max_norm=0.1)]
    settings = {"steps": 2, "batch_size": 4}
    train_federated(in_single_precision(), bright_or_dark, defenses=defenses, **settings)
    for update, private in seen:
        assert private == {} and update.labels is None and update.statistics is None
        assert update.batch_size == 4
    with pytest.raises(DefenseError, match="Pass the model and batch"):
        defenses[1] = Soteria(pruned=0.5)
        train_federated(in_single_precision(), bright_or_dark, defenses=defenses, **settings)
    with pytest.raises(DefenseError, match="Apply it first"):
        train_federated(in_single_precision(), bright_or_dark, defenses=defenses[::-1], **settings)


def test_a_model_with_groupnorm_learns_under_dpsgd_what_brightness_tells():
    labels = torch.arange(300) % 2
    images = 0.3 * torch.rand(300, 3, 9, 9) + 0.6 * labels.view(-1, 1, 1, 1)
    data = LabeledImages(images, labels)
    model = build_model("convnet16-groupnorm", 2, image_size=9)
    defence = DPSGD(max_norm=1, noise_multiplier=0.5)
    trained = train_federated(model, data, steps=25, batch_size=20, defenses=[defence])
    assert accuracy(trained, data) > 0.9


def test_a_finished_federated_training_is_loaded_from_the_store_and_another_is_not(
    bright_or_dark, tmp_path
):
    shared = []

    class Counted(Clipping):
        def __call__(self, update, **private):
            shared.append(update)
            return super().__call__(update, **private)

    def train(**change):
        settings = {"steps": 2, "batch_size": 4, "defenses": [Counted(max_norm=0.1)]}
        return train_federated(model, bright_or_dark, store=tmp_path, **settings | change)

    model = in_single_precision()
    first, again = train(), train()
    assert model_fingerprint(first) == model_fingerprint(again) and not again.training
    assert len(shared) == 2
    changes = {"seed": 1, "learning_rate": 0.1, "defenses": [Counted(max_norm=0.2)]}
    for number, (name, value) in enumerate(changes.items(), start=2):
        assert model_fingerprint(train(**{name: value})) != model_fingerprint(first)
        assert len(shared) == 2 * number


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        ({"steps": 0}, UpdateError, "Expected steps and batch_size ≥ 1"),
        ({"batch_size": -1}, UpdateError, "Expected steps and batch_size ≥ 1"),
        ({"learning_rate": float("nan")}, UpdateError, "a positive learning_rate"),
        ({"seed": 2**64}, UpdateError, "a seed below 2⁶³"),
        ({"defenses": Clipping(max_norm=1)}, DefenseError, "Expected a list"),
        ({"images": torch.zeros(4, 3, 6, 6)}, DataError, "Expected a batch of gipip.LabeledImages"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_a_federated_training_that_trains_nothing_is_refused(
    bright_or_dark, settings, error, reason
):
    with pytest.raises(error, match=reason):
        train_federated(in_single_precision(), **{"images": bright_or_dark, "steps": 1} | settings)
