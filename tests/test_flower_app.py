"""The clients of notebook 08's Flower app: what they send is what the attack takes it for."""

import copy
import math
import sys

import pytest
import torch
from torch.testing import assert_close

import gipip
from gipip.reproduce import notebooks_folder

pytest.importorskip("flwr")
sys.path.append(str(notebooks_folder()))

import flower_app  # noqa: E402

CONFIG = {"batch-size": 4, "rate": 0.05}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return gipip.client_model(flower_app.build_network(), flower_app.MEAN, flower_app.STD)


def trained(model, epochs: int = 1, noise: float = 0.0) -> tuple[gipip.SharedUpdate, float]:
    """The update that a server makes of a client's weights, and the client's ε."""
    network, images = copy.deepcopy(model.network), flower_app.private_images(4)
    epsilon = flower_app.fit(network, images, CONFIG, epochs, noise)
    about = {"batch_size": 4, "image_shape": (3, 32, 32), "learning_rate": CONFIG["rate"]}
    weights = model.network.state_dict(), network.state_dict()
    return gipip.SharedUpdate.from_weights(model, *weights, steps=epochs, **about), epsilon


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_server_holds_the_mean_gradient_of_the_local_steps(model, epochs):
    fedavg = gipip.FedAvg(steps=epochs, learning_rate=CONFIG["rate"])
    expected = gipip.Client(model).share(flower_app.private_images(4), fedavg=fedavg)
    found, _ = trained(model, epochs)
    assert_close(found.gradients, expected.gradients, rtol=1e-3, atol=1e-5)


def test_opacus_adds_its_noise_to_every_entry(model):
    found, _ = trained(model, noise=100.0)
    entries = torch.cat([gradient.flatten() for gradient in found.gradients])
    assert entries.std() == pytest.approx(100 / 4, rel=0.02)  # clipped to 1, images hardly count


def test_epsilon_is_infinite_without_opacus_and_smaller_with_more_noise(model):
    epsilons = [trained(model, noise=noise)[1] for noise in (0.0, 0.1, 1.0)]
    assert math.isinf(epsilons[0]) and epsilons[0] > epsilons[1] > epsilons[2]
