"""A captured iteration must do what the traced one does; needs an NVIDIA GPU."""

import pytest
import torch

import gipip
from gipip.priors.gan import GenerativePrior, Generator

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU"
)


@needs_gpu
@pytest.mark.parametrize("schedule", ["cosine", "steps"])
@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_a_replayed_attack_gives_the_traced_attacks_images(name, schedule):
    data = gipip.load_dataset("cifar10")
    model = gipip.build_model(name).cuda()
    update = gipip.Client(model).share(data.tuning(batch_size=2))
    attack = gipip.GIPIP(prior=gipip.load_prior(), iterations=40, schedule=schedule)
    replayed = attack(model, update)
    traced = attack(model, update, engine="traced")
    torch.testing.assert_close(replayed.images, traced.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(replayed.history, traced.history, rtol=1e-4, atol=1e-6)


NEW = {
    "LatentSearch": lambda prior: gipip.LatentSearch(prior=prior, iterations=40),
    "GIAS": lambda prior: gipip.GIAS(prior=prior, latent_iterations=10, iterations=40),
    "GradInversion": lambda prior: gipip.GradInversion(iterations=40),
    "masked": lambda prior: gipip.InvertingGradients(iterations=40, masked=True),
}


@needs_gpu
@pytest.mark.parametrize("fedavg", [None, gipip.FedAvg(steps=2, batch_size=1)])
@pytest.mark.parametrize("name", NEW)
def test_every_other_attack_does_when_replayed_what_it_does_traced(name, fedavg):
    data, model = gipip.load_dataset("cifar10"), gipip.build_model("convnet").cuda()
    update = gipip.Client(model).share(
        data.tuning(batch_size=2), statistics="shared", fedavg=fedavg
    )
    torch.manual_seed(0)
    attack = NEW[name](GenerativePrior(Generator(width=8, latent_size=8)))
    replayed = attack(model, update)
    traced = attack(model, update, engine="traced")
    torch.testing.assert_close(replayed.images, traced.images, rtol=0, atol=1e-4)
    torch.testing.assert_close(replayed.history, traced.history, rtol=1e-3, atol=1e-5)


def test_dlg_is_never_captured():
    assert not gipip.DLG.replayable
