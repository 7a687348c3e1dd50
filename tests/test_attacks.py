"""The optimisation loop, the attacks on real images, and what happens when something is
wrong.
"""

import dataclasses
import itertools
import json

import pydantic
import pytest
import torch
from torch import nn

from gipip.attacks import ATTACKS
from gipip.attacks.dlg import DLG
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.view import View
from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import BatchSizeError, LabelError, UpdateError
from gipip.evaluation.metrics import psnr
from gipip.federation.client import Client, FedAvg
from gipip.federation.defenses import Clipping, GaussianNoise, Sparsification
from gipip.federation.models import build_model, client_model, model_fingerprint
from gipip.priors.autoencoder import AnomalyScore, Autoencoder, load_prior


@pytest.fixture(scope="module")
def data():
    return load_dataset("cifar10")


@pytest.fixture
def tiny():
    """A network on 8×8 images that takes a millisecond a step, and the update of two images."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)
    )
    model = client_model(network, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    batch = LabeledImages(torch.rand(2, 3, 8, 8, generator=generator), torch.tensor([1, 4]))
    return model, Client(model).share(batch), batch


@pytest.fixture(scope="module")
def prior():
    torch.manual_seed(1)
    return AnomalyScore(Autoencoder())


def constant(images):
    """The constant image nearest to each image: nothing an attacker knows, and the best
    that no detail can give.
    """
    return images.mean(dim=(2, 3), keepdim=True).expand_as(images)


# Attacks on real images --------------------------------------------------------


@pytest.mark.parametrize(
    ("attack", "seed"),
    [
        (InvertingGradients(iterations=100), 0),
        (GIPIP(prior=load_prior().with_offset(0), iterations=100), 1),
    ],
)
def test_the_attacks_beat_the_best_constant_image_by_4_decibels_on_the_convnet(data, attack, seed):
    model, batch = build_model("convnet"), data.private(seed=seed)
    images = attack(model, Client(model).share(batch)).images
    assert (
        psnr(images, batch.images) > psnr(constant(batch.images), batch.images) + 4
    )  # measured: 6 to 10 dB


def test_dlg_recovers_a_real_image_and_its_label_on_the_sigmoid_lenet(data):
    model, batch = build_model("lenet"), data.private(seed=3)
    result = DLG(iterations=70)(model, Client(model).share(batch, labels="withheld"))
    assert psnr(result.images, batch.images) > 24
    assert torch.equal(result.labels, batch.labels)
    assert result.assumptions["labels"] == "optimised with the images"


def test_an_attack_without_labels_infers_them(data):
    model, batch = build_model("convnet"), data.private()
    result = InvertingGradients(iterations=1)(model, Client(model).share(batch, labels="withheld"))
    assert torch.equal(result.labels, batch.labels)
    assert result.assumptions["labels"] == "inferred from the last layer (iDLG)"


def test_an_attack_works_on_a_client_in_train_mode(tiny):
    model, _, batch = tiny
    result = InvertingGradients(iterations=60)(model, Client(model).share(batch, mode="train"))
    assert result.cost < sum(values[0] for values in result.history.values()) / 2
    assert result.assumptions["BatchNorm"].startswith("train mode")


def test_an_attack_works_on_a_client_that_trains_locally_and_knows_how(tiny):
    model, _, batch = tiny
    update = Client(model).share(batch, fedavg=FedAvg(steps=3, batch_size=1, learning_rate=0.1))
    result = InvertingGradients(iterations=60)(model, update)
    assert result.cost < sum(values[0] for values in result.history.values()) / 2
    assert result.assumptions["local training"] == "3 steps, mini-batches in a known order"
    assert (
        InvertingGradients().assumptions(Client(model).share(batch))["local training"]
        == "none (FedSGD)"
    )


def test_the_assumptions_name_the_defences_in_their_order_and_what_is_matched(tiny):
    model, update, batch = tiny
    defended = Client(model).share(
        batch, defenses=[Sparsification(sparsity=0.5), Clipping(max_norm=1)]
    )
    assert InvertingGradients().assumptions(update)["defence"] == "none"
    assert InvertingGradients().assumptions(defended)["defence"] == "sparsity 0.5, then clip 1"
    assert (
        InvertingGradients(masked=True).assumptions(defended)["defence"]
        == "sparsity 0.5, then clip 1; only non-zero entries matched"
    )


def test_masked_matching_ends_at_a_lower_cost_behind_a_sparsified_gradient(tiny):
    model, _, batch = tiny
    update = Client(model).share(batch, defenses=[Sparsification(sparsity=0.9)])
    masked, plain = (
        InvertingGradients(masked=choice, iterations=60, tv_weight=0)(model, update).cost
        for choice in (True, False)
    )
    assert masked < plain


def test_an_attack_on_noise_alone_still_gives_images(tiny):
    model, _, batch = tiny
    result = InvertingGradients(iterations=5)(
        model, Client(model).share(batch, defenses=[GaussianNoise(std=100)])
    )
    assert torch.isfinite(result.images).all()


# What comes back ---------------------------------------------------------------


def attacks(prior):
    return [
        InvertingGradients(iterations=23),
        GIPIP(prior=prior, iterations=23),
        DLG(iterations=23, learning_rate=0.1),
    ]


def test_images_are_float32_in_0_1_of_the_batchs_shape(tiny, prior):
    for attack in attacks(prior):
        images = attack(*tiny[:2]).images
        assert (
            images.shape == (2, 3, 8, 8)
            and images.dtype == torch.float32
            and not images.requires_grad
        )
        assert images.min() >= 0 and images.max() <= 1


def test_history_has_every_term_before_each_iteration_and_after_the_last_and_sums_to_the_cost(
    tiny, prior
):
    terms = [
        {"gradient matching", "total variation"},
        {"gradient matching", "total variation", "anomaly score"},
        {"gradient matching"},
    ]
    for attack, names in zip(attacks(prior), terms, strict=True):
        result = attack(*tiny[:2])
        assert set(result.history) == names
        assert all(values.shape == (24,) for values in result.history.values())
        assert sum(values[-1].item() for values in result.history.values()) == pytest.approx(
            result.cost, rel=1e-5
        )


def test_history_ends_with_the_cost_of_the_returned_images(tiny):
    model, update, _ = tiny
    attack = InvertingGradients(iterations=23)
    result = attack(model, update)
    view = View.of(model, update)
    terms = attack.terms(view, {"images": model.normalize(result.images)})
    assert sum(terms.values()).item() == pytest.approx(result.cost, abs=1e-4)


def test_the_cost_of_a_weighted_term_is_proportional_to_its_weight(tiny, prior):
    single, double = (
        GIPIP(prior=prior, iterations=1, tv_weight=w, as_weight=3 * w)(*tiny[:2]).history
        for w in (0.1, 0.2)
    )
    for term in ("total variation", "anomaly score"):
        torch.testing.assert_close(double[term][0], 2 * single[term][0])


def test_without_anomaly_score_gipip_is_inverting_gradients(tiny, prior):
    plain, scored = (
        InvertingGradients(iterations=9)(*tiny[:2]),
        GIPIP(prior=prior, as_weight=0, iterations=9)(*tiny[:2]),
    )
    assert torch.equal(plain.images, scored.images)


def test_every_iterate_stays_in_the_box(tiny):
    model, update, _ = tiny
    extremes = []

    class Watched(InvertingGradients):
        def project(self, view, variables):
            super().project(view, variables)
            x = view.model.normalize.inverse(variables["images"])
            extremes.append((x.min().item(), x.max().item()))

    Watched(iterations=30, learning_rate=5.0)(model, update)
    assert len(extremes) == 30
    assert (
        min(low for low, _ in extremes) >= -1e-6 and max(high for _, high in extremes) <= 1 + 1e-6
    )


def test_the_last_iterate_or_the_one_of_lowest_cost_is_returned_as_asked(tiny):
    class DownThenUp(InvertingGradients):
        def direction(self, gradient):
            return gradient.sign() * (1 if next(steps) < 30 else -1)

    results = []
    for returns in ("last", "lowest_cost"):
        steps = itertools.count()
        results.append(DownThenUp(iterations=60, schedule="steps", returns=returns)(*tiny[:2]))
    last, lowest = results
    costs = sum(last.history.values())
    assert (last.returned, lowest.returned) == ("last iterate", "lowest attacker-visible cost")
    assert last.cost == pytest.approx(costs[-1].item()) and lowest.cost == pytest.approx(
        costs.min().item()
    )
    assert 20 < costs.argmin() < 50 and not torch.equal(lowest.images, last.images)


def test_the_restart_of_lowest_cost_is_returned(tiny):
    single = [InvertingGradients(iterations=10, seed=seed)(*tiny[:2]) for seed in (5, 6, 7)]
    together = InvertingGradients(iterations=10, seed=5, restarts=3)(*tiny[:2])
    assert together.restart_costs == tuple(result.cost for result in single)
    best = min(single, key=lambda result: result.cost)
    assert together.cost == best.cost and torch.equal(together.images, best.images)


def test_the_same_seed_gives_identical_images_and_another_seed_others(tiny, prior):
    for kind in (InvertingGradients, DLG):
        first, again, other = (
            kind(iterations=5, seed=seed)(*tiny[:2]).images for seed in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_attack_neither_uses_nor_moves_the_global_generator(tiny):
    results, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(InvertingGradients(iterations=3)(*tiny[:2]).images)
        states.append(torch.equal(torch.get_rng_state(), before))
    assert torch.equal(*results) and all(states)


@pytest.mark.parametrize("labels", ["given", "withheld"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_attack_leaves_the_model_the_update_and_the_prior_untouched(tiny, prior, mode, labels):
    model, _, batch = tiny
    model.train()  # an own network often is
    update = Client(model).share(batch, mode=mode, labels=labels)
    before = (
        model_fingerprint(model),
        prior.fingerprint,
        [gradient.clone() for gradient in update.gradients],
    )
    GIPIP(prior=prior, iterations=3)(model, update)
    assert (model_fingerprint(model), prior.fingerprint) == before[:2] and model.training
    assert all(map(torch.equal, update.gradients, before[2]))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_attack_works_in_double_precision(tiny, prior):
    model, _, batch = tiny
    double = client_model(model.network, (0.5,) * 3, (0.25,) * 3).double()
    result = GIPIP(prior=prior, iterations=2)(double, Client(double).share(batch))
    assert (
        result.history["anomaly score"].dtype == torch.float64
        and result.images.dtype == torch.float32
    )


def test_an_attack_works_when_parameters_are_frozen(tiny):
    model, _, batch = tiny
    model.network[0].requires_grad_(False)
    update = Client(model).share(batch)
    result = InvertingGradients(iterations=20)(model, update)
    assert len(update.gradients) == 4 and result.cost < result.history["gradient matching"][0]


def test_dlg_needs_no_labels_and_so_no_layer_to_infer_them_from():
    model = client_model(
        nn.Sequential(nn.Conv2d(3, 4, 8), nn.Sigmoid(), nn.Flatten()),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )
    update = Client(model).share(
        LabeledImages(torch.rand(1, 3, 8, 8), torch.tensor([2])), labels="withheld"
    )
    assert DLG(iterations=2)(model, update).labels.shape == (1,)


# Watching and stopping ---------------------------------------------------------


def test_watch_sees_the_candidate_and_the_cost_as_often_as_asked(tiny):
    seen = []
    InvertingGradients(iterations=20)(
        *tiny[:2], watch=lambda *call: seen.append(call), watch_every=6
    )
    assert [iteration for iteration, _, _ in seen] == [6, 12, 18]
    assert all(
        images.shape == (2, 3, 8, 8) and images.min() >= 0 and images.max() <= 1
        for _, images, _ in seen
    )
    assert all(isinstance(cost, float) for _, _, cost in seen)


def test_watching_changes_nothing(tiny):
    watched = InvertingGradients(iterations=20)(*tiny[:2], watch=lambda *call: None, watch_every=3)
    assert torch.equal(watched.images, InvertingGradients(iterations=20)(*tiny[:2]).images)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, StopIteration])
def test_stopping_gives_back_what_there_is_and_starts_no_further_restart(tiny, stop):
    seen = []

    def watch(iteration, images, cost):
        seen.append(images)
        if iteration == 8:
            raise stop

    result = InvertingGradients(iterations=100, restarts=3)(*tiny[:2], watch=watch, watch_every=4)
    assert torch.equal(result.images, seen[-1]) and len(result.restart_costs) == 1
    assert len(result.history["total variation"]) == 9
    assert result.notes == ("stopped by the user after 8 of 100 iterations",)


def test_an_error_in_watch_is_not_hidden(tiny):
    def watch(*call):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        InvertingGradients(iterations=5)(*tiny[:2], watch=watch, watch_every=1)


# Costs that are not finite -----------------------------------------------------


class BlowsUp(AnomalyScore):
    """A prior that is well for `calls` calls, then returns NaN."""

    def __init__(self, calls):
        super().__init__(Autoencoder())
        self.calls = calls

    def forward(self, images, per="image"):
        self.calls -= 1
        return super().forward(images, per) * (float("nan") if self.calls < 0 else 1)


def test_a_cost_that_turns_nan_is_reported_and_the_best_finite_iterate_returned(tiny):
    with pytest.warns(
        UserWarning,
        match="GIPIP: the cost was not finite at iteration 15 of 100.*smaller learning rate",
    ):
        result = GIPIP(prior=BlowsUp(15), iterations=100)(*tiny[:2])
    costs = sum(result.history.values())
    assert result.returned == "lowest attacker-visible cost"
    assert result.cost == pytest.approx(costs[costs.isfinite()].min().item())
    assert torch.isfinite(result.images).all() and "not finite at iteration 15" in result.notes[0]
    assert len(costs) < 50  # it does not go on for ever


def test_a_cost_that_is_never_finite_gives_the_random_start_and_says_so(tiny):
    with pytest.warns(
        UserWarning, match="not finite at iteration 0 of 30; the random start is returned"
    ):
        result = GIPIP(prior=BlowsUp(0), iterations=30)(*tiny[:2])
    assert result.cost == float("inf") and torch.isfinite(result.images).all()


def test_dlg_with_an_absurd_learning_rate_is_survived(tiny):
    with pytest.warns(UserWarning, match="DLG: the cost was not finite"):
        result = DLG(iterations=30, learning_rate=1e30)(*tiny[:2])
    assert torch.isfinite(result.images).all() and result.notes


def test_a_restart_that_fails_loses_against_one_that_does_not(tiny):
    class FailsFirst(InvertingGradients):
        def terms(self, view, variables):
            terms = super().terms(view, variables)
            failed = view.generator.initial_seed() == self.seed
            return {name: term * float("nan") if failed else term for name, term in terms.items()}

    with pytest.warns(UserWarning, match="not finite"):
        result = FailsFirst(iterations=5, restarts=2)(*tiny[:2])
    assert result.restart_costs[0] == float("inf") and result.cost == result.restart_costs[1] < 2


# Updates an attack refuses -----------------------------------------------------


@pytest.mark.parametrize("attack", [InvertingGradients(iterations=1), DLG(iterations=1)])
def test_a_batch_size_that_does_not_fit_the_labels_is_refused(tiny, attack):
    model, update, _ = tiny
    with pytest.raises(BatchSizeError, match="of 3 images but 2 labels"):
        attack(model, dataclasses.replace(update, batch_size=3))


def test_a_label_out_of_range_is_refused(tiny):
    model, update, _ = tiny
    with pytest.raises(LabelError, match="Label 5 is out of range: the model has 5 classes"):
        InvertingGradients()(model, dataclasses.replace(update, labels=torch.tensor([1, 5])))


def test_an_update_of_other_weights_is_refused(data):
    update = Client(build_model("lenet")).share(data.private())
    with pytest.raises(UpdateError, match="other weights"):
        InvertingGradients()(build_model("lenet", seed=1), update)


def test_an_update_of_another_architecture_is_refused(data):
    update = Client(build_model("lenet")).share(data.private())
    with pytest.raises(
        UpdateError, match="another architecture.*Pass the model that the client trained"
    ):
        InvertingGradients()(build_model("convnet"), update)


def test_a_gradient_with_nan_is_refused_before_the_first_iteration(tiny):
    model, update, _ = tiny
    broken = dataclasses.replace(
        update, gradients=(update.gradients[0] * float("nan"), *update.gradients[1:])
    )
    with pytest.raises(UpdateError, match="network.0.weight holds NaN.*Look at the loss"):
        InvertingGradients()(model, broken)


# Configuration -----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"tv_wieght": 1e-3},
        {"tv_weight": -1e-3},
        {"tv_weight": float("nan")},
        {"iterations": 0},
        {"restarts": 0},
        {"learning_rate": 0},
        {"learning_rate": float("inf")},
        {"schedule": "linear"},
        {"returns": "best"},
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(settings):
    with pytest.raises(pydantic.ValidationError, match=next(iter(settings))):
        InvertingGradients(**settings)


def test_a_negative_anomaly_weight_and_a_missing_prior_are_refused(prior):
    with pytest.raises(pydantic.ValidationError, match="as_weight"):
        GIPIP(prior=prior, as_weight=-1)
    with pytest.raises(pydantic.ValidationError, match="prior"):
        GIPIP()


def test_an_attack_cannot_be_changed_after_it_was_made():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        InvertingGradients().iterations = 5


def test_an_attack_survives_json_and_names_its_prior_by_fingerprint(prior):
    for attack in (
        DLG(iterations=7),
        InvertingGradients(tv_weight=0.1, schedule="steps"),
        GIPIP(prior=prior, as_weight=0.3),
    ):
        dumped = json.loads(attack.model_dump_json())
        if isinstance(attack, GIPIP):
            assert dumped["prior"] == prior.fingerprint
            dumped["prior"] = prior
        assert ATTACKS[attack.name](**dumped) == attack
