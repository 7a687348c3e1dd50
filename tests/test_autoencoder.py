"""The anomaly score: closed forms with fake autoencoders, and its calibration on real
images. What all priors share is in test_priors.
"""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import DataError
from gipip.priors.autoencoder import AnomalyScore, Autoencoder, load_prior, train_autoencoder


@pytest.fixture(scope="module")
def images():
    return load_dataset("cifar10").auxiliary()[:64]


class Dims(Autoencoder):
    """Gives back every image at half its brightness."""

    def forward(self, images):
        return images / 2


def test_the_network_is_the_references_with_a_code_of_a_quarter_of_the_input():
    network = Autoencoder().layers
    convolutions = [
        (layer.in_channels, layer.out_channels)
        for layer in network
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    ]
    assert convolutions == [(3, 12), (12, 24), (24, 48), (48, 24), (24, 12), (12, 3)]
    assert network[:6](torch.rand(1, 3, 32, 32)).numel() == 768 == 3 * 32 * 32 // 4
    assert isinstance(network[-1], nn.Sigmoid)


@pytest.mark.parametrize(
    ("width", "depth", "size"), [(12, 3, 32), (12, 3, 64), (4, 1, 8), (5, 4, 16)]
)
def test_the_output_has_the_images_shape_and_lies_in_0_1(width, depth, size):
    output = Autoencoder(width, depth)(torch.rand(2, 3, size, size))
    assert output.shape == (2, 3, size, size) and output.min() > 0 and output.max() < 1


def test_errors_are_each_images_mean_squared_error():
    images = torch.stack([torch.full((3, 8, 8), 0.4), torch.full((3, 8, 8), 0.8)])
    torch.testing.assert_close(AnomalyScore(Dims()).errors(images), torch.tensor([0.04, 0.16]))


@pytest.mark.parametrize(("per", "scores"), [("image", [0.06, 0.06]), ("batch", [0.0])])
def test_the_score_is_the_distance_of_the_error_from_the_offset_per_image_or_per_batch(per, scores):
    images = torch.stack(
        [torch.full((3, 8, 8), 0.4), torch.full((3, 8, 8), 0.8)]
    )  # errors 0.04 and 0.16, mean 0.1
    torch.testing.assert_close(
        AnomalyScore(Dims(), offset=0.1)(images, per=per),
        torch.tensor(scores),
        atol=1e-7,
        rtol=1e-5,
    )


def test_another_offset_shares_the_weights_and_changes_the_fingerprint():
    score = AnomalyScore(Autoencoder(), 0.1, {"images": 5})
    other = score.with_offset(0)
    assert other.offset == 0 and score.offset == 0.1 and other.provenance == score.provenance
    assert other.autoencoder is score.autoencoder and other.fingerprint != score.fingerprint


# Training ----------------------------------------------------------------------


def test_training_on_a_few_dozen_real_images_lowers_the_validation_error(images):
    prior = train_autoencoder(images, steps=300, batch_size=16)
    errors = prior.provenance["history"]["validation"]
    untrained = AnomalyScore(Autoencoder(12, 3)).errors(images.images).mean().item()
    assert prior.provenance["history"]["step"] == [100, 200, 300]
    assert errors[-1] < errors[0] < untrained and errors[-1] < 0.5 * untrained


def test_the_offset_is_the_mean_error_on_held_out_images_which_no_step_has_seen(images):
    """Of two images one is held out; the other one alone decides the training loss."""
    prior = train_autoencoder(images[:2], steps=20)
    history = prior.provenance["history"]
    assert prior.offset == pytest.approx(history["validation"][0], rel=1e-4)
    assert min(abs(prior.offset - error) for error in prior.errors(images[:2].images)) < 1e-6


def test_sides_that_cannot_be_halved_as_often_are_neither_trained_on_nor_scored():
    images = torch.rand(4, 3, 12, 20)
    reason = "12×20.*gipip.train_autoencoder"
    with pytest.raises(DataError, match=f"divisible by 8, not .*{reason}"):
        train_autoencoder(LabeledImages(images, torch.zeros(4, dtype=torch.int64)), steps=1)
    with pytest.raises(DataError, match=f"cannot be scored: .*divisible by 8, not .*{reason}"):
        AnomalyScore(Autoencoder())(images)
    assert AnomalyScore(Autoencoder(depth=2))(images).shape == (4,)


@pytest.mark.parametrize("settings", [{"width": 0}, {"depth": 0}, {"width": 1.5}])
def test_an_impossible_autoencoder_is_refused_by_name(settings):
    with pytest.raises(ValidationError, match=f"Autoencoder.*\n{next(iter(settings))}\n"):
        Autoencoder(**settings)


@pytest.mark.parametrize("offset", [float("nan"), float("inf")])
def test_an_offset_that_is_not_finite_is_refused(offset):
    with pytest.raises(ValidationError, match="(?s)offset.*finite"):
        AnomalyScore(Autoencoder()).with_offset(offset)


def test_the_prior_that_ships_was_trained_on_the_auxiliary_images_and_knows_natural_images():
    data, prior = load_dataset("cifar10"), load_prior("cifar10")
    assert prior.provenance["data"] == data.auxiliary().fingerprint
    natural = prior.errors(data.tuning_pool.images).mean()
    noise = prior.errors(torch.rand(20, 3, 32, 32)).mean()
    assert natural == pytest.approx(prior.offset, rel=0.3) and noise > 10 * natural
