"""Reference pictures and pictures of a known PSNR, against closed forms and numpy."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter

from gipip.data.datasets import load_dataset
from gipip.errors import DataError
from gipip.evaluation.metrics import psnr
from gipip.evaluation.references import REFERENCES, at_psnr, mean_image, references
from gipip.files import DATA, read_tensors

PRIVATE = read_tensors(DATA / "cifar10-sample.safetensors")[0]["private_images"][:6] / 255
KINDS = ("blurred", "noisy", "blocky")


def test_cifars_mean_image_is_the_mean_of_the_auxiliary_images_and_no_private_one_is_in_it():
    pixels = load_dataset("cifar10").auxiliary_pool.pixels.numpy()
    assert len(pixels) == 1_900
    np.testing.assert_allclose(mean_image("cifar10"), pixels.mean(axis=0) / 255, atol=1e-6)


@pytest.mark.parametrize("name", ["imagenet64", "imagenet64-mine"])
def test_imagenets_mean_image_is_of_as_many_photographs_as_its_priors_and_hashes(name):
    tensors, about = read_tensors(DATA / "mean-imagenet64.safetensors")
    assert torch.equal(mean_image(name), tensors["mean"])
    assert about["images"] == len(read_tensors(DATA / "hashes-imagenet64.safetensors")[0]["hashes"])
    # a sum of very many photographs is smooth, and nearly grey
    mean = mean_image(name)
    assert mean.shape == (3, 64, 64) and ((mean > 0.35) & (mean < 0.52)).all()


def test_the_mean_image_of_an_unknown_data_set_is_refused():
    with pytest.raises(DataError, match="no data set 'cifar11'"):
        mean_image("cifar11")


def test_the_mean_image_and_the_mean_colour_are_what_they_say():
    found = references(PRIVATE, mean_image("cifar10"))
    assert tuple(found) == REFERENCES
    assert all(images.shape == PRIVATE.shape for images in found.values())
    assert torch.equal(found["mean image"][3], mean_image("cifar10"))
    # of all pictures of one colour the mean colour has the highest PSNR: the image's variance
    variance = PRIVATE.numpy().var(axis=(2, 3)).mean(axis=1)
    np.testing.assert_allclose(psnr(found["mean colour"], PRIVATE), -10 * np.log10(variance), 1e-5)


@pytest.mark.parametrize("side", [4, 8])
def test_a_thumbnail_is_of_averaged_areas_and_scaled_up_in_straight_lines(side):
    thumbnail = references(PRIVATE, mean_image("cifar10"))[f"{side}×{side} thumbnail"].numpy()
    areas = PRIVATE.numpy().reshape(6, 3, side, 32 // side, side, 32 // side).mean(axis=(3, 5))
    centres = (np.arange(side) + 0.5) * 32 / side - 0.5
    for row in (5, 16, 31):
        across = [np.interp(row, centres, areas[0, 1, :, column]) for column in range(side)]
        expected = np.interp(np.arange(32), centres, across)
        np.testing.assert_allclose(thumbnail[0, 1, row], expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [10, 13, 16.12, 19, 25, 40])
def test_images_get_the_psnr_asked_for_each_its_own(kind, wanted):
    images = at_psnr(PRIVATE, wanted, kind)
    assert images.min() >= 0 and images.max() <= 1
    np.testing.assert_allclose(psnr(images, PRIVATE), wanted, atol=0.05)


def test_blurred_is_by_a_gaussian_mirrored_at_the_borders():
    blurred = torch.from_numpy(gaussian_filter(PRIVATE[:1].numpy(), (0, 0, 2, 2), truncate=8))
    again = at_psnr(PRIVATE[:1], float(psnr(blurred, PRIVATE[:1])), "blurred")
    assert psnr(again, blurred) > 50


@pytest.mark.parametrize("size", [2, 4, 8])
def test_blocky_passes_through_averages_of_equal_blocks(size):
    cells = PRIVATE[:1].numpy().reshape(1, 3, 32 // size, size, 32 // size, size)
    averages = np.broadcast_to(cells.mean(axis=(3, 5), keepdims=True), cells.shape)
    blocks = torch.from_numpy(averages.reshape(1, 3, 32, 32))
    again = at_psnr(PRIVATE[:1], float(psnr(blocks, PRIVATE[:1])), "blocky")
    assert psnr(again, blocks) > 50


def test_pictures_that_are_not_square_can_be_made_worse():
    images = torch.rand(2, 3, 20, 33, generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        np.testing.assert_allclose(psnr(at_psnr(images, 9.0, kind), images), 9, atol=0.05)


@pytest.mark.parametrize("kind", ["blurred", "blocky"])
def test_an_image_that_cannot_get_so_bad_is_refused_and_named(kind):
    images = torch.stack([torch.full((3, 8, 8), 0.5), torch.full((3, 8, 8), 0.1)])
    with pytest.raises(DataError, match=f"Image 1, {kind}, has at least 20.0 dB"):
        at_psnr(images, 10.0, kind)


@pytest.mark.parametrize(("psnr", "kind"), [(0, "noisy"), (95, "noisy"), (16, "sharp")])
def test_an_unknown_kind_and_an_impossible_psnr_are_refused(psnr, kind):
    with pytest.raises(ValidationError, match="for at_psnr\n(psnr|kind)\n"):
        at_psnr(PRIVATE, psnr=psnr, kind=kind)
