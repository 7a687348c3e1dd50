"""Every engine gives what autograd's double backward gives."""

import shutil

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gipip
from gipip.attacks import derivatives
from gipip.attacks.engines.derivatives import Factored
from gipip.attacks.engines.traced import choose_engine, client_gradient, in_chunks
from gipip.attacks.objectives import cosine_distance
from gipip.errors import EngineError
from gipip.federation.client import local_update
from gipip.federation.models import trainable
from gipip.priors import GenerativePrior, Generator

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="compiling needs a C++ compiler"
)


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


def _network(name):
    if name == "unusual":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Unusual()
    return gipip.build_model(name).network


def _second_derivative(gradient, images, labels, directions):
    """The gradients, and the derivative of their product with the directions by images
    and soft labels.
    """
    variables = [
        tensor.clone().requires_grad_() for tensor in (images, labels) if tensor.is_floating_point()
    ]
    images, labels = variables if len(variables) == 2 else (variables[0], labels)
    gradients = gradient(images, labels)
    product = sum((a * b).sum() for a, b in zip(gradients, directions, strict=True))
    return [g.detach() for g in gradients], torch.autograd.grad(product, variables)


def _both(network, engine, *, fedavg=None, soft=False, dtype=torch.float64, batch_size=3):
    network = network.to(dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch_size, 3, 32, 32, generator=generator).to(dtype)
    labels = (
        torch.rand(batch_size, 10, generator=generator).to(dtype).softmax(dim=1)
        if soft
        else torch.arange(batch_size)
    )
    parameters = trainable(network)
    directions = [torch.randn(p.shape, generator=generator).to(dtype) for p in parameters.values()]
    return [
        _second_derivative(
            client_gradient(network, parameters, fedavg, which), images, labels, directions
        )
        for which in ("eager", engine)
    ]


@pytest.mark.parametrize(
    "fedavg",
    [None, gipip.FedAvg(steps=3, batch_size=2, learning_rate=0.1)],
    ids=["FedSGD", "FedAvg"],
)
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["convnet", "convnet16", "lenet", "unusual", "resnet18"])
def test_the_traced_gradient_and_its_derivative_are_the_eager_ones_in_float64(name, mode, fedavg):
    if name == "resnet18" and fedavg:
        fedavg = gipip.FedAvg(steps=2, batch_size=2)
    expected, found = _both(_network(name).train(mode == "train"), "traced", fedavg=fedavg)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


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
    (_, expected), (_, found) = _both(
        _network(name), "traced", dtype=torch.float32, batch_size=batch_size
    )
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()


def test_labels_can_be_optimised_through_the_traced_gradient():
    expected, found = _both(_network("lenet"), "traced", soft=True)
    assert len(found[1]) == 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@needs_compiler
@pytest.mark.parametrize("name", ["lenet", "convnet16"])
def test_the_compiled_gradient_and_its_derivative_are_the_eager_ones(name):
    expected, found = _both(_network(name), "compiled", batch_size=2)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def _attacks():
    torch.manual_seed(0)
    generator = GenerativePrior(Generator(width=8, latent_size=8))
    prior = gipip.load_prior()
    return {
        "DLG": gipip.DLG(iterations=2, inner_iterations=3),
        "InvertingGradients": gipip.InvertingGradients(iterations=3, signed=False),
        "masked": gipip.InvertingGradients(iterations=3, masked=True, signed=False),
        "GIPIP": gipip.GIPIP(prior=prior, iterations=3, signed=False),
        "GIPIP per batch": gipip.GIPIP(prior=prior, iterations=3, score_per="batch", signed=False),
        "LatentSearch": gipip.LatentSearch(prior=generator, iterations=3),
        "GIAS": gipip.GIAS(prior=generator, latent_iterations=2, iterations=2),
        "GradInversion": gipip.GradInversion(iterations=3, signed=False),
    }


@pytest.mark.parametrize("name", _attacks())
def test_every_attack_takes_the_same_course_traced_as_eagerly(name):
    model = gipip.build_model("convnet16").double()
    batch = gipip.load_dataset("cifar10").tuning(batch_size=2)
    update = gipip.Client(model).share(batch, statistics="shared")
    eager, traced = (
        _attacks()[name](model, update, engine=engine) for engine in ("eager", "traced")
    )
    assert (eager.engine, traced.engine) == ("eager", "traced")
    torch.testing.assert_close(traced.history, eager.history, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(traced.images, eager.images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 8])
def test_a_gradient_in_chunks_is_the_whole_one(chunk_size):
    model = gipip.build_model("convnet16").double()
    images, labels = torch.randn(5, 3, 32, 32), torch.arange(5)
    update = gipip.Client(model).share(gipip.LabeledImages(images.sigmoid(), labels))
    whole = client_gradient(model.network, trainable(model.network), None, "traced")
    directions = [torch.randn_like(gradient) for gradient in update.gradients]
    images = images.double()
    expected = _second_derivative(whole, images, labels, directions)
    found = _second_derivative(in_chunks(whole, chunk_size), images, labels, directions)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"mode": "train"}, {}),
        ({"fedavg": gipip.FedAvg(steps=2)}, {}),
        ({}, {"engine": "eager"}),
        ({}, {"chunk_size": -1}),
    ],
)
def test_chunks_are_refused_where_they_would_not_be_exact(changes, options):
    model = gipip.build_model("lenet")
    update = gipip.Client(model).share(
        gipip.load_dataset("cifar10").tuning(batch_size=2), **changes
    )
    with pytest.raises(EngineError, match="cannot be taken in chunks"):
        gipip.InvertingGradients(iterations=1)(model, update, **{"chunk_size": 1} | options)


@pytest.mark.parametrize(
    ("cuda", "replayable", "engine"),
    [(True, True, "cudagraph"), (True, False, "traced"), (False, True, "traced")],
)
def test_the_fastest_engine_is_chosen(cuda, replayable, engine):
    assert choose_engine("auto", cuda=cuda, replayable=replayable) == engine


def test_without_a_compiler_compiling_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(EngineError, match="C\\+\\+ compiler"):
        choose_engine("compiled", cuda=False, replayable=True)


@pytest.mark.parametrize(
    ("engine", "message"), [("fast", "Unknown engine 'fast'"), ("cudagraph", "NVIDIA GPU")]
)
def test_an_engine_that_cannot_run_is_refused_before_the_first_iteration(engine, message):
    model = gipip.build_model("lenet")
    update = gipip.Client(model).share(gipip.load_dataset("cifar10").tuning(batch_size=1))
    with pytest.raises(EngineError, match=message):
        gipip.InvertingGradients(iterations=1)(model, update, engine=engine)


def test_an_attack_that_cannot_be_captured_says_so():
    with pytest.raises(EngineError, match="cannot be captured"):
        choose_engine("cudagraph", cuda=True, replayable=False)


@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_the_traced_derivative_takes_no_more_arithmetic_than_needed(name):
    network = _network(name)
    labels, images = torch.arange(1), torch.randn(1, 3, 32, 32)
    gradient = client_gradient(network, trainable(network), None, "traced")

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
    gradient = client_gradient(network, trainable(network), None, "traced")
    images, labels = torch.randn(1, 3, 32, 32, requires_grad=True), torch.arange(1)
    gradient(images, labels)
    with _Calls() as calls:
        torch.autograd.grad(sum(g.square().sum() for g in gradient(images, labels)), images)
    layer = 4 * 32 * 32
    assert [name for name, size in calls.found if "zeros" in name and size >= layer] == []
    assert [name for name, _ in calls.found if "alias" in name] == []


def test_layers_that_work_in_place_are_traced_as_they_are():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.linear = (
                nn.Conv2d(3, 4, 3),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Linear(4 * 15 * 15, 10),
            )

        def forward(self, x):
            x = nn.functional.relu_(self.first(x))
            y = self.second(x)
            y += x
            return self.linear(nn.functional.max_pool2d(y.mul_(2).relu_(), 2).flatten(1))

    expected, found = _both(InPlace(), "traced")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_network_that_depends_on_how_its_tensors_lie_in_memory_is_traced_all_the_same():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.linear = (
                nn.Conv2d(3, 4, 3),
                nn.Conv2d(4, 8, 3, stride=2),
                nn.Linear(8 * 14 * 14, 10),
            )

        def forward(self, x):
            x = self.first(x)
            x = x.as_strided((len(x), 4, 30, 30), (3600, 900, 30, 1)).sigmoid()
            return self.linear(
                self.second(x).view(len(x), -1).reshape(len(x), 28, 56).view(len(x), -1)
            )

    expected, found = _both(Views(), "traced", dtype=torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": (1, 2)},
        {"kernel_size": 3, "dilation": 2, "bias": False},
    ],
)
def test_a_factored_gradient_has_the_products_of_the_whole_one(options, batch_size, monkeypatch):
    monkeypatch.setattr(derivatives, "_factors_pay", lambda *arguments: True)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, **options), nn.Flatten(), nn.LazyLinear(2)).double()
    images, labels = (
        torch.randn(batch_size, 3, 6, 6, dtype=torch.float64),
        torch.zeros(batch_size, dtype=torch.long),
    )
    network(images)
    target = [torch.randn_like(parameter) for parameter in network.parameters()]
    gradient = client_gradient(network, trainable(network), None, "traced")

    def distance(factored):
        variable = images.clone().requires_grad_()
        gradients = gradient(variable, labels, factored)
        value = cosine_distance(gradients, target)
        return gradients[0], value, torch.autograd.grad(value, variable)[0]

    (whole, expected, by_images), (factors, found, found_by_images) = (
        distance(False),
        distance(True),
    )
    assert isinstance(whole, torch.Tensor) and isinstance(factors, Factored)
    torch.testing.assert_close(
        (found, found_by_images), (expected, by_images), rtol=1e-9, atol=1e-11
    )


def test_only_gradients_that_are_results_as_they_are_stay_factored():
    network, images, labels = (
        gipip.build_model("resnet18").network,
        torch.randn(1, 3, 32, 32),
        torch.arange(1),
    )
    one, several = (
        client_gradient(network, trainable(network), fedavg, "traced")
        for fedavg in (None, gipip.FedAvg(steps=2))
    )
    kinds = [isinstance(gradient, Factored) for gradient in one(images, labels, factored=True)]
    assert (
        sum(kinds) == 9
    )  # the last two stages, but for a convolution with 1×1 kernel at 64 positions
    assert not any(isinstance(gradient, Factored) for gradient in one(images, labels))
    assert not any(
        isinstance(gradient, Factored) for gradient in several(images, labels, factored=True)
    )


def test_the_cosine_distance_takes_less_arithmetic_than_its_gradients_would():
    network, images, labels = (
        gipip.build_model("resnet18").network,
        torch.randn(1, 3, 32, 32),
        torch.arange(1),
    )
    gradient = client_gradient(network, trainable(network), None, "traced")
    target = [torch.randn_like(parameter) for parameter in trainable(network).values()]

    def derivative():
        variable = images.clone().requires_grad_() * 1
        torch.autograd.grad(
            cosine_distance(gradient(variable, labels, factored=True), target), variable
        )

    derivative()
    one_pass = _multiplications(lambda: local_update(network, trainable(network), images, labels))
    assert _multiplications(derivative) < 2.25 * one_pass
