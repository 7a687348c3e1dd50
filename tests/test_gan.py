"""The generator: shapes, augmentation, a training of a few steps on real images, and
the kernel distance that judges it.
"""

import pytest
import torch
from torch.autograd import gradcheck

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import DamagedFileError, DataError, GipipError
from gipip.files import write_tensors
from gipip.priors import (
    AnomalyScore,
    Autoencoder,
    GenerativePrior,
    Generator,
    load_generator,
    train_generator,
)
from gipip.priors import gan as module


@pytest.fixture(scope="module")
def images():
    """48 real images of 16×16 pixels."""
    auxiliary = load_dataset("cifar10").auxiliary()[:48]
    return LabeledImages(auxiliary.pixels[:, :, ::2, ::2].contiguous(), auxiliary.labels)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(module, "_SAMPLES", 16)
    monkeypatch.setattr(module, "_EVALUATE_EVERY", 2)
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
    assert module._discriminator(4, size)(made).shape == (2,)


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


def test_a_prior_is_never_trained():
    prior = GenerativePrior(Generator(4, 6, 16))
    assert (
        not any(parameter.requires_grad for parameter in prior.parameters())
        and not prior.generator.training
    )


# Augmentation ------------------------------------------------------------------


def augmentation(seed, count=3):
    return module._augmentation(count, torch.Generator().manual_seed(seed))


def test_an_augmentation_is_the_same_for_equal_random_numbers_and_whenever_it_is_applied():
    x = torch.rand(3, 3, 16, 16)
    augment = augmentation(1)
    assert torch.equal(augment(x), augmentation(1)(x)) and torch.equal(augment(x), augment(x))
    assert not torch.equal(augment(x), augmentation(2)(x)) and augment(x).shape == x.shape


def test_every_image_of_a_batch_is_augmented_in_its_own_way():
    augmented = augmentation(1)(torch.rand(1, 3, 16, 16).expand(3, -1, -1, -1))
    assert not torch.equal(augmented[0], augmented[1]) and not torch.equal(
        augmented[1], augmented[2]
    )


def test_the_gradient_through_an_augmentation_agrees_with_finite_differences():
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert gradcheck(augmentation(3, 2), (x,))


def test_a_translation_moves_by_up_to_an_eighth_and_fills_with_grey():
    x = torch.zeros(3, 3, 16, 16)
    x[:, :, 8, 8] = 1
    moved = module._translate(x, torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.999, 0.0]]))
    places = [tuple(image[0].nonzero()[0].tolist()) for image in moved]
    assert places == [(10, 10), (8, 8), (6, 10)] and moved.sum() == 9
    whole = module._translate(torch.ones(1, 3, 16, 16), torch.tensor([[0.0, 0.5]]))
    assert whole[0, 0, :2].sum() == 0 and whole[0, 0, 2:].sum() == 14 * 16


def test_a_cutout_is_a_square_of_about_half_the_side():
    cut = module._cut_out(torch.ones(1, 3, 16, 16), torch.tensor([[0.5, 0.25]]))
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


def test_training_is_determined_by_its_seed_and_leaves_the_global_generator_alone(images):
    before = torch.get_rng_state()
    prints = [train(images, steps=2, seed=seed).fingerprint for seed in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_is_an_option(images):
    assert train(images, steps=2, augment=False).fingerprint != train(images, steps=2).fingerprint


def test_what_is_kept_is_a_moving_average_whose_first_weights_are_soon_forgotten(images):
    networks = Generator(4, 6, 16), module._discriminator(4, 16)
    training = module._Training(*networks, learning_rate=1e-3, ema=0.3)
    expected = {name: value.clone() for name, value in networks[0].state_dict().items()}
    for decay in (1 / 11, 2 / 12, 3 / 13, 4 / 14, 0.3, 0.3):
        training.step(images[:8].images, torch.nn.Identity(), torch.Generator().manual_seed(0))
        for name, value in networks[0].state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * value
                if value.is_floating_point()
                else value.clone()
            )
    torch.testing.assert_close(dict(training.average.state_dict()), expected)


class Scripted:
    """A kernel distance that gives these values in turn."""

    def __init__(self, values):
        self.values = iter(values)

    def to(self, device):
        return self

    def update(self, images, real):
        assert images.shape[1:] == (3, 16, 16)

    def reset(self):
        pass

    def compute(self):
        return torch.tensor(next(self.values)), torch.tensor(0.0)


@pytest.mark.parametrize(
    ("distances", "best"),
    [([3.0, 1.0, 2.0], 2), ([1.0, 2.0, 3.0], 1), ([3.0, 2.0, 1.0], 3), ([1.0, 1.0, 1.0], 1)],
)
def test_the_checkpoint_of_the_smallest_kernel_distance_is_kept(
    images, monkeypatch, distances, best
):
    monkeypatch.setattr(module, "_EVALUATE_EVERY", 1)
    kept = []
    for steps in (3, best):
        monkeypatch.setattr(module, "kernel_distance", lambda count: Scripted(distances))
        kept.append(train(images, steps=steps))
    assert kept[0].provenance["history"] == {"step": [1, 2, 3], "kernel distance": distances}
    if distances[best - 1] == min(distances[:best]):  # the shorter training ends with its best
        assert kept[0].fingerprint == kept[1].fingerprint


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_diverges_is_an_error_and_not_a_prior(images):
    with pytest.raises(GipipError, match="diverged.*after 2 steps.*smaller learning_rate"):
        train(images, learning_rate=1e30)


def test_images_that_no_generator_can_be_trained_on_are_refused(images):
    with pytest.raises(DataError, match="at least 2 square images; found 1 of 16×16"):
        train(images[:1])
    with pytest.raises(DataError, match="found 48 of 16×8"):
        train(LabeledImages(images.pixels[..., :8].contiguous(), images.labels))
    with pytest.raises(DataError, match="16, 32, 64.*not 12"):
        train(LabeledImages(images.pixels[..., :12, :12].contiguous(), images.labels))


# The kernel distance -----------------------------------------------------------


def test_two_halves_of_the_real_images_are_nearer_to_each_other_than_to_noise():
    real = load_dataset("cifar10").auxiliary()[:160].images
    distance = module.kernel_distance(80)
    distance.update(real[:80], real=True)
    found = []
    for images in (real[80:], torch.rand(80, 3, 32, 32)):
        distance.reset()  # forgets the generated images, not the real ones
        distance.update(images, real=False)
        found.append(distance.compute()[0].item())
    assert abs(found[0]) < 0.1 * found[1]


# Files -------------------------------------------------------------------------


def test_a_finished_training_is_loaded_from_the_store_the_second_time(
    images, tmp_path, monkeypatch
):
    first = train(images, steps=2, store=tmp_path)
    monkeypatch.setattr(module, "_Training", None)  # training again would fail
    again = train(images, steps=2, store=tmp_path)
    assert (again.fingerprint, again.provenance) == (first.fingerprint, first.provenance)
    for change in ({"seed": 1}, {"steps": 3}, {"augment": False}):
        with pytest.raises(TypeError):
            train(images, **{"steps": 2, "store": tmp_path} | change)


@pytest.mark.parametrize("size", [16, 32])
def test_what_is_saved_comes_back_with_the_same_fingerprint_and_samples(tmp_path, size):
    prior = GenerativePrior(Generator(4, 6, size), {"images": 64})
    loaded = GenerativePrior.load(prior.save(tmp_path / "generator.safetensors"))
    assert (loaded.fingerprint, loaded.provenance) == (prior.fingerprint, {"images": 64})
    assert torch.equal(loaded.sample(2), prior.sample(2)) and not loaded.generator.training


SHAPE = {"width": 4, "latent_size": 6, "image_size": 16}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"generator": SHAPE},
        {"generator": SHAPE | {"width": 5}, "provenance": {}},
        {"generator": SHAPE | {"depth": 3}, "provenance": {}},
    ],
    ids=["none", "no provenance", "another width", "another network"],
)
def test_a_file_that_holds_something_else_is_refused(tmp_path, metadata):
    path = write_tensors(tmp_path / "other.safetensors", Generator(**SHAPE).state_dict(), metadata)
    with pytest.raises(
        DamagedFileError, match="(?s)other.safetensors does not hold a generator.*train generator"
    ):
        GenerativePrior.load(path)


def test_an_autoencoders_file_and_a_cut_one_are_refused(tmp_path):
    path = AnomalyScore(Autoencoder(4, 2)).save(tmp_path / "prior.safetensors")
    with pytest.raises(DamagedFileError, match="does not hold a generator"):
        GenerativePrior.load(path)
    path = GenerativePrior(Generator(**SHAPE)).save(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedFileError, match="cut.safetensors"):
        GenerativePrior.load(path)


def test_a_generator_that_does_not_ship_is_refused_with_the_remedy():
    with pytest.raises(DataError, match="No generator 'mnist' ships.*train_generator"):
        load_generator("mnist")
