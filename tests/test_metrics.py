"""Metrics against closed forms, published numbers and independent formulas."""

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.signal import convolve
from torch import nn
from torchvision.transforms.functional import to_tensor

from gipip.errors import BatchSizeError, DataError, ModelError
from gipip.evaluation import metrics
from gipip.evaluation.metrics import evaluate
from gipip.evaluation.statistics import Interval, bootstrap_interval, paired_difference
from gipip.files import DATA, read_tensors


def random_images(count=3, size=32, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# PSNR and SSIM


def test_psnr_of_a_constant_offset_of_a_tenth_is_20_db():
    truth = 0.8 * random_images()
    torch.testing.assert_close(
        metrics.psnr(truth + 0.1, truth), torch.full((3,), 20.0), atol=1e-3, rtol=0
    )


def test_psnr_is_per_image():
    truth = torch.full((2, 3, 8, 8), 0.5)
    offsets = torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    torch.testing.assert_close(
        metrics.psnr(truth + offsets, truth), torch.tensor([20.0, 40.0]), atol=1e-3, rtol=0
    )


def test_psnr_of_identical_images_is_100_db_so_that_means_stay_finite():
    assert metrics.psnr(random_images(), random_images()).tolist() == [100, 100, 100]


def test_psnr_clamps_to_the_range_of_images():
    white = torch.ones(1, 3, 8, 8)
    assert metrics.psnr(white + 1e-5, white).item() == 100


def test_ssim_of_identical_images_is_1():
    torch.testing.assert_close(metrics.ssim(random_images(), random_images()), torch.ones(3))


def test_ssim_of_constant_images_is_its_luminance_term():
    first, second = torch.full((1, 3, 16, 16), 0.4), torch.full((1, 3, 16, 16), 0.6)
    expected = (2 * 0.4 * 0.6 + 0.01**2) / (0.4**2 + 0.6**2 + 0.01**2)
    assert metrics.ssim(first, second).item() == pytest.approx(expected, abs=1e-6)


def ssim_by_its_formula(first, second, borders):
    """Equation 13 of Wang et al. 2004 in float64, with scipy's convolution: "valid" windows lie
    inside the image, "same" ones reach over its borders into zeros.
    """
    offsets = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(offsets, offsets) / offsets.sum() ** 2

    def local(values):
        return convolve(values, window[None, None], mode=borders, method="direct")

    x, y = (images.double().numpy() for images in (first, second))
    mean_x, mean_y = local(x), local(y)
    covariance = local(x * y) - mean_x * mean_y
    variances = local(x * x) - mean_x**2 + local(y * y) - mean_y**2
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (variances + 0.03**2)
    return (luminance * structure).mean(axis=(1, 2, 3))


@pytest.mark.parametrize(
    ("metric", "borders"), [(metrics.ssim, "valid"), (metrics.ssim_padded, "same")]
)
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_both_forms_of_ssim_agree_with_the_formula(metric, borders, noise):
    truth = embedded_images(4)[..., :28]
    generator = torch.Generator().manual_seed(1)
    images = (truth + noise * torch.randn(truth.shape, generator=generator)).clamp(0, 1)
    expected = ssim_by_its_formula(images, truth, borders)
    np.testing.assert_allclose(metric(images, truth), expected, atol=1e-6)


def test_ssim_with_zeros_around_the_image_is_for_images_of_any_size():
    assert metrics.ssim_padded(torch.ones(2, 3, 1, 4), torch.ones(2, 3, 1, 4)).tolist() == [1, 1]


# LPIPS


def authors_images():
    folder = Path(
        os.environ.get(
            "GIPIP_LPIPS_CHECK", Path(__file__).parents[1] / "../shared/data/lpips-check"
        )
    )
    if not (folder / "ex_ref.png").exists():
        pytest.skip("the LPIPS authors' example images are not here: set GIPIP_LPIPS_CHECK")
    names = ("ex_ref", "ex_p0", "ex_p1")
    return [to_tensor(Image.open(folder / f"{name}.png"))[None] for name in names]


def test_lpips_gives_the_numbers_that_its_authors_published():
    reference, first, second = authors_images()
    assert metrics.lpips(first, reference).item() == pytest.approx(0.722, abs=5e-4)
    assert metrics.lpips(second, reference).item() == pytest.approx(0.138, abs=5e-4)


def lpips_by_its_formula(first, second):
    """Equation 1 of Zhang et al. 2018 in float64, written with convolutions only."""
    import lpips

    trunk = {
        name: tensor.double()
        for name, tensor in read_tensors(DATA / "lpips-alexnet-trunk.safetensors")[0].items()
    }
    heads = torch.load(
        Path(lpips.__file__).parent / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True
    )
    mean, std = torch.tensor(
        [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64
    ).view(2, 1, 3, 1, 1)
    values = [(images.double() - mean) / std for images in (first, second)]
    distance = 0
    layers = [
        ("0", 4, 2, False),
        ("3", 1, 2, True),
        ("6", 1, 1, True),
        ("8", 1, 1, False),
        ("10", 1, 1, False),
    ]
    for index, (layer, stride, padding, pooled) in enumerate(layers):
        weight, bias = trunk[f"features.{layer}.weight"], trunk[f"features.{layer}.bias"]
        values = [nn.functional.max_pool2d(value, 3, 2) if pooled else value for value in values]
        values = [
            nn.functional.conv2d(value, weight, bias, stride, padding).relu() for value in values
        ]
        unit = [value / (value.norm(dim=1, keepdim=True) + 1e-10) for value in values]
        head = heads[f"lin{index}.model.1.weight"].double().view(1, -1, 1, 1)
        distance = distance + (head * (unit[0] - unit[1]).square()).sum(1).mean((1, 2))
    return distance


def embedded_images(count):
    return read_tensors(DATA / "cifar10-sample.safetensors")[0]["private_images"][:count] / 255


@pytest.mark.parametrize("truth", [embedded_images(4), random_images(size=64)])
def test_lpips_agrees_with_its_formula(truth):
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    images = (truth + 0.1 * noise).clamp(0, 1)
    torch.testing.assert_close(
        metrics.lpips(images, truth).double(),
        lpips_by_its_formula(images, truth),
        rtol=1e-4,
        atol=1e-6,
    )


def test_lpips_of_embedded_images_and_their_mirror_images_stays_what_it_was():
    truth = embedded_images(4)
    assert metrics.lpips(truth.flip(3), truth).tolist() == pytest.approx(
        [0.0365, 0.0396, 0.0426, 0.056], abs=1e-4
    )


def test_lpips_of_identical_images_is_0():
    assert metrics.lpips(random_images(), random_images()).tolist() == [0, 0, 0]


def test_lpips_of_many_images_equals_lpips_one_by_one():
    truth, images = random_images(70), random_images(70, seed=1)
    together = metrics.lpips(images, truth)
    torch.testing.assert_close(
        together[[0, 63, 64, 69]],
        torch.cat([metrics.lpips(images[[i]], truth[[i]]) for i in (0, 63, 64, 69)]),
    )


def test_measuring_lpips_for_the_first_time_leaves_the_global_generator_alone():
    anew, before = importlib.reload(metrics), torch.get_rng_state()  # forgets its network
    anew.lpips(random_images(1), random_images(1, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_pairwise_lpips_is_lpips_of_each_pair():
    images, others = random_images(3, size=48), random_images(5, size=48, seed=1)
    others[4] = images[0]
    found = metrics.pairwise_lpips(images, others)
    for place in range(5):
        expected = metrics.lpips(images, others[[place]].expand_as(images))
        torch.testing.assert_close(found[:, place], expected, rtol=1e-5, atol=1e-7)


def test_pairwise_lpips_to_many_images_is_that_to_each_part_of_them():
    images, others = random_images(2), embedded_images(256).repeat(2, 1, 1, 1)[:300]
    together = metrics.pairwise_lpips(images, others)
    again = metrics.pairwise_lpips(images, others)
    parts = torch.cat([metrics.pairwise_lpips(images, others[i::3]) for i in range(3)], dim=1)
    order = torch.cat([torch.arange(300)[i::3] for i in range(3)])
    assert torch.equal(together, again)
    torch.testing.assert_close(together[:, order], parts, rtol=1e-5, atol=1e-7)


def test_another_pool_is_measured_anew():
    images, pool = random_images(1), random_images(4, seed=1)
    first = metrics.pairwise_lpips(images, pool)
    pool[2] = images[0]  # the same tensor, another picture
    assert metrics.pairwise_lpips(images, pool)[0, 2] < 1e-6 < first.min()


# identified


def test_an_image_is_identified_if_no_other_of_the_pool_is_nearer():
    pool = embedded_images(8)
    images = torch.stack([pool[5], pool[2], 0.9 * pool[3]])
    assert metrics.identified(images, pool[[5, 1, 3]], pool).tolist() == [1, 0, 1]


def test_a_copy_of_the_truth_in_the_pool_counts_as_the_truth():
    pool = embedded_images(4)[[0, 1, 1, 2]]
    assert metrics.identified(pool[[1, 2]], pool[[2, 1]], pool).tolist() == [1, 1]


def test_what_is_identified_is_the_minimum_of_lpips_one_by_one():
    pool, noise = embedded_images(20), random_images(6, seed=2)
    images, truth = (0.5 * pool[:6] + 0.5 * noise).clamp(0, 1), pool[:6]
    every = torch.stack([metrics.lpips(images, each.expand_as(images)) for each in pool], dim=1)
    expected = (every.argmin(1) == torch.arange(6)).float()
    assert 0 < expected.sum() < 6
    assert torch.equal(metrics.identified(images, truth, pool), expected)


def test_evaluate_says_which_reconstructions_are_identified_among_how_many_candidates():
    pool = embedded_images(10)
    truth, order = pool[[7, 1, 4]], [2, 0, 1]
    table = evaluate((0.9 * truth)[order], truth, pool=Holder(pool))
    assert table["identified"].tolist() == [1, 1, 1] and table["candidates"].tolist() == [10] * 3
    assert list(table.columns[-3:]) == ["lpips", "identified", "candidates"]
    mirrored = evaluate(pool[[2, 2, 2]], truth, pool=pool)
    assert mirrored["identified"].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "pool", [embedded_images(10)[:7], embedded_images(10) * 0.99, random_images(10, size=64)]
)
def test_a_pool_without_the_private_images_is_refused(pool):
    truth = embedded_images(10)[[7, 1]]
    with pytest.raises(DataError, match="pool does not hold the batch's images"):
        evaluate(truth, truth, pool=pool)


def test_a_pool_of_no_images_is_refused():
    with pytest.raises(DataError, match=r"The pool must hold .*\(10, 3, 32\)"):
        evaluate(random_images(2), random_images(2), pool=torch.rand(10, 3, 32))


# Matching


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8).flatmap(lambda count: st.permutations(range(count))), st.integers(0, 100))
def test_match_undoes_a_known_permutation(order, seed):
    truth = random_images(len(order), size=8, seed=seed)
    noisy = (
        truth + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    ).clamp(0, 1)
    matched = metrics.match(noisy[list(order)], truth)
    assert torch.equal(noisy[list(order)][matched], noisy)


def test_match_uses_every_reconstruction_once_even_if_one_is_nearest_to_all():
    truth = torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    images = torch.tensor([0.5, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    assert metrics.match(images, truth).tolist() == [1, 0, 2]


# Features


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 5), nn.ReLU())
        self.last = nn.Linear(5, 2)

    def forward(self, images):
        return self.last(self.hidden(images))


def test_feature_mse_is_of_what_enters_the_last_linear_layer():
    model = Tiny().eval()
    images, truth = random_images(size=8), random_images(size=8, seed=1)
    expected = (model.hidden(images) - model.hidden(truth)).square().mean(1).detach()
    torch.testing.assert_close(metrics.feature_mse(model, images, truth), expected)


def test_feature_mse_leaves_a_model_in_train_mode_as_it_was():
    model = Tiny().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics.feature_mse(model, random_images(size=8), random_images(size=8, seed=1))
    assert model.training and all(
        torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()
    )
    assert not model.last._forward_pre_hooks


def test_feature_mse_without_a_linear_layer_is_refused():
    with pytest.raises(ModelError):
        metrics.feature_mse(nn.Conv2d(3, 2, 3), random_images(), random_images())


# evaluate


class Holder:
    def __init__(self, images):
        self.images = images


def test_evaluate_gives_a_row_per_private_image_under_one_assignment():
    truth = random_images(4)
    order = torch.tensor([2, 0, 3, 1])
    table = evaluate(Holder((0.9 * truth)[order]), Holder(truth))
    assert list(table.columns) == [*("image", "matched", "psnr", "ssim", "ssim_padded", "lpips")]
    assert table["image"].tolist() == [0, 1, 2, 3] and order[
        table["matched"].tolist()
    ].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(table["psnr"], metrics.psnr(0.9 * truth, truth))
    np.testing.assert_allclose(table["ssim"], metrics.ssim(0.9 * truth, truth), rtol=1e-6)
    padded = metrics.ssim_padded(0.9 * truth, truth)
    np.testing.assert_allclose(table["ssim_padded"], padded, rtol=1e-6)
    np.testing.assert_allclose(table["lpips"], metrics.lpips(0.9 * truth, truth), rtol=1e-4)


@settings(max_examples=8, deadline=None)
@given(st.permutations(range(4)))
def test_evaluate_does_not_depend_on_the_order_of_the_reconstruction(order):
    truth, images, model = (
        random_images(4),
        random_images(4, seed=1),
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Linear(4, 2)),
    )
    first = evaluate(images, truth, model=model).drop(columns="matched")
    second = evaluate(images[list(order)], truth, model=model).drop(columns="matched")
    pd.testing.assert_frame_equal(first, second, rtol=1e-4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (random_images(2, size=16), r"\(3, 16, 16\)"),
        (3 * random_images(2), r"expected images in \[0, 1\]"),
        (random_images(2) - 0.01, r"expected images in \[0, 1\]"),
        (random_images(2) / 0, "NaN or infinite"),
        (random_images(2)[:, :1], r"shape \(1, 32, 32\) for private ones of shape \(3, 32, 32\)"),
        (random_images(2)[:, :2], r"\(batch, 1 or 3, height, width\); found \(2, 2, 32, 32\)"),
        (random_images(2)[:0], "holds no images"),
        ([0.5], "found list"),
    ],
)
def test_evaluate_says_what_is_wrong_with_images(images, message):
    with pytest.raises(DataError, match=message):
        evaluate(images, random_images(2))


def test_evaluate_refuses_another_number_of_images():
    with pytest.raises(BatchSizeError, match="3 reconstructed images .* 2 private"):
        evaluate(random_images(3), random_images(2))


def test_evaluate_tolerates_rounding_outside_the_range():
    assert np.isfinite(evaluate(random_images(2) * (1 + 5e-5), random_images(2)).to_numpy()).all()


@pytest.mark.parametrize(
    ("height", "width", "missing"),
    [
        (16, 16, ["lpips", "identified"]),
        (30, 64, ["lpips", "identified"]),
        (10, 16, ["ssim", "lpips", "identified"]),
        (31, 31, []),
    ],
)
def test_images_too_small_for_a_metric_get_nan_there_with_one_warning(height, width, missing):
    images = torch.rand(2, 3, height, width)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        table = evaluate(images, images, pool=images)
    assert list(table.columns[table.isna().all()]) == missing
    assert (table["psnr"] == 100).all() and table.drop(columns=missing).notna().all(axis=None)
    messages = [str(warning.message) for warning in caught if "NaN" in str(warning.message)]
    assert len(messages) == bool(missing)
    assert all(f"{min(height, width)} pixels, for {' and '.join(missing)}" in m for m in messages)


@pytest.mark.parametrize(("metric", "side", "needed"), [("lpips", 30, 31), ("ssim", 10, 11)])
def test_a_metric_alone_refuses_images_too_small_for_it_and_says_what_it_needs(
    metric, side, needed
):
    images = torch.rand(2, 3, 40, side)
    with pytest.raises(DataError, match=f"{metric} needs .* {needed} pixels a side, not 40×{side}"):
        getattr(metrics, metric)(images, images)


def test_measuring_starts_without_the_packages_that_are_slow_to_import():
    code = """
import sys
import gipip.evaluation.anomalies, gipip.evaluation.metrics, gipip.priors.gan
slow = {"torchmetrics", "lpips", "torchvision", "scipy"} & set(sys.modules)
assert not slow, slow
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Intervals


def test_the_interval_of_normal_data_is_close_to_its_closed_form():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * 2 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * 2 * half)
    assert interval.count == 400


def test_the_interval_of_eight_normal_values_covers_the_mean_about_as_often_as_it_says():
    samples = np.random.default_rng(1).normal(size=(300, 8))
    intervals = [bootstrap_interval(sample) for sample in samples]
    covered = sum(interval.low <= 0 <= interval.high for interval in intervals)
    assert scipy.stats.binomtest(covered, 300, 0.95).pvalue > 0.01


def test_the_same_values_give_the_same_interval_whatever_the_global_generator():
    values = np.random.default_rng(0).normal(size=20)
    np.random.seed(1)
    first = bootstrap_interval(values)
    np.random.seed(2)
    assert bootstrap_interval(values) == first


def test_images_that_were_reconstructed_together_widen_the_interval():
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(12), 8)
    values = generator.normal(size=12)[groups] + 0.1 * generator.normal(size=96)
    grouped, naive = bootstrap_interval(values, groups=groups), bootstrap_interval(values)
    assert grouped.high - grouped.low > 2 * (naive.high - naive.low)
    assert (grouped.count, naive.count) == (12, 96) and grouped.mean == pytest.approx(naive.mean)


def test_two_groups_of_unequal_size_give_an_interval_within_their_means():
    interval = bootstrap_interval([0, 0, 0, 1], groups=["a", "a", "a", "b"])
    assert interval == Interval(0.25, 0.0, 1.0, 2)


@pytest.mark.parametrize(("values", "groups"), [([0.5], None), ([1.0, 2.0], ["a", "a"])])
def test_one_observation_has_no_interval(values, groups):
    interval = bootstrap_interval(values, groups=groups)
    assert (
        interval.mean == np.mean(values)
        and np.isnan(interval.low)
        and np.isnan(interval.high)
        and interval.count == 1
    )


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_an_interval_of_unusable_values_is_refused(values):
    with pytest.raises(DataError, match="finite"):
        bootstrap_interval(values)


def test_groups_of_another_length_are_refused():
    with pytest.raises(DataError, match="one group a value"):
        bootstrap_interval([1.0, 2.0], groups=["a"])


def test_identical_arms_differ_by_exactly_0():
    values = np.random.default_rng(0).normal(size=10)
    assert paired_difference(values, values) == Interval(0, 0, 0, 10)


def test_a_paired_difference_is_surer_than_the_arms_are():
    generator = np.random.default_rng(0)
    b = generator.normal(20, 3, size=16)
    a = b + 0.5 + 0.1 * generator.normal(size=16)
    difference = paired_difference(pd.Series(a, index=range(16)), pd.Series(b, index=range(16, 32)))
    assert (
        0
        < difference.low
        < 0.5
        < difference.high
        < bootstrap_interval(a).high - bootstrap_interval(b).low
    )


def test_arms_of_different_length_cannot_be_paired():
    with pytest.raises(DataError, match="paired"):
        paired_difference([1.0, 2.0], [1.0])


def test_an_interval_reads_like_a_result():
    interval = Interval(0.4234, 0.1, 0.75, 8)
    assert str(interval) == "+0.42 [+0.10, +0.75]"
    assert f"{interval}" == "+0.42 [+0.10, +0.75]" and f"{interval:.3f}" == "0.423 [0.100, 0.750]"
    assert str(Interval(-0.1, float("nan"), float("nan"), 1)) == "−0.10 (no interval)"
