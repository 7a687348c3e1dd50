"""A captured iteration must do what the eager one does; needs an NVIDIA GPU."""

import pytest
import torch

import gipip

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA GPU")


@pytest.mark.parametrize("schedule", ["cosine", "steps"])
@pytest.mark.parametrize("name", ["convnet", "resnet18"])
def test_a_replayed_attack_gives_the_eager_attacks_images(name, schedule, monkeypatch):
    data = gipip.load_dataset("cifar10")
    model = gipip.build_model(name).cuda()
    update = gipip.Client(model).share(data.tuning(batch_size=2))
    attack = gipip.GIPIP(prior=gipip.load_prior(), iterations=40, schedule=schedule)
    replayed = attack(model, update)
    monkeypatch.setattr(gipip.GIPIP, "replayable", False)
    eager = attack(model, update)
    torch.testing.assert_close(replayed.images, eager.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(replayed.history, eager.history, rtol=1e-4, atol=1e-6)


def test_dlg_is_never_captured():
    assert not gipip.DLG.replayable
