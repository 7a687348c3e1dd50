"""Spoiled images are what they say, and AUROC is the probability it claims to be."""

import pytest
import torch
from pydantic import ValidationError

import gipip
from gipip.attacks.objectives import total_variation
from gipip.evaluation.anomalies import anomalies, auroc


@pytest.fixture(scope="module")
def natural():
    return gipip.load_dataset("cifar10").tuning_pool[:20].images


def test_every_kind_has_as_many_images_as_there_were_and_they_lie_in_the_unit_interval(natural):
    for images in anomalies(natural).values():
        assert images.shape == natural.shape
        assert images.min() >= 0 and images.max() <= 1


def test_shuffling_moves_whole_pixels_and_changes_none(natural):
    shuffled = anomalies(natural)["shuffled"]
    assert not torch.equal(shuffled, natural)
    for before, after in zip(natural.flatten(2), shuffled.flatten(2), strict=True):
        assert sorted(before.T.tolist()) == sorted(after.T.tolist())


@pytest.mark.parametrize("kind", ["blurred", "TV-smoothed"])
def test_smoothed_images_vary_less_but_stay_closer_to_the_original_than_grey_does(natural, kind):
    smoothed = anomalies(natural)[kind]
    assert total_variation(smoothed) < 0.7 * total_variation(natural)
    grey = natural.mean(dim=(2, 3), keepdim=True)
    assert (smoothed - natural).square().mean() < 0.5 * (grey - natural).square().mean()


def test_the_same_seed_gives_the_same_anomalies(natural):
    first, second, other = anomalies(natural), anomalies(natural), anomalies(natural, seed=1)
    assert all(torch.equal(first[kind], second[kind]) for kind in first)
    assert not torch.equal(first["noise"], other["noise"])


def test_auroc_counts_the_pairs_in_which_the_anomaly_scores_higher():
    # pairs (natural, anomalous): 1<2, 1<4, 3>2, 3<4 → three of four; scores far outside
    # [0, 1] must not matter
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])) == pytest.approx(0.75)
    assert auroc(torch.tensor([-1e-6, 5e3]), torch.tensor([1e4])) == 1
    assert auroc(torch.tensor([1.0]), torch.tensor([1.0])) == pytest.approx(0.5)


def test_auroc_is_the_share_of_pairs_to_the_last_digit_with_ties_and_without():
    random = torch.Generator().manual_seed(0)
    natural, anomalous = (torch.randint(0, 9, (n,), generator=random) / 8.0 for n in (37, 23))
    for found in ((natural, anomalous), (natural + torch.rand(37, generator=random), anomalous)):
        pairs = torch.cartesian_prod(*found)
        wins = (pairs[:, 1] > pairs[:, 0]).double() + (pairs[:, 1] == pairs[:, 0]).double() / 2
        assert auroc(*found) == pytest.approx(wins.mean().item(), abs=1e-12)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_an_impossible_seed_is_refused(natural, seed):
    with pytest.raises(ValidationError, match="anomalies\nseed\n"):
        anomalies(natural, seed=seed)


def test_the_shipped_prior_scores_noise_and_blurred_images_as_anomalies_with_its_calibrated_offset(
    natural,
):
    prior = gipip.load_prior()
    spoiled = anomalies(natural)
    assert auroc(prior(natural), prior(spoiled["noise"])) > 0.99
    assert auroc(prior(natural), prior(spoiled["blurred"])) > 0.8
    assert (
        auroc(prior.with_offset(0)(natural), prior.with_offset(0)(spoiled["blurred"])) < 0.1
    )  # which is what c is for
