"""The generator: shapes, augmentation, a training of a few steps on real images, and the
kernel distance that judges it. What all priors share is in test_priors.
"""

import pytest
import torch
from pydantic import ValidationError

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import DataError
from gipip.priors.gan import (
    GenerativePrior,
    Generator,
    GeneratorTraining,
    augmentation,
    discriminator,
    kernel_distance,
    train_generator,
)


@pytest.fixture(scope="module")
def images():
    """48 real images of 16×16 pixels."""
    auxiliary = load_dataset("cifar10").auxiliary()[:48]
    return LabeledImages(auxiliary.pixels[:, :, ::2, ::2].contiguous(), auxiliary.labels)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(GeneratorTraining, "samples", 16)
    monkeypatch.setattr(GeneratorTraining, "every", 2)
    torch.manual_seed(0)


def train(images, **changes):
    return train_generator(
        images, **{"width": 4, "latent_size": 6, "steps": 3, "batch_size": 8} | changes
    )


# Networks ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 64])
def test_generator_and_discriminator_fit_images_of_16_32_and_64_pixels(size):
    made = Generator(width=4, latent_size=6, image_size=size)(torch.randn(2, 6))
    assert made.shape == (2, 3, size, size) and made.min() >= 0 and made.max() <= 1
    assert discriminator(4, size)(made).shape == (2,)


@pytest.mark.parametrize("size", [0, 4, 8, 20, 24, 48, 63])
def test_another_image_size_is_refused_with_the_sizes_there_are(size):
    with pytest.raises(DataError, match=f"16, 32, 64.*not {size}"):
        Generator(image_size=size)


def test_channels_double_towards_the_4_by_4_map():
    widths = [
        layer.out_channels
        for layer in Generator(width=5, image_size=32).layers
        if isinstance(layer, torch.nn.ConvTranspose2d)
    ]
    assert widths == [20, 10, 5, 3]


def test_samples_are_determined_by_their_seed_and_leave_the_global_generator_alone():
    prior, before = GenerativePrior(Generator(4, 6, 16)), torch.get_rng_state()
    first, again, other = (prior.sample(3, seed=seed) for seed in (1, 1, 2))
    assert (
        torch.equal(first, again)
        and not torch.equal(first, other)
        and first.shape == (3, 3, 16, 16)
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("count", "seed"), [(0, 0), (1, -1), (1, 2**63)])
def test_impossible_samples_are_refused(count, seed):
    with pytest.raises(ValidationError, match="GenerativePrior.sample"):
        GenerativePrior(Generator(4, 6, 16)).sample(count=count, seed=seed)


# Augmentation ------------------------------------------------------------------


def test_an_augmentation_keeps_shape_and_range_differs_every_time_and_is_differentiated():
    images, augment = torch.rand(2, 3, 16, 16, requires_grad=True), augmentation()
    first, second = augment(images), augment(images)
    assert first.shape == images.shape and not torch.equal(first, second)
    assert first.min() >= 0 and first.max() <= 1
    (gradient,) = torch.autograd.grad(first.sum(), images)
    assert (gradient != 0).any()


def test_an_augmentation_makes_a_hole_of_half_the_side():
    augmented = augmentation()(torch.zeros(1, 3, 16, 16))  # black stays black in other colours
    rows, columns = ((augmented[0, 0] == 0.5).sum(dim=axis).max() for axis in (0, 1))
    assert 8 <= rows <= 16 and 8 <= columns <= 16


# Training ----------------------------------------------------------------------


def test_training_changes_every_weight_and_says_how_it_was_done(images):
    prior = train(images)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = dict(Generator(4, 6, 16).named_parameters())
    assert not any(
        torch.equal(weight, untrained[name]) for name, weight in prior.generator.named_parameters()
    )
    about = prior.provenance
    assert (about["data"], about["images"], about["settings"]["width"]) == (
        images.fingerprint,
        48,
        4,
    )
    assert about["history"]["step"] == [2, 3] and len(about["history"]["kernel distance"]) == 2


def test_what_is_kept_is_a_moving_average_whose_first_weights_are_soon_forgotten(images):
    settings = {"width": 4, "latent_size": 6, "batch_size": 8, "learning_rate": 1e-3, "seed": 0}
    training, expected = GeneratorTraining(images, settings), {}
    for decay in (0, 1 / 11, 2 / 12, 3 / 13):
        training.advance()
        for name, value in training.generator.named_parameters():
            expected[name] = decay * expected.get(name, 0) + (1 - decay) * value.detach()
    torch.testing.assert_close(dict(training.network.named_parameters()), expected)


def test_images_that_no_generator_can_be_trained_on_are_refused(images):
    with pytest.raises(DataError, match="16, 32, 64.*not 8"):
        train(LabeledImages(images.pixels[..., :8].contiguous(), images.labels))
    with pytest.raises(DataError, match="cannot be trained on: it makes 16×16.*8×16"):
        train(LabeledImages(images.pixels[:, :, :8].contiguous(), images.labels))
    with pytest.raises(DataError, match="16, 32, 64.*not 12"):
        train(LabeledImages(images.pixels[..., :12, :12].contiguous(), images.labels))


# The kernel distance -----------------------------------------------------------


def test_two_halves_of_the_real_images_are_nearer_to_each_other_than_to_noise():
    real = load_dataset("cifar10").auxiliary()[:160].images
    distance = kernel_distance(real[:80])
    near, far = distance(real[80:]), distance(torch.rand(80, 3, 32, 32))
    assert abs(near) < 0.1 * far
    assert distance(real[80:]) == near  # it forgets the images, not the real ones


def test_a_training_warns_of_nothing(images, recwarn):
    train(images)
    assert not [str(warning.message) for warning in recwarn]
