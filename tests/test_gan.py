"""The generator: shapes, augmentation, a training of a few steps on real images, and the
kernel distance that judges it. What all priors share is in test_priors.
"""

import pytest
import torch
from torch.autograd import gradcheck

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import DataError
from gipip.priors.gan import (
    GenerativePrior,
    Generator,
    GeneratorTraining,
    augmentation,
    cut_out,
    discriminator,
    kernel_distance,
    train_generator,
    translate,
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
    with pytest.raises(DataError, match="GenerativePrior.sample"):
        GenerativePrior(Generator(4, 6, 16)).sample(count=count, seed=seed)


# Augmentation ------------------------------------------------------------------


def seeded_augmentation(seed, count=3):
    return augmentation(count, torch.Generator().manual_seed(seed))


def test_an_augmentation_is_the_same_for_equal_random_numbers_and_whenever_it_is_applied():
    x = torch.rand(3, 3, 16, 16)
    augment = seeded_augmentation(1)
    assert torch.equal(augment(x), seeded_augmentation(1)(x)) and torch.equal(
        augment(x), augment(x)
    )
    assert not torch.equal(augment(x), seeded_augmentation(2)(x)) and augment(x).shape == x.shape


def test_every_image_of_a_batch_is_augmented_in_its_own_way():
    augmented = seeded_augmentation(1)(torch.rand(1, 3, 16, 16).expand(3, -1, -1, -1))
    assert not torch.equal(augmented[0], augmented[1]) and not torch.equal(
        augmented[1], augmented[2]
    )


def test_the_gradient_through_an_augmentation_agrees_with_finite_differences():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(seeded_augmentation(3, 2), (x,))


def test_a_translation_moves_by_up_to_an_eighth_and_fills_with_grey():
    x = torch.zeros(3, 3, 16, 16)
    x[:, :, 8, 8] = 1
    moved = translate(x, torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.999, 0.0]]))
    places = [tuple(image[0].nonzero()[0].tolist()) for image in moved]
    assert places == [(10, 10), (8, 8), (6, 10)] and moved.sum() == 9
    whole = translate(torch.ones(1, 3, 16, 16), torch.tensor([[0.0, 0.5]]))
    assert whole[0, 0, :2].sum() == 0 and whole[0, 0, 2:].sum() == 14 * 16


def test_a_cutout_is_a_square_of_about_half_the_side():
    cut = cut_out(torch.ones(1, 3, 16, 16), torch.tensor([[0.5, 0.25]]))
    rows, columns = ((cut[0, 0] == 0).any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
    assert rows == list(range(4, 13)) and columns == list(range(9))


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
    training = GeneratorTraining(images, settings)
    expected = {name: value.clone() for name, value in training.generator.state_dict().items()}
    for decay in (1 / 11, 2 / 12, 3 / 13, 4 / 14):
        training.advance()
        training.steps += 1
        for name, value in training.generator.state_dict().items():
            average = decay * expected[name] + (1 - decay) * value
            expected[name] = average if value.is_floating_point() else value.clone()
    torch.testing.assert_close(dict(training.network.state_dict()), expected)


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
