"""Every engine gives what autograd's double backward gives, or leaves it to that and says so."""

import gc

import psutil
import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gipip
from gipip.attacks import ATTACKS
from gipip.attacks.engines import ENGINES, client_gradient
from gipip.attacks.objectives import Gradients, cosine_distance
from gipip.attacks.view import View
from gipip.errors import EngineError
from gipip.federation.client import local_update
from gipip.federation.models import client_model, trainable
from gipip.priors.gan import GenerativePrior, Generator


class Unusual(nn.Module):
    """Grouped, dilated, strided and transposed convolutions, group normalisation, tanh
    and a frozen layer.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=2, dilation=2, groups=3)
        self.second = nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1, output_padding=1, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.frozen = nn.Conv2d(4, 4, 3).requires_grad_(False)
        self.linear = nn.Linear(4 * 4 * 4, 10)

    def forward(self, x):
        x = self.norm(self.second(self.first(x).tanh()))
        return self.linear(
            nn.functional.adaptive_avg_pool2d(self.frozen(x).sigmoid(), 4).flatten(1)
        )


def _model(name):
    if name == "unusual":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return client_model(Unusual(), (0.5,) * 3, (0.25,) * 3)
    return gipip.build_model(name)


def _update(model, batch_size=3, size=32, **options):
    """Of random images, with the labels 0, 1, 2, …"""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch_size, 3, size, size, generator=generator)
    batch = gipip.LabeledImages(images, torch.arange(batch_size))
    return gipip.Client(model).share(batch, **options)


def _gradient(model, update, engine, **options):
    return View.of(model, update, engine, **options).gradients


def _second_derivative(gradient, images, labels, directions):
    """The gradients, and the derivative of their product with the directions by images
    and soft labels.
    """
    variables = [x.clone().requires_grad_() for x in (images, labels) if x.is_floating_point()]
    images, labels = variables if len(variables) == 2 else (variables[0], labels)
    gradients = gradient(images, labels)
    product = sum((a * b).sum() for a, b in zip(gradients, directions, strict=True))
    return [g.detach() for g in gradients], torch.autograd.grad(product, variables)


def _both(model, engine="traced", *, soft=False, dtype=torch.float64, update=None, **options):
    """What the reference and the engine give at random images and directions."""
    model = model.to(dtype)
    update = update or _update(model, **options)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(update.batch_size, *update.image_shape, generator=generator).to(dtype)
    labels = torch.arange(update.batch_size)
    if soft:
        labels = torch.rand(len(images), 10, generator=generator).to(dtype).softmax(dim=1)
    directions = [torch.randn(g.shape, generator=generator).to(dtype) for g in update.gradients]
    return [
        _second_derivative(_gradient(model, update, which), images, labels, directions)
        for which in ("eager", engine)
    ]


def _assert_same(expected, found):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "fedavg",
    [None, gipip.FedAvg(steps=3, batch_size=2, learning_rate=0.1)],
    ids=["FedSGD", "FedAvg"],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "name", ["convnet16", "convnet16-groupnorm", "lenet", "unusual", "resnet18"]
)
def test_the_traced_gradient_and_its_derivative_are_the_eager_ones_in_float64(name, mode, fedavg):
    if name == "resnet18" and fedavg:
        fedavg = gipip.FedAvg(steps=2, batch_size=1)
    size = 2 if name == "resnet18" else 3
    expected, found = _both(_model(name), mode=mode, fedavg=fedavg, batch_size=size)
    _assert_same(expected, found)


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [
        ("convnet", 1),
        ("convnet", 3),
        ("lenet", 3),
        ("unusual", 3),
        ("resnet18", 1),
    ],  # with 3, a ReLU's input is zero but for rounding
)
def test_the_traced_derivative_is_the_eager_one_within_float32_rounding(name, batch_size):
    model = _model(name)
    (_, expected), (_, found) = _both(model, dtype=torch.float32, batch_size=batch_size)
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()


def test_labels_can_be_optimised_through_the_traced_gradient():
    expected, found = _both(_model("lenet"), soft=True)
    assert len(found[1]) == 2
    _assert_same(expected, found)


def _short(name, model):
    """The attack of this name on the model, with three iterations."""
    kind, settings = ATTACKS[name], {"iterations": 3}
    if "signed" in kind.model_fields:
        settings["signed"] = False
    if name == "gipip":
        settings["prior"] = gipip.load_prior()
    if name == "features":
        images = gipip.load_dataset("cifar10").auxiliary()[:100]
        settings["prior"] = gipip.train_decoder(model, images, steps=0, copies=1)
    if name in ("latent", "gias"):
        torch.manual_seed(0)
        settings["prior"] = GenerativePrior(Generator(width=8, latent_size=8))
    if name == "dlg":
        settings |= {"iterations": 2, "inner_iterations": 3}
    if name == "gias":
        settings["latent_iterations"] = 2
    return kind(**settings)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_takes_the_same_course_traced_as_eagerly(name, masked):
    model = gipip.build_model("convnet16").double()
    attack = _short(name, model)
    if masked and "masked" not in type(attack).model_fields:
        pytest.skip("this attack has no masked form")
    attack = attack.model_copy(update={"masked": True}) if masked else attack
    update = _update(model, 2, statistics="shared")
    eager, traced = (attack(model, update, engine=engine) for engine in ("eager", "traced"))
    assert (eager.engine, traced.engine) == ("eager", "traced")
    torch.testing.assert_close(traced.history, eager.history, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(traced.images, eager.images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8])
def test_a_gradient_in_chunks_is_the_whole_one(chunk_size):
    model = gipip.build_model("convnet16").double()
    update, images, labels = _update(model, 5), torch.randn(5, 3, 32, 32).double(), torch.arange(5)
    directions = [torch.randn_like(gradient) for gradient in update.gradients]
    expected, found = (
        _second_derivative(
            _gradient(model, update, "traced", chunk_size=size), images, labels, directions
        )
        for size in (None, chunk_size)
    )
    _assert_same(expected, found)


def _without_running_statistics():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()
    return client_model(nn.Sequential(*layers, nn.LazyLinear(10)), (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("network", "changes", "options"),
    [
        ("convnet16", {"mode": "train"}, {}),
        ("lenet", {"fedavg": gipip.FedAvg(steps=2)}, {}),
        ("lenet", {}, {"engine": "eager"}),
        ("lenet", {}, {"chunk_size": -1}),
        ("without running statistics", {}, {}),  # batch statistics in eval mode, too
    ],
)
def test_chunks_are_refused_where_they_would_not_be_exact(network, changes, options):
    own = network == "without running statistics"
    model = _without_running_statistics() if own else gipip.build_model(network)
    model(torch.zeros(2, 3, 32, 32))
    update = _update(model.eval(), 2, **changes)
    with pytest.raises(EngineError, match="chunk"):
        gipip.InvertingGradients(iterations=1)(model, update, **{"chunk_size": 1} | options)


def test_on_a_cpu_the_traced_engine_is_chosen():
    model = gipip.build_model("lenet")
    assert client_gradient(model, _update(model)).name == "traced"


@pytest.mark.parametrize(
    ("engine", "message"), [("fast", "Unknown engine 'fast'"), ("cudagraph", "NVIDIA GPU")]
)
def test_an_engine_that_cannot_run_is_refused_before_the_first_iteration(engine, message):
    model = gipip.build_model("lenet")
    with pytest.raises(EngineError, match=message):
        gipip.InvertingGradients(iterations=1)(model, _update(model), engine=engine)


# Networks that are traced, and those that are left to the reference ------------------------------


class InPlace(nn.Module):
    """Layers that work in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4 * 15 * 15, 10)

    def forward(self, x):
        x = nn.functional.relu_(self.first(x))
        y = self.second(x)
        y += x
        return self.linear(nn.functional.max_pool2d(y.mul_(2).relu_(), 2).flatten(1))


class Views(nn.Module):
    """Depends on how its tensors lie in memory."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, stride=2)
        self.linear = nn.Linear(8 * 14 * 14, 10)

    def forward(self, x):
        x = self.first(x)
        x = x.as_strided((len(x), 4, 30, 30), (3600, 900, 30, 1)).sigmoid()
        return self.linear(self.second(x).view(len(x), -1).reshape(len(x), 28, 56).flatten(1))


class Patches(nn.Module):
    """A vision transformer in small: patch embedding with a bias, attention."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True)
        self.linear = nn.Linear(16, 10)

    def forward(self, x):
        return self.linear(self.layer(self.embed(x).flatten(2).transpose(1, 2)).mean(dim=1))


class Normalised(nn.Module):
    """Normalisation over each image, and over the batch even in eval mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Tanh()),
            *(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Tanh()),
            *(nn.Flatten(), nn.Linear(4 * 28 * 28, 10)),
        )

    def forward(self, x):
        return self.layers(x)


def _alexnet():
    """torchvision's, whose convolutions have biases and few positions, at 64 × 64."""
    return torchvision.models.AlexNet(num_classes=10, dropout=0)


@pytest.mark.parametrize("kind", [InPlace, Views, Patches, Normalised])
def test_an_unusual_network_is_attacked_by_the_traced_engine_as_by_the_reference(kind):
    torch.manual_seed(0)
    model = client_model(kind(), (0.5,) * 3, (0.25,) * 3).eval().double()
    attack, update = gipip.InvertingGradients(iterations=3, signed=False), _update(model)
    eager, traced = (attack(model, update, engine=engine) for engine in ("eager", "traced"))
    assert traced.engine == "traced" and not traced.notes
    torch.testing.assert_close(traced.history, eager.history, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(traced.images, eager.images, rtol=0, atol=1e-6)


def test_convolutions_with_biases_whose_weight_gradients_are_not_formed_are_differentiated():
    torch.manual_seed(0)
    model = client_model(_alexnet(), (0.5,) * 3, (0.25,) * 3).eval()
    attack, update = gipip.InvertingGradients(iterations=1), _update(model, 1, size=64)
    eager, traced = (attack(model, update, engine=engine) for engine in ("eager", "traced"))
    assert traced.engine == "traced"
    torch.testing.assert_close(traced.history, eager.history, rtol=1e-4, atol=1e-6)


class Branching(nn.Module):
    """Decides on the values it sees, which no recording can repeat."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x):
        return self.linear(x.flatten(1)) * (2 if x.mean() > 0 else 3)


def test_a_network_that_cannot_be_recorded_is_left_to_the_reference_and_the_result_says_so():
    torch.manual_seed(0)
    model = client_model(Branching(), (0.5,) * 3, (0.25,) * 3)
    attack, update = gipip.InvertingGradients(iterations=3), _update(model)
    found, expected = attack(model, update), attack(model, update, engine="eager")
    assert found.engine == "eager" and "cannot be recorded" in found.notes[0]
    assert torch.equal(found.images, expected.images)


def test_a_recording_is_kept_for_other_weights_and_not_for_another_network():
    def build(slope, seed):
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.LeakyReLU(slope), nn.Flatten()
        network = nn.Sequential(*layers, nn.Linear(900, 10))
        network[1].running_mean.normal_()
        return client_model(network, (0.5,) * 3, (0.25,) * 3).eval().double()

    with _Calls() as first:
        _both(build(0.1, seed=0))
    for model in (build(0.1, seed=1), build(0.3, seed=0)):
        with _Calls() as again:
            expected, found = _both(model)
        _assert_same(expected, found)
        if model.network[2].negative_slope == 0.1:
            assert len(again.found) < len(first.found), "it was recorded a second time"


def test_attacks_one_after_another_keep_no_memory():
    model = gipip.build_model("resnet18")  # whose weights take 45 MB
    attack, update = gipip.InvertingGradients(iterations=1), _update(model, 1)

    def held_after_three_attacks():
        for _ in range(3):
            attack(model, update)
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20

    before = held_after_three_attacks()
    assert held_after_three_attacks() - before < 60


# What it costs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_the_traced_derivative_takes_no_more_arithmetic_than_needed(name):
    model = _model(name)
    network, labels, images = model.network, torch.arange(1), torch.randn(1, 3, 32, 32)
    gradient = _gradient(model, _update(model, 1), "traced")

    def derivative():
        variable = images.clone().requires_grad_() * 1  # the counter cannot take a leaf
        torch.autograd.grad(sum(g.square().sum() for g in gradient(variable, labels)), variable)

    derivative()
    one_pass = _multiplications(lambda: local_update(network, trainable(network), images, labels))
    assert _multiplications(derivative) == pytest.approx(7 / 3 * one_pass, rel=0.01)


def _multiplications(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class _Calls(TorchDispatchMode):
    """Collects which operations run, and on results of how many numbers."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        self.found += [(str(function), result.numel())] if isinstance(result, torch.Tensor) else []
        return result


def test_the_traced_derivative_fills_no_layer_with_zeros_and_renames_no_weight():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, 1, 1),
        nn.Flatten(),
        nn.Linear(4 * 33 * 33, 10),
    )
    model = client_model(network, (0.5,) * 3, (0.25,) * 3)
    gradient = _gradient(model, _update(model, 1), "traced")
    images, labels = torch.randn(1, 3, 32, 32, requires_grad=True), torch.arange(1)
    gradient(images, labels)
    with _Calls() as calls:
        torch.autograd.grad(sum(g.square().sum() for g in gradient(images, labels)), images)
    layer = 4 * 32 * 32
    assert [name for name, size in calls.found if "zeros" in name and size >= layer] == []
    assert [name for name, _ in calls.found if "alias" in name] == []


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (1, 2)},
        {"kernel_size": 3, "dilation": 2, "padding": 1, "bias": False},
    ],
)
def test_the_cosine_without_forming_gradients_is_that_of_the_formed_ones(options, batch_size):
    """Many channels and few positions: where the factors have fewer numbers."""
    torch.manual_seed(0)
    wide = nn.Conv2d(64, 96, **options)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Conv2d(3, 64, 1), wide, nn.Flatten())
    model = client_model(nn.Sequential(*network, nn.LazyLinear(10)), (0.5,) * 3, (0.25,) * 3)
    model(torch.zeros(1, 3, 32, 32))
    model = model.double()
    update = _update(model, batch_size)
    target = Gradients(torch.randn_like(gradient) for gradient in update.gradients)
    images = torch.randn(batch_size, 3, 32, 32, dtype=torch.float64)

    def distance(engine):
        variable = images.clone().requires_grad_()
        gradients = _gradient(model, update, engine)(variable, torch.arange(batch_size))
        value = cosine_distance(gradients, target)
        return value, torch.autograd.grad(value, variable)[0]

    _assert_same(distance("eager"), distance("traced"))


def test_the_cosine_distance_takes_less_arithmetic_than_its_gradients_would():
    model = gipip.build_model("resnet18")
    network, images, labels = model.network, torch.randn(1, 3, 32, 32), torch.arange(1)
    gradient = _gradient(model, _update(model, 1), "traced")
    target = Gradients(torch.randn_like(parameter) for parameter in trainable(network).values())

    def derivative():
        variable = images.clone().requires_grad_() * 1
        torch.autograd.grad(cosine_distance(gradient(variable, labels), target), variable)

    derivative()
    one_pass = _multiplications(lambda: local_update(network, trainable(network), images, labels))
    assert _multiplications(derivative) < 2.25 * one_pass


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "cudagraph"])
def test_the_cost_near_the_truth_is_precise_in_float32(engine):
    """Within 1e-4 of the float64 cost where that is small and a difference of near numbers."""
    model = gipip.build_model("resnet18")
    batch = gipip.load_dataset("cifar10").tuning(batch_size=1)
    update = gipip.Client(model).share(batch)
    noise = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    near = model.normalize(batch.images) + 0.02 * noise
    target = Gradients(update.gradients)
    found = Gradients(_gradient(model, update, "eager")(near, batch.labels))
    exact = cosine_distance(
        Gradients(gradient.detach().double() for gradient in found),
        Gradients(gradient.double() for gradient in target),
    )
    view = View.of(model, update, engine)
    cost = cosine_distance(view.gradients(near, batch.labels), view.target)
    assert 1e-5 < exact < 0.05
    assert abs(cost.item() - exact.item()) < 1e-4 * exact.item()
