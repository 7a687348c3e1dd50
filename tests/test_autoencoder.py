"""The anomaly score: closed forms with fake autoencoders, training on real images, and
files that are or are not to be trusted.
"""

import pytest
import safetensors.torch
import torch
from torch import nn

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import DamagedFileError, DataError, GipipError, UpdateError
from gipip.files import write_tensors
from gipip.priors import AnomalyScore, Autoencoder, load_prior, train_autoencoder
from gipip.priors import autoencoder as module
from gipip.priors.gan import train_generator


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


def test_the_score_never_trains_the_autoencoder():
    score = AnomalyScore(Autoencoder())
    assert not any(parameter.requires_grad for parameter in score.parameters())


# Training ----------------------------------------------------------------------


def test_training_on_a_few_dozen_real_images_lowers_the_validation_error(images):
    prior = train_autoencoder(images, steps=300, batch_size=16)
    errors = prior.provenance["history"]["validation"]
    untrained = AnomalyScore(Autoencoder(12, 3)).errors(images.images).mean().item()
    assert prior.provenance["history"]["step"] == [100, 200, 300]
    assert errors[-1] < errors[0] < untrained and errors[-1] < 0.5 * untrained


def test_the_offset_is_the_mean_error_on_the_held_out_images(images):
    prior = train_autoencoder(images, steps=100, batch_size=16, validation_fraction=0.25)
    _, validation = module._split(images, 0.25, torch.Generator().manual_seed(0))
    assert len(validation) == 16
    assert prior.offset == pytest.approx(prior.errors(validation).mean().item())
    assert prior.offset == pytest.approx(min(prior.provenance["history"]["validation"]), rel=1e-4)


def test_no_image_is_both_trained_on_and_held_out(images):
    training, validation = module._split(images, 0.1, torch.Generator().manual_seed(0))
    assert (
        len({image.numpy().tobytes() for image in torch.cat([training, validation])})
        == len(images)
        == len(training) + len(validation)
    )


def test_training_is_determined_by_its_seed_and_leaves_the_global_generator_alone(images):
    before = torch.get_rng_state()
    prints = [train_autoencoder(images, steps=3, seed=seed).fingerprint for seed in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_weights_of_the_lowest_validation_error_are_kept_and_patience_ends_the_training(
    images, monkeypatch
):
    monkeypatch.setattr(module, "_EVALUATE_EVERY", 1)
    prior = train_autoencoder(
        images, steps=400, learning_rate=0.3, patience=4
    )  # far too large: it soon gets no better
    errors = prior.provenance["history"]["validation"]
    assert len(errors) < 400 and len(errors) - 1 - errors.index(min(errors)) == 4
    assert prior.offset == pytest.approx(min(errors), rel=1e-4)


def test_a_training_that_diverges_is_an_error_and_not_a_prior(images):
    with pytest.raises(GipipError, match="diverged.*smaller learning_rate"):
        train_autoencoder(images, steps=5, learning_rate=1e30)


def test_too_few_images_or_sides_that_cannot_be_halved_are_refused(images):
    with pytest.raises(DataError, match="on 1 images.*at least 2"):
        train_autoencoder(images[:1], steps=1)
    with pytest.raises(DataError, match=r"12×20.*divisible by 2\*\*depth = 8"):
        train_autoencoder(
            LabeledImages(torch.rand(4, 3, 12, 20), torch.zeros(4, dtype=torch.int64)), steps=1
        )


def interrupt_after(monkeypatch, steps):
    original = module._losses

    def losses(*arguments):
        for step, loss in enumerate(original(*arguments)):
            if step == steps:
                raise KeyboardInterrupt
            yield loss

    monkeypatch.setattr(module, "_losses", losses)


@pytest.mark.parametrize(
    ("steps", "evaluated"), [(250, [100, 200, 250]), (200, [100, 200]), (30, [30]), (0, [])]
)
def test_an_interrupted_training_keeps_the_best_so_far_and_says_so(
    images, monkeypatch, steps, evaluated
):
    interrupt_after(monkeypatch, steps)
    prior = train_autoencoder(images[:16], steps=300)
    assert prior.provenance["interrupted"] and prior.provenance["history"]["step"] == evaluated
    if evaluated:
        assert prior.offset == pytest.approx(
            min(prior.provenance["history"]["validation"]), rel=1e-4
        )


# Files -------------------------------------------------------------------------


def test_a_finished_training_is_loaded_from_the_store_the_second_time(
    images, tmp_path, monkeypatch
):
    first = train_autoencoder(images, steps=3, store=tmp_path)
    monkeypatch.setattr(module, "_fit", None)  # training again would fail
    again = train_autoencoder(images, steps=3, store=tmp_path)
    assert (again.fingerprint, again.provenance) == (first.fingerprint, first.provenance)


def test_other_settings_or_images_are_another_training(images, tmp_path):
    train_autoencoder(images, steps=2, store=tmp_path)
    train_autoencoder(images, steps=2, seed=1, store=tmp_path)
    train_autoencoder(images[:32], steps=2, store=tmp_path)
    assert len(list((tmp_path / "priors").iterdir())) == 3


def test_an_interrupted_training_is_not_stored(images, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 1)
    train_autoencoder(images, steps=3, store=tmp_path)
    monkeypatch.undo()
    assert "interrupted" not in train_autoencoder(images, steps=3, store=tmp_path).provenance


@pytest.fixture
def saved(tmp_path):
    score = AnomalyScore(
        Autoencoder(width=4, depth=2), 0.25, {"images": 64, "history": {"step": [1]}}
    )
    return score, score.save(tmp_path / "prior.safetensors")


def test_what_is_saved_comes_back_with_the_same_fingerprint_and_scores(saved):
    score, path = saved
    loaded = AnomalyScore.load(path)
    images = torch.rand(2, 3, 8, 8)
    assert (loaded.fingerprint, loaded.offset, loaded.provenance) == (
        score.fingerprint,
        0.25,
        score.provenance,
    )
    assert torch.equal(loaded(images), score(images)) and not loaded.autoencoder.training


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, part):
    content = saved[1].read_bytes()
    saved[1].write_bytes(content[: int(part * len(content))])
    with pytest.raises(DamagedFileError, match="prior.safetensors"):
        AnomalyScore.load(saved[1])


@pytest.mark.parametrize("place", [0.2, 0.5, 0.999])
def test_a_file_with_one_flipped_bit_is_refused(saved, place):
    content = bytearray(saved[1].read_bytes())
    content[int(place * len(content))] ^= 1
    saved[1].write_bytes(content)
    with pytest.raises(DamagedFileError, match="prior.safetensors"):
        AnomalyScore.load(saved[1])


METADATA = {"autoencoder": {"width": 4, "depth": 2}, "offset": 0.1, "provenance": {}}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        METADATA,
        METADATA | {"autoencoder": {"width": 4, "height": 2}},
        {"autoencoder": METADATA["autoencoder"]},
    ],
    ids=["none", "other tensors", "another network", "no offset"],
)
def test_a_whole_file_that_holds_something_else_is_refused(tmp_path, metadata):
    tensors = (
        Autoencoder(4, 2).state_dict() if "offset" not in metadata else {"weights": torch.zeros(3)}
    )
    path = write_tensors(tmp_path / "other.safetensors", tensors, metadata)
    with pytest.raises(DamagedFileError, match="other.safetensors does not hold an autoencoder"):
        AnomalyScore.load(path)


def test_a_safetensors_file_that_gipip_did_not_write_is_refused(tmp_path):
    safetensors.torch.save_file(Autoencoder(4, 2).state_dict(), tmp_path / "foreign.safetensors")
    with pytest.raises(DamagedFileError, match="was not written by gipip"):
        AnomalyScore.load(tmp_path / "foreign.safetensors")


def test_the_prior_that_ships_was_trained_on_the_auxiliary_images_and_knows_natural_images():
    data, prior = load_dataset("cifar10"), load_prior("cifar10")
    assert prior.provenance["data"] == data.auxiliary().fingerprint
    natural, noise = (
        prior.errors(data.tuning_pool.images).mean(),
        prior.errors(torch.rand(20, 3, 32, 32)).mean(),
    )
    assert natural == pytest.approx(prior.offset, rel=0.3) and noise > 10 * natural


def test_a_data_set_without_a_shipped_prior_is_refused_with_the_remedy():
    with pytest.raises(DataError, match="'mnist'.*train_autoencoder"):
        load_prior("mnist")


@pytest.mark.parametrize(("depth", "height", "width"), [(3, 12, 16), (3, 16, 20), (4, 24, 24)])
def test_images_whose_sides_cannot_be_halved_as_often_are_neither_scored_nor_attacked(
    depth, height, width
):
    score = AnomalyScore(Autoencoder(4, depth))
    reason = rf"depth {depth}.*divisible by {2**depth}.*{height}×{width}.*train_autoencoder.*depth="
    with pytest.raises(DataError, match=reason):
        score(torch.rand(2, 3, height, width))
    with pytest.raises(UpdateError, match=reason):
        score.check((3, height, width))
    score.check((3, 2**depth, 3 * 2**depth))


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": -1},
        {"steps": 0},
        {"width": 0},
        {"batch_size": 0},
        {"learning_rate": float("nan")},
        {"learning_rate": -0.1},
        {"seed": -1},
        {"seed": 2**63},
    ],
)
def test_a_setting_that_nothing_can_be_trained_with_is_refused_by_name(settings):
    auxiliary = load_dataset("cifar10").auxiliary(0.001)
    for train in (train_autoencoder, train_generator):
        with pytest.raises(DataError, match=f"{next(iter(settings))}=.* cannot be trained with"):
            train(auxiliary, **settings)
