"""The attacks as GI-PIP released them: their settings, and their objective and steps written out
from the formulas, with autograd in float64.
"""

import pytest
import torch
from torch import nn

from gipip.attacks.dlg import DLG
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.view import View
from gipip.data.datasets import load_dataset
from gipip.errors import BatchSizeError, DataError
from gipip.federation.client import Client
from gipip.federation.models import build_model
from gipip.priors.autoencoder import load_prior

# Data set, batch size → λ_TV, λ_AS; then iterations, the baseline's λ_TV and the offset c.
RELEASED = {
    ("cifar10", 1): (1e-6, 1e-6),
    ("cifar10", 4): (1e-5, 1e-4),
    ("cifar10", 8): (5e-4, 5e-4),
    ("imagenet64", 1): (1e-6, 1e-6),
    ("imagenet64", 4): (5e-4, 1e-4),
    ("imagenet64", 8): (5e-4, 5e-4),
}
RELEASED_ANYWHERE = {"cifar10": (10_000, 1e-6, 0.001), "imagenet64": (48_000, 1e-4, 0.002)}
PRECISE = {"rtol": 1e-10, "atol": 0}
PLAIN_ADAM = {"learning_rate": 0.1, "schedule": "steps", "signed": False, "masked": False}


@pytest.fixture(scope="module")
def data():
    return load_dataset("cifar10")


@pytest.fixture(scope="module")
def prior():
    return load_prior()


# The settings -------------------------------------------------------------------


@pytest.mark.parametrize(("dataset", "size"), RELEASED)
def test_the_released_settings_are_those_of_the_public_code(prior, dataset, size):
    iterations, baseline_tv, offset = RELEASED_ANYWHERE[dataset]
    tv, score = RELEASED[dataset, size]
    common = PLAIN_ADAM | {"iterations": iterations, "restarts": 1, "returns": "last", "seed": 0}
    baseline = InvertingGradients.as_released(dataset, size)
    assert baseline.model_dump() == common | {"tv_weight": baseline_tv}
    ours = GIPIP.as_released(dataset, size, prior=prior)
    own = {"tv_weight": tv, "as_weight": score, "score_per": "batch"}
    assert ours.model_dump(exclude={"prior"}) == common | own
    assert ours.prior.offset == offset


def test_single_released_settings_can_be_overridden(prior):
    assert GIPIP.as_released("cifar10", 4, prior=prior, iterations=5).iterations == 5
    assert DLG.as_released(iterations=5) == DLG(iterations=5)


def test_released_settings_of_an_unknown_data_set_or_batch_size_are_refused(prior):
    for preset in (
        InvertingGradients.as_released,
        lambda *which: GIPIP.as_released(*which, prior=prior),
    ):
        with pytest.raises(DataError, match="cifar10, imagenet64, not for 'mnist'.*by keyword"):
            preset("mnist", 1)
        with pytest.raises(BatchSizeError, match="batch sizes 1, 4, 8, not for 3"):
            preset("cifar10", 3)


def test_the_released_schedule_falls_tenfold_where_the_public_code_rounds_its_eighths():
    attack = InvertingGradients.as_released("cifar10", 1)
    optimizer, schedule = attack.optimizer({"images": torch.zeros(1, requires_grad=True)})
    rates = []
    for _ in range(attack.iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    steps = [3749, 6249 - 3749, 8756 - 6249, 10_000 - 8756]
    expected = [0.1**power for power, count in enumerate(steps, start=1) for _ in range(count)]
    assert rates == pytest.approx(expected)


# The objective and the steps, from their formulas ---------------------------------


class Formula:
    """GI-PIP's cost of normalised images, by nothing but autograd."""

    def __init__(self, data, dataset, size):
        self.tv, self.score = RELEASED[dataset, size]
        self.offset = RELEASED_ANYWHERE[dataset][2]
        self.mean, self.std = (
            torch.tensor(values).double().view(1, 3, 1, 1)  # as rounded as the client's
            for values in (data.mean, data.std)
        )
        self.model = build_model("convnet16").double()
        self.autoencoder = load_prior().autoencoder.double()
        self.batch = data.private(batch_size=size)
        truth = (self.batch.images.double() - self.mean) / self.std
        self.target = self.client_gradient(truth).detach()

    def client_gradient(self, images):
        loss = nn.functional.cross_entropy(self.model.network(images), self.batch.labels)
        parameters = list(self.model.parameters())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def terms(self, x):
        shared, target = self.client_gradient(x), self.target
        angle = 1 - torch.dot(shared, target) / (shared.norm() * target.norm())
        horizontal = (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().mean()
        vertical = (x[:, :, 1:, :] - x[:, :, :-1, :]).abs().mean()
        visible = (x * self.std + self.mean).clamp(0, 1)
        error = nn.functional.mse_loss(self.autoencoder(visible), visible)
        return [angle, self.tv * (horizontal + vertical), self.score * (error - self.offset).abs()]

    def view(self, engine="auto"):
        return View.of(self.model, Client(self.model).share(self.batch), engine)

    def start(self, seed):
        shape = self.batch.images.shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def gradients_of(terms, x):
    """By the images: of each term, and of their sum."""
    terms = list(terms)
    return [torch.autograd.grad(term, x, retain_graph=True)[0] for term in [*terms, sum(terms)]]


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("engine", ["eager", "traced"])
@pytest.mark.parametrize(("dataset", "size"), RELEASED)
def test_the_released_terms_and_gradients_are_those_of_the_formula(
    data, prior, dataset, size, engine
):
    formula = Formula(data, dataset, size)
    attack = GIPIP.as_released(dataset, size, prior=prior)
    x = formula.start(3).requires_grad_()
    ours = list(attack.terms(formula.view(engine), {"images": x}).values())
    theirs = formula.terms(x)
    torch.testing.assert_close(ours, theirs, **PRECISE)
    for own, true in zip(gradients_of(ours, x), gradients_of(theirs, x), strict=True):
        assert difference(own, true) < 1e-10


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("name", ["GI-PIP", "IG"])
def test_the_released_steps_are_adam_with_the_schedule_and_the_box(data, prior, size, name):
    formula = Formula(data, "cifar10", size)
    attack = GIPIP.as_released("cifar10", size, prior=prior, iterations=5, seed=5)
    if name == "IG":
        attack = InvertingGradients.as_released("cifar10", size, iterations=5, seed=5)
        formula.tv, formula.score = 1e-6, 0
    course = attack.attempt(formula.view(), 0, [])
    assert difference(course.variables["images"].detach(), stepped(formula)) < 1e-10


def stepped(formula):
    """Five steps of Adam (Kingma & Ba 2015), whose rate falls after the first, third and fourth."""
    x = formula.start(5)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for step in range(1, 6):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(sum(formula.terms(x)), x)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        falls = sum(step > after for after in (1, 3, 4))
        rate = 0.1 * 0.1**falls / (1 - 0.9**step)
        x = x.detach() - rate * first / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        x = x.clamp(-formula.mean / formula.std, (1 - formula.mean) / formula.std)
    return x
