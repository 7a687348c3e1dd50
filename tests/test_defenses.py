"""What a client does to its update: against closed forms, worked examples and published
numbers.
"""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from opacus.accountants import PRVAccountant, RDPAccountant
from pydantic import BaseModel, ValidationError
from scipy import optimize, stats
from torch import nn

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import DefenseError, UpdateError
from gipip.federation.client import Client, FedAvg, SharedUpdate
from gipip.federation.defenses import (
    DPSGD,
    AnyDefense,
    Clipping,
    GaussianNoise,
    Soteria,
    Sparsification,
)
from gipip.federation.models import build_model, client_model

NOISE, SPARSE, CLIP, SOTERIA = (
    GaussianNoise(std=0.01),
    Sparsification(sparsity=0.9),
    Clipping(max_norm=1),
    Soteria(pruned=0.1),
)
DP = DPSGD(max_norm=1, noise_multiplier=0.5)
ALL = (NOISE, SPARSE, CLIP, SOTERIA, DP)
TENSORS = st.lists(
    arrays.arrays("float32", st.integers(1, 30), elements=st.floats(-100, 100, width=32)),
    min_size=1,
    max_size=4,
)


def update_of(*gradients):
    names = tuple(f"parameter{index}" for index in range(len(gradients)))
    return SharedUpdate(gradients, names, 1, (3, 2, 2), None, "eval", "")


def linear_model(*layers):
    """On images of 3 × 2 × 2, with x the image itself."""
    return client_model(nn.Sequential(nn.Flatten(), *layers), mean=(0.0,) * 3, std=(1.0,) * 3)


def flat(update):
    return torch.cat([gradient.flatten() for gradient in update.gradients])


def pruned_columns(model, batch, share, mode="eval"):
    """Which features Soteria takes out, having checked that nothing else changes."""
    update = Client(model).share(batch, mode=mode)
    defended = Soteria(pruned=share)(update, model=model, batch=batch)
    kept = (defended.gradients[-2] == update.gradients[-2]).all(dim=0)
    assert (defended.gradients[-2][:, ~kept] == 0).all()
    others = [index for index in range(len(update.gradients)) if index != len(update.gradients) - 2]
    assert all(torch.equal(defended.gradients[index], update.gradients[index]) for index in others)
    return (~kept).nonzero().flatten().tolist()


@pytest.fixture(scope="module")
def lenet():
    return build_model("lenet")


@pytest.fixture(scope="module")
def batch():
    return load_dataset("cifar10").private(batch_size=4)


def test_noise_is_normal_with_the_stated_standard_deviation():
    update = update_of(torch.ones(50_000), torch.full((10, 5_000), -3.0))
    noise = flat(GaussianNoise(std=0.1)(update)) - flat(update)
    assert stats.kstest(noise.numpy(), stats.norm(scale=0.1).cdf).pvalue > 0.01
    assert noise.std().item() == pytest.approx(0.1, rel=0.01)


def test_an_update_gets_the_same_noise_again_and_another_update_or_seed_other_noise():
    gradient, state = torch.zeros(100), torch.get_rng_state()
    first, again, seeded = (
        flat(GaussianNoise(std=1, seed=seed)(update_of(gradient))) for seed in (0, 0, 1)
    )
    other = flat(GaussianNoise(std=1)(update_of(gradient + 1e-3))) - 1e-3
    assert (
        torch.equal(first, again)
        and not torch.allclose(first, seeded)
        and not torch.allclose(first, other)
    )
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("defense", [NOISE, SPARSE, CLIP], ids=str)
def test_the_gradients_type_is_kept(defense, dtype):
    assert defense(update_of(torch.ones(3, dtype=dtype))).gradients[0].dtype == dtype


def test_sparsification_worked_by_hand():
    update = update_of(
        torch.tensor([[0.1, -5.0, 2.0], [-0.3, 4.0, -1.0]]), torch.tensor([0.01, 0.02])
    )
    matrix, vector = Sparsification(sparsity=0.5)(update).gradients
    assert torch.equal(matrix, torch.tensor([[0, -5.0, 2.0], [0, 4.0, 0]]))
    assert torch.equal(
        vector, torch.tensor([0, 0.02])
    )  # its own threshold, though all of it is smaller than what went above


@given(TENSORS, st.floats(0, 0.99))
def test_what_sparsification_removes_is_the_smallest_and_at_most_the_stated_share(
    tensors, sparsity
):
    update = update_of(*map(torch.from_numpy, tensors))
    for before, after in zip(
        update.gradients, Sparsification(sparsity=sparsity)(update).gradients, strict=True
    ):
        removed, zero = before != after, after == 0
        assert zero[removed].all() and removed.sum() <= math.ceil(sparsity * (len(before) - 1))
        assert zero.all() or not zero.any() or before[zero].abs().max() < before[~zero].abs().min()
        if len(before.abs().unique()) == len(before):
            assert zero.sum() >= math.floor(sparsity * (len(before) - 1))


def test_clipping_worked_by_hand():
    clipped = Clipping(max_norm=2.5)(update_of(torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])))
    torch.testing.assert_close(flat(clipped), torch.tensor([1.5, 0.0, 2.0]))


@given(TENSORS, st.floats(1e-3, 1e3))
def test_clipping_keeps_the_direction_and_bounds_the_norm(tensors, max_norm):
    update = update_of(*map(torch.from_numpy, tensors))
    before, after = flat(update).double(), flat(Clipping(max_norm=max_norm)(update)).double()
    assert after.norm() <= min(max_norm, before.norm()) * (1 + 1e-5) + 1e-30
    torch.testing.assert_close(after * before.norm(), before * after.norm(), rtol=1e-4, atol=1e-6)
    assert torch.equal(before, after) == bool(
        before.norm() <= max_norm
    ) or before.norm().item() == pytest.approx(max_norm, rel=1e-5)


def test_soteria_prunes_where_the_feature_is_large_for_its_slope_not_where_it_is_large():
    first, last = nn.Linear(12, 4, bias=False), nn.Linear(4, 3)
    first.weight.data = torch.eye(4, 12) * torch.tensor(
        [[100.0], [1.0], [-1.0], [0.1]]
    )  # rᵢ = cᵢ xᵢ, so |rᵢ| / ‖∂rᵢ/∂x‖ = |xᵢ|
    pixels = torch.zeros(1, 12)
    pixels[0, :4] = torch.tensor([0.2, 0.9, 0.5, 0.6])
    batch = LabeledImages(pixels.view(1, 3, 2, 2), torch.tensor([0]))
    assert pruned_columns(linear_model(first, last), batch, 0.25) == [1]
    assert pruned_columns(linear_model(first, last), batch, 0.5) == [1, 3]
    assert pruned_columns(linear_model(first, last), batch, 0.75) == [1, 2, 3]


def test_soteria_prunes_dead_features_last_and_adds_up_over_a_batch():
    first, last = nn.Linear(12, 4, bias=False), nn.Linear(4, 3)
    first.weight.data = torch.eye(4, 12)
    first.weight.data[0] *= -1  # behind ReLU: always 0
    pixels = torch.zeros(2, 12)
    pixels[:, :4] = torch.tensor(
        [[0.9, 0.8, 0.5, 0.0], [0.9, 0.0, 0.5, 0.7]]
    )  # sums 0 (dead), 0.8, 1.0, 0.7
    batch = LabeledImages(pixels.view(2, 3, 2, 2), torch.tensor([0, 1]))
    model = linear_model(first, nn.ReLU(), last)
    assert pruned_columns(model, batch, 0.25) == [2]
    assert pruned_columns(model, batch, 0.5) == [1, 2]
    assert pruned_columns(model, batch, 0.75) == [1, 2, 3]


def test_soteria_agrees_with_the_jacobian_of_a_convolutional_network():
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Sigmoid(), nn.Flatten(), nn.Linear(20, 3)]
    model = client_model(nn.Sequential(*layers), mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    batch = LabeledImages(torch.rand(3, 3, 4, 4), torch.tensor([0, 1, 2]))
    x = model.normalize(batch.images)
    slopes = (
        torch.stack(
            [torch.func.jacfwd(lambda one: model.network[:-1](one[None])[0])(image) for image in x]
        )
        .flatten(2)
        .norm(dim=2)
    )
    ratios = (model.network[:-1](x).abs() / slopes).sum(dim=0)
    assert pruned_columns(model, batch, 0.35) == sorted(
        ratios.argsort(descending=True)[:7].tolist()
    )


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_soteria_leaves_the_clients_model_as_it_was(mode):
    layers = [nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(4, 3)]
    model = client_model(nn.Sequential(*layers), mean=(0.5,) * 3, std=(0.2,) * 3).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert (
        len(
            pruned_columns(
                model, LabeledImages(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])), 0.5, mode
            )
        )
        == 2
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


def test_dpsgd_that_neither_clips_nor_adds_noise_gives_the_plain_gradient(lenet, batch):
    update = Client(lenet).share(batch)
    defended = DPSGD(max_norm=1e6, noise_multiplier=0)(update, model=lenet, batch=batch)
    torch.testing.assert_close(flat(defended), flat(update), rtol=1e-4, atol=1e-6)


def test_dpsgd_without_noise_is_the_mean_of_the_images_clipped_gradients(lenet, batch):
    single = [flat(Clipping(max_norm=0.5)(Client(lenet).share(batch[[row]]))) for row in range(4)]
    defended = DPSGD(max_norm=0.5, noise_multiplier=0)(
        Client(lenet).share(batch), model=lenet, batch=batch
    )
    torch.testing.assert_close(flat(defended), torch.stack(single).mean(dim=0))
    assert flat(defended).norm() <= 0.5


@pytest.mark.parametrize("name", ["lenet", "convnet16", "convnet16-groupnorm"])
def test_dpsgd_is_clipping_image_by_image_and_normal_noise_worked_in_float64(name, batch):
    model, total = build_model(name).double(), 0
    for image, label in zip(batch.images.double(), batch.labels, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(image[None]), label[None]).backward()
        single = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        total += single / max(1, single.norm() / 0.5)
    silent, noisy = (
        flat(Client(model).share(batch, defenses=[DPSGD(max_norm=0.5, noise_multiplier=sigma)]))
        for sigma in (0, 2)
    )
    torch.testing.assert_close(silent, total / 4, rtol=1e-9, atol=1e-12)
    noise = (noisy - silent).numpy()[:40_000]
    assert stats.kstest(noise, stats.norm(scale=2 * 0.5 / 4).cdf).pvalue > 0.01


def test_dpsgd_of_no_image_is_noise_alone_and_other_noise_for_another_seed(lenet, batch):
    first, again, other = (
        torch.cat([g.flatten() for g in DP.noisy_mean(lenet, batch[:0], 10, seed)])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert abs(stats.pearsonr(first.numpy(), other.numpy()).statistic) < 0.02
    assert stats.kstest(first.numpy(), stats.norm(scale=0.5 * 1 / 10).cdf).pvalue > 0.01


def test_one_image_moves_the_sum_of_dpsgd_by_no_more_than_the_clipping_norm(lenet, batch):
    three, four = (
        len(part)
        * flat(
            DPSGD(max_norm=0.1, noise_multiplier=0)(
                Client(lenet).share(part), model=lenet, batch=part
            )
        )
        for part in (batch[:3], batch)
    )
    assert (four - three).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_the_noise_of_dpsgd_has_the_stated_standard_deviation(lenet, batch):
    update = Client(lenet).share(batch)
    silent, noisy = (
        flat(DPSGD(max_norm=0.5, noise_multiplier=sigma)(update, model=lenet, batch=batch))
        for sigma in (0, 2)
    )
    assert (noisy - silent).std().item() == pytest.approx(2 * 0.5 / 4, rel=0.02)


@pytest.mark.parametrize("sigma, steps", [(1.0, 1), (0.3, 1), (4.0, 1), (2.0, 50)])
def test_epsilon_bounds_the_exact_one_of_the_gaussian_mechanism_from_above_and_closely(
    sigma, steps
):
    scale = sigma / math.sqrt(
        steps
    )  # Balle and Wang 2018, theorem 8, where every image is in every batch

    def excess(epsilon):
        tails = stats.norm.cdf([0.5 / scale - epsilon * scale, -0.5 / scale - epsilon * scale])
        return tails[0] - math.exp(epsilon) * tails[1] - 1e-5

    exact = optimize.brentq(excess, 0, 100)
    assert (
        exact
        <= DPSGD(max_norm=1, noise_multiplier=sigma).epsilon(steps=steps, sample_rate=1)
        <= 1.15 * exact
    )


@pytest.mark.parametrize(
    "sigma, steps, rate, published",
    [
        (4, 10_000, 0.01, 1.26),  # Abadi et al. 2016, section 3, figure 2
        (
            1.3,
            20 * 60_000 // 256,
            256 / 60_000,
            1.34,
        ),  # Bu et al. 2020, "Deep Learning with Gaussian Differential Privacy", figure 4
        (0.7, 70 * 60_000 // 256, 256 / 60_000, 8.68),  # the same
    ],
)
def test_epsilon_is_a_little_below_the_published_bounds_of_the_older_moments_accountant(
    sigma, steps, rate, published
):
    assert (
        0.8 * published
        < DPSGD(max_norm=1, noise_multiplier=sigma).epsilon(steps=steps, sample_rate=rate)
        < published
    )


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_epsilon_is_that_of_opacuss_accountants_step_by_step_and_a_little_above_the_tightest(sigma):
    rate, steps = 32 / 1900, 200
    stepped, tight = RDPAccountant(), PRVAccountant()
    for _ in range(steps):
        for accountant in (stepped, tight):
            accountant.step(noise_multiplier=sigma, sample_rate=rate)
    found = DPSGD(max_norm=1, noise_multiplier=sigma).epsilon(steps=steps, sample_rate=rate)
    assert found == pytest.approx(stepped.get_epsilon(1e-5), rel=1e-9)
    assert tight.get_epsilon(1e-5) < found < 1.5 * tight.get_epsilon(1e-5)


def test_epsilon_falls_with_noise_and_rises_with_steps_and_sampling_rate():
    def epsilon(sigma, steps=10, rate=0.1):
        return DPSGD(max_norm=1, noise_multiplier=sigma).epsilon(steps=steps, sample_rate=rate)

    assert epsilon(0) == math.inf > epsilon(0.5) > epsilon(1) > epsilon(2) > 0
    assert epsilon(1, steps=20) > epsilon(1) > epsilon(1, rate=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": math.nan},
        {"steps": math.inf},
        {"sample_rate": 0},
        {"sample_rate": 1.5},
        {"delta": 1.0},
        {"delta": math.nan},
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_epsilon_says_which_values_it_takes(wrong):
    with pytest.raises(DefenseError, match=f"{next(iter(wrong))}=.*Expected steps ≥ 1"):
        DP.epsilon(**({"steps": 1, "sample_rate": 0.1} | wrong))


def test_epsilon_without_opacus_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)  # as if it were not there
    with pytest.raises(DefenseError, match=r'pip install "gipip\[dp\]"'):
        DP.epsilon(steps=1, sample_rate=0.1)


def test_the_order_of_defences_matters_and_is_recorded():
    update, clip, noise = update_of(torch.ones(1000)), Clipping(max_norm=1), GaussianNoise(std=1)
    clipped_last, noised_last = clip(noise(update)), noise(clip(update))
    assert clipped_last.defenses == ("noise 1", "clip 1") and noised_last.defenses == (
        "clip 1",
        "noise 1",
    )
    assert flat(clipped_last).norm() <= 1 + 1e-5 and flat(noised_last).norm() > 20
    assert update.defenses == () and torch.equal(flat(update), torch.ones(1000))


def test_a_client_applies_all_defences_in_order(lenet, batch):
    update = Client(lenet).share(batch, defenses=ALL[::-1])
    assert update.defenses == (
        "DP-SGD C=1 σ=0.5",
        "Soteria 10 %",
        "clip 1",
        "sparsity 0.9",
        "noise 0.01",
    )
    update.check(lenet)


@settings(deadline=None)
@given(st.permutations(ALL))
def test_any_defence_survives_json(defenses):
    class Policy(BaseModel):
        defenses: tuple[AnyDefense, ...]

    policy = Policy(defenses=defenses)
    assert Policy.model_validate_json(policy.model_dump_json()) == policy


@pytest.mark.parametrize("defense", [SOTERIA, DP], ids=str)
def test_defences_that_need_the_clients_side_say_so(lenet, batch, defense):
    update = Client(lenet).share(batch)
    for some in ({}, {"model": lenet}, {"batch": batch}, {"model": lenet, "batch": batch[:3]}):
        with pytest.raises(
            DefenseError, match="the model and batch that the update is of.*batch=…"
        ):
            defense(update, **some)
    with pytest.raises(UpdateError, match="other weights"):
        defense(update, model=build_model("lenet", seed=1), batch=batch)


def with_batch_norm(**options):
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.Flatten(), nn.Linear(3600, 10)]
    return client_model(nn.Sequential(*layers), mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.mark.parametrize(
    ("model", "options", "remedy"),
    [
        (with_batch_norm(), {"mode": "train"}, "BatchNorm.*mode='eval'.*convnet16-groupnorm"),
        (with_batch_norm(track_running_stats=False), {}, "BatchNorm.*running statistics"),
        (with_batch_norm(), {"fedavg": FedAvg(steps=2)}, "Share without fedavg"),
    ],
    ids=["train mode", "no running statistics", "local training"],
)
def test_dpsgd_is_refused_where_there_are_no_gradients_of_single_images(
    batch, model, options, remedy
):
    assert Client(model).share(batch, **options)
    with pytest.raises(DefenseError, match=f"single image.*{remedy}"):
        Client(model).share(batch, defenses=[DP], **options)


def test_dpsgd_is_refused_after_other_defences(lenet, batch):
    with pytest.raises(DefenseError, match="would undo clip 1, noise 0.01. Apply it first"):
        Client(lenet).share(batch, defenses=[CLIP, NOISE, DP])


def test_dpsgd_does_not_mind_train_mode_where_images_do_not_meet(lenet, batch):
    found = [
        Client(lenet).share(batch, mode=mode, defenses=[DP]).gradients for mode in ("eval", "train")
    ]
    assert all(map(torch.equal, *found))


def test_soteria_prunes_what_enters_the_layer_that_is_used_last_not_registered_last(batch):
    class HeadFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.body = nn.Linear(8, 10), nn.Linear(3 * 32 * 32, 8)

        def forward(self, inputs):
            return self.head(self.body(inputs.flatten(1)).sigmoid())

    model = client_model(HeadFirst(), (0.5,) * 3, (0.2,) * 3)
    update = Client(model).share(batch, defenses=[Soteria(pruned=0.5)])
    head = update.gradients[update.parameter_names.index("network.head.weight")]
    assert (head == 0).all(dim=0).sum() == 4


def test_soteria_is_refused_where_the_classifier_is_frozen(batch):
    model = build_model("lenet")
    model.network[-1].requires_grad_(False)
    with pytest.raises(
        DefenseError, match=r"network\.7\.weight is frozen. Let it train, or leave out Soteria"
    ):
        Client(model).share(batch, defenses=[SOTERIA])


@pytest.mark.parametrize(
    "defense, values",
    [
        (GaussianNoise, {"std": -1}),
        (GaussianNoise, {"std": math.nan}),
        (Clipping, {"max_norm": math.nan}),
        (DPSGD, {"max_norm": 1, "noise_multiplier": math.inf}),
        (GaussianNoise, {"std": math.inf}),
        (Sparsification, {"sparsity": 1}),
        (Clipping, {"max_norm": 0}),
        (Soteria, {"pruned": 0}),
        (Soteria, {"pruned": 1}),
        (DPSGD, {"max_norm": 0, "noise_multiplier": 1}),
        (DPSGD, {"max_norm": 1, "noise_multiplier": -1}),
        (Clipping, {"max_norm": 1, "norm": 2}),
    ],
)
def test_values_out_of_range_and_unknown_ones_are_refused_by_name(defense, values):
    with pytest.raises(ValidationError, match="|".join(values)):
        defense(**values)
