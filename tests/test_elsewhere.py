"""Updates of a client that other code trained: its gradients, or its weights before and after."""

import copy
import dataclasses

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gipip
from gipip.errors import (
    BatchSizeError,
    DamagedFileError,
    GipipError,
    LabelError,
    ModelError,
    UpdateError,
)
from gipip.files import write_tensors

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


class Small(nn.Module):
    """Convolution, BatchNorm, a frozen layer, and a linear layer that the loss does not reach."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Conv2d(4, 4, 1).requires_grad_(False)
        self.classifier = nn.Linear(4 * 7 * 7, 5)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return self.classifier(self.frozen(self.norm(self.convolution(x)).tanh()).flatten(1))


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(4, 3, 16, 16, generator=generator)
    return gipip.LabeledImages(images, torch.tensor([0, 3, 1, 3]))


ABOUT = {"batch_size": 4, "image_shape": (3, 16, 16)}


def normalised(batch):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (batch.images - mean) / std


def loop_step(network, batch):
    """What a training loop of plain PyTorch does."""
    loss = nn.CrossEntropyLoss()(network(normalised(batch)), batch.labels)
    loss.backward()


def local_training(network, batch, steps, learning_rate):
    optimizer = torch.optim.SGD(network.parameters(), lr=learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loop_step(network, batch)
        optimizer.step()


def arrays(tensors):
    return [tensor.detach().numpy().copy() for tensor in tensors]


def assert_equal(update, expected):
    assert update.parameter_names == expected.parameter_names
    assert all(map(torch.equal, update.gradients, expected.gradients))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_loss_of_ones_own_loop_is_attacked_as_what_a_client_shares(network, batch, mode):
    model = gipip.client_model(network, MEAN, STD)
    expected = gipip.Client(model).share(batch, mode=mode)
    loop_step(network.train(mode == "train"), batch)
    model = gipip.client_model(network, MEAN, STD)
    update = gipip.SharedUpdate.from_gradients(model, labels=batch.labels, **ABOUT)
    assert update.mode == mode
    assert_equal(update, expected)
    attack = gipip.InvertingGradients(iterations=5)
    found = attack(model, update)
    assert torch.equal(found.images, attack(gipip.client_model(network, MEAN, STD), update).images)
    assert found.assumptions["labels"] == "given"


def test_a_reconstruction_is_the_one_from_the_clients_own_update(network, batch):
    model = gipip.client_model(network.eval(), MEAN, STD)
    attack = gipip.InvertingGradients(iterations=20)
    expected = attack(model, gipip.Client(model).share(batch, labels="withheld"))
    loop_step(network, batch)
    found = attack(model, gipip.SharedUpdate.from_gradients(model, **ABOUT))
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize("form", ["list", "arrays", "dict", "full names", "other order"])
def test_gradients_may_come_as_a_list_or_by_name(network, batch, form):
    model = gipip.client_model(network.eval(), MEAN, STD)
    expected = gipip.Client(model).share(batch)
    gradients = dict(zip(expected.parameter_names, expected.gradients, strict=True))
    short = {name.removeprefix("network."): value for name, value in gradients.items()}
    given = {
        "list": list(gradients.values()),
        "arrays": arrays(gradients.values()),
        "dict": short,
        "full names": gradients,
        "other order": dict(reversed(short.items())),
    }[form]
    assert_equal(gipip.SharedUpdate.from_gradients(model, given, **ABOUT), expected)


def test_gradients_stay_when_the_loop_goes_on(network, batch):
    model = gipip.client_model(network.eval(), MEAN, STD)
    loop_step(network, batch)
    update = gipip.SharedUpdate.from_gradients(model, **ABOUT)
    for parameter in network.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    update.check(model)


def test_labels_may_be_a_list(network, batch):
    model = gipip.client_model(network.eval(), MEAN, STD)
    loop_step(network, batch)
    update = gipip.SharedUpdate.from_gradients(model, labels=[0, 3, 1, 3], **ABOUT)
    assert torch.equal(update.labels, batch.labels)


def test_the_mean_of_several_clients_gradients_is_the_update_of_all_their_images(network, batch):
    model = gipip.client_model(network.eval(), MEAN, STD)
    client = gipip.Client(model)
    expected, *parts = (client.share(rows) for rows in (batch, batch[:2], batch[2:]))
    mean = [sum(both) / 2 for both in zip(*(part.gradients for part in parts), strict=True)]
    update = gipip.SharedUpdate.from_gradients(model, mean, **ABOUT)
    torch.testing.assert_close(update.gradients, expected.gradients)


WRONG = {
    "none": (lambda g: None, {}, UpdateError, r"holds no gradients. Call loss.backward\(\)"),
    "too few": (lambda g: list(g.values())[:-1], {}, UpdateError, "7 tensors were given; .* has 8"),
    "unknown name": (lambda g: g | {"fc": g["norm.bias"]}, {}, UpdateError, "of the name 'fc'"),
    "missing": (
        lambda g: {name: g[name] for name in g if name != "norm.bias"},
        {},
        UpdateError,
        "network.norm.bias is missing",
    ),
    "shape": (
        lambda g: g | {"norm.bias": torch.ones(3)},
        {},
        UpdateError,
        r"norm.bias.*\(3,\).*\(4,\)",
    ),
    "type": (
        lambda g: g | {"norm.bias": torch.ones(4).double()},
        {},
        UpdateError,
        r"norm.bias.*float64.*float32",
    ),
    "no tensor": (
        lambda g: g | {"norm.bias": "x"},
        {},
        UpdateError,
        "norm.bias is a str; expected",
    ),
    "no list": (lambda g: 3, {}, UpdateError, "Expected a list or a dict of tensors; got a int"),
    "not finite": (
        lambda g: g | {"norm.bias": torch.full((4,), torch.nan)},
        {},
        UpdateError,
        "norm.bias holds NaN",
    ),
    "zero": (
        lambda g: {name: torch.zeros_like(g[name]) for name in g},
        {},
        UpdateError,
        "zero everywhere",
    ),
    "no image": (dict, {"batch_size": 0}, UpdateError, "batch_size=0.*expected a whole number"),
    "no shape": (dict, {"image_shape": (16, 16)}, UpdateError, "three: channels, height and width"),
    "other shape": (dict, {"image_shape": (1, 16, 16)}, ModelError, "cannot take a batch of shape"),
    "mode": (dict, {"mode": "Train"}, UpdateError, "Unknown mode='Train'"),
    "few labels": (dict, {"labels": [1, 2]}, BatchSizeError, "4 images but 2 labels"),
    "label": (dict, {"labels": [1, 2, 3, 5]}, LabelError, "Label 5 is out of range"),
    "float labels": (dict, {"labels": torch.rand(4)}, LabelError, "torch.float32; expected int64"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_the_model_is_refused_with_what_was_expected(network, batch, kind):
    change, about, error, reason = WRONG[kind]
    model = gipip.client_model(network.eval(), MEAN, STD)
    update = gipip.Client(model).share(batch)
    names = (name.removeprefix("network.") for name in update.parameter_names)
    given = change(dict(zip(names, update.gradients, strict=True)))
    with pytest.raises(error, match=reason):
        gipip.SharedUpdate.from_gradients(model, given, **{**ABOUT, **about})


@pytest.mark.usefixtures("unchecked")
def test_a_network_without_its_normalisation_is_refused_with_the_remedy(network, batch):
    loop_step(network, batch)
    with pytest.raises(ModelError, match="gipip.client_model.*without mean and std"):
        gipip.SharedUpdate.from_gradients(network, **ABOUT)


def test_a_network_that_takes_images_in_0_to_1_needs_no_mean_and_std(network, batch):
    model = gipip.client_model(network.eval())
    nn.functional.cross_entropy(network(batch.images), batch.labels).backward()
    update = gipip.SharedUpdate.from_gradients(model, **ABOUT)
    assert_equal(update, gipip.Client(model).share(batch))
    images = gipip.InvertingGradients(iterations=1)(model, update).images
    assert images.min() >= 0 and images.max() <= 1


# Weights -----------------------------------------------------------------------


FORMS = {
    "state_dict": lambda network: copy.deepcopy(network.state_dict()),
    "arrays": lambda network: arrays(network.state_dict().values()),
    "parameters": lambda network: arrays(network.parameters()),
    "trained": lambda network: arrays(p for p in network.parameters() if p.requires_grad),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_weights_before_and_after_give_the_update_of_local_training(network, batch, form, mode):
    model = gipip.client_model(network, MEAN, STD)
    fedavg = gipip.FedAvg(steps=3, learning_rate=0.1)
    expected = gipip.Client(model).share(batch, mode=mode, fedavg=fedavg)
    trained = copy.deepcopy(network).train(mode == "train")
    local_training(trained, batch, steps=3, learning_rate=0.1)
    before, after = FORMS[form](network), FORMS[form](trained)
    known = {} if form in ("state_dict", "arrays") else {"mode": mode}  # else by the buffers
    update = gipip.SharedUpdate.from_weights(
        model, before, after, steps=3, learning_rate=0.1, **ABOUT, **known
    )
    assert (update.mode, update.fedavg) == (mode, fedavg)
    torch.testing.assert_close(update.gradients, expected.gradients, rtol=1e-4, atol=1e-6)
    attack = gipip.InvertingGradients(iterations=2)
    assumed = attack.assumptions(update)["local training"]
    assert assumed == "3 steps, each on all images"


def test_an_unknown_order_of_mini_batches_matters_only_to_second_order(network, batch):
    model = gipip.client_model(network.eval(), MEAN, STD).double()
    images = TensorDataset(normalised(batch).double(), batch.labels)
    errors = []
    for rate in (0.01, 0.001):
        trained = copy.deepcopy(network)
        optimizer = torch.optim.SGD(trained.parameters(), lr=rate)
        loader = DataLoader(images, 2, shuffle=True, generator=torch.Generator().manual_seed(3))
        for inputs, labels in (step for _ in range(3) for step in loader):
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(inputs), labels).backward()
            optimizer.step()
        weights = network.state_dict(), trained.state_dict()
        update = gipip.SharedUpdate.from_weights(
            model, *weights, steps=6, learning_rate=rate, **ABOUT
        )
        simulated = gipip.Client(model).share(batch, fedavg=update.fedavg)
        pairs = zip(update.gradients, simulated.gradients, strict=True)
        errors.append(max(float((a - b).abs().max()) for a, b in pairs))
    assert 0 < errors[1] < errors[0] / 5


def test_weights_that_the_model_does_not_hold_are_refused_with_the_remedy(network, batch):
    before = arrays(network.state_dict().values())
    local_training(network, batch, steps=1, learning_rate=0.1)
    after = arrays(network.state_dict().values())
    model = gipip.client_model(network, MEAN, STD)
    options = {"steps": 1, "learning_rate": 0.1, **ABOUT}
    with pytest.raises(UpdateError, match="not what `before` holds.*load_state_dict"):
        gipip.SharedUpdate.from_weights(model, before, after, **options)
    with pytest.raises(UpdateError, match="zero everywhere"):
        gipip.SharedUpdate.from_weights(model, after, after, **options)
    with pytest.raises(UpdateError, match="5 tensors were given; the model has .*state_dict"):
        gipip.SharedUpdate.from_weights(model, after[:5], after, **options)
    with pytest.raises(UpdateError, match=r"convolution.weight is .*float64.*model has .*float32"):
        gipip.SharedUpdate.from_weights(model, [x.astype("f8") for x in after], after, **options)
    with pytest.raises(UpdateError, match="spare.weight is missing"):
        state = {name: value for name, value in network.state_dict().items() if "spare" not in name}
        gipip.SharedUpdate.from_weights(model, state, state, **options)


# Files -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": "withheld", "mode": "train", "statistics": "shared"},
        {"fedavg": gipip.FedAvg(steps=2, batch_size=2), "defenses": [gipip.Clipping(max_norm=1)]},
    ],
    ids=["plain", "statistics", "FedAvg"],
)
def test_an_update_comes_back_from_its_file_as_it_was(network, batch, options, tmp_path):
    model = gipip.client_model(network, MEAN, STD)
    update = gipip.Client(model).share(batch, **options)
    loaded = gipip.SharedUpdate.load(update.save(tmp_path / "update.safetensors"), model)
    for field in dataclasses.fields(update):
        one, other = getattr(update, field.name), getattr(loaded, field.name)
        torch.testing.assert_close(other, one, rtol=0, atol=0) if field.name in (
            "gradients",
            "labels",
            "statistics",
        ) and one is not None else None
        assert field.name in ("gradients", "labels", "statistics") or one == other
    attack = gipip.InvertingGradients(iterations=2)
    assert torch.equal(attack(model, loaded).images, attack(model, update).images)


def test_a_file_of_another_model_or_of_no_update_is_refused(network, batch, tmp_path):
    model = gipip.client_model(network, MEAN, STD)
    path = gipip.Client(model).share(batch).save(tmp_path / "update.safetensors")
    with torch.no_grad():
        network.norm.bias += 1
    with pytest.raises(UpdateError, match="from other weights"):
        gipip.SharedUpdate.load(path, model)
    with pytest.raises(UpdateError, match="from another architecture"):
        gipip.SharedUpdate.load(path, gipip.build_model("lenet"))
    other = write_tensors(tmp_path / "other.safetensors", {"x": torch.ones(1)}, {})
    with pytest.raises(UpdateError, match=r"other.safetensors holds no update.*update.save"):
        gipip.SharedUpdate.load(other)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedFileError, match="checksum"):
        gipip.SharedUpdate.load(path)


def test_nothing_of_the_images_but_the_gradient_is_in_the_file(network, batch, tmp_path):
    model = gipip.client_model(network, MEAN, STD)
    update = gipip.Client(model).share(batch, labels="withheld")
    written = update.save(tmp_path / "update.safetensors").read_bytes()
    assert numpy.asarray(batch.images[0, 0, 0]).tobytes() not in written
    assert issubclass(UpdateError, GipipError)
