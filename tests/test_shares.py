"""How much of a step each term makes."""

import pandas
import pytest
import torch

from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.data.datasets import load_dataset
from gipip.experiments.shares import gradient_shares
from gipip.federation.client import Client
from gipip.federation.models import build_model
from gipip.priors.autoencoder import load_prior

TERMS = ["total variation", "anomaly score"]


@pytest.fixture(scope="module")
def client():
    model = build_model("lenet")
    return model, Client(model).share(load_dataset("cifar10").private(batch_size=2))


def shares(client, every=1, **weights) -> pandas.DataFrame:
    """In three steps so small that the images stay where they are."""
    steps = {"iterations": 3, "learning_rate": 1e-12}
    attack = GIPIP(prior=load_prior(), **steps, **weights)
    return gradient_shares(attack, *client, every=every)


def test_there_is_a_share_of_each_regulariser_at_each_iteration_that_is_looked_at(client):
    table = shares(client)
    assert list(table.columns) == ["iteration", "term", "share"]
    assert table["iteration"].tolist() == [1, 1, 2, 2, 3, 3]
    assert table["term"].tolist() == TERMS * 3
    assert shares(client, every=2)["iteration"].tolist() == [2, 2]


def test_shares_are_proportional_to_the_weights_and_zero_without(client):
    one, ten = shares(client, tv_weight=1, as_weight=1), shares(client, tv_weight=10, as_weight=0)
    one, ten = (table.groupby("term")["share"].mean() for table in (one, ten))
    assert ten["total variation"] == pytest.approx(10 * one["total variation"], rel=1e-3)
    assert ten["anomaly score"] == 0 < one["anomaly score"]


def test_a_share_is_the_ratio_of_the_two_gradients_norms(client):
    model, update = client
    attack = InvertingGradients(iterations=1, learning_rate=1e-12, tv_weight=0.5)
    (share,) = gradient_shares(attack, model, update)["share"]
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    lower, upper = model.normalize.box
    x = x.clamp(lower, upper).requires_grad_()
    loss = torch.nn.functional.cross_entropy(model.network(x), update.labels)
    mine = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    mine = torch.cat([gradient.flatten() for gradient in mine])
    target = torch.cat([gradient.flatten() for gradient in update.gradients])
    (matching,) = torch.autograd.grad(-torch.cosine_similarity(mine, target, dim=0), x)
    differences = [x.diff(dim=axis).abs().mean() for axis in (2, 3)]
    (variation,) = torch.autograd.grad(sum(differences), x)
    assert share == pytest.approx((0.5 * variation.norm() / matching.norm()).item(), rel=1e-3)
