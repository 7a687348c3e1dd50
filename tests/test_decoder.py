"""The decoder of features, and the attack that starts from what it shows."""

import pytest
import torch
from torch import nn

import gipip
from gipip.attacks.checkpoints import Checkpoint
from gipip.data.datasets import LabeledImages
from gipip.errors import DataError, UpdateError
from gipip.federation.models import last_linear


@pytest.fixture(scope="module")
def data():
    return gipip.load_dataset("cifar10")


@pytest.fixture(scope="module")
def model():
    return gipip.build_model("convnet16")


@pytest.fixture(scope="module")
def decoder(data, model):
    """Of the regression alone, on a part of the auxiliary images."""
    return gipip.train_decoder(model, data.auxiliary()[:1000], steps=0, copies=2)


def features(model, images):
    with torch.no_grad():
        return last_linear(model.network, model.normalize(images))[1]


def squared_error(made, images):
    return (made - images).square().mean(dim=(1, 2, 3))


def test_decoded_images_are_nearer_than_the_mean_image(data, model, decoder):
    batch = data.tuning(100, seed=0, distinct_labels=False)
    mean = data.auxiliary().images.mean(dim=0, keepdim=True)
    made = decoder(features(model, batch.images))
    errors, blank = squared_error(made, batch.images), squared_error(mean, batch.images)
    assert errors.mean() < 0.4 * blank.mean()


def test_with_few_features_the_regression_is_plain_least_squares(data):
    """Where 48 features face 500 images, the ridge hardly matters."""
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    model = gipip.client_model(network, (0.5,) * 3, (0.25,) * 3)
    auxiliary = data.auxiliary()[:500]
    decoder = gipip.train_decoder(model, auxiliary, steps=0, copies=1)
    x = torch.cat([features(model, auxiliary.images), torch.ones(500, 1)], dim=1).double()
    y = auxiliary.images.flatten(1).double()
    plain = torch.linalg.lstsq(x, y).solution
    batch = data.tuning(8, seed=0)
    own = torch.cat([features(model, batch.images), torch.ones(8, 1)], dim=1).double() @ plain
    made = decoder(features(model, batch.images))
    assert (made.flatten(1) - own.clamp(0, 1)).abs().mean() < 0.03


def test_no_auxiliary_image_is_pasted(data, model, decoder):
    """What is decoded is nearer to the truth than to the auxiliary images, mostly."""
    batch, auxiliary = data.tuning(100, seed=0, distinct_labels=False), data.auxiliary()[:1000]
    made = decoder(features(model, batch.images))
    to_auxiliary = torch.cdist(made.flatten(1), auxiliary.images.flatten(1)).min(dim=1).values
    to_truth = (made - batch.images).flatten(1).norm(dim=1)
    assert (to_truth < to_auxiliary).double().mean() > 0.6


def test_convolutions_lower_the_error_on_held_out_images(data, model):
    trained = gipip.train_decoder(model, data.auxiliary()[:400], steps=200, copies=2)
    validation = trained.provenance["history"]["validation"]
    assert validation[-1] <= validation[0]


def test_features_known_for_sure_stay_and_lost_ones_become_the_mean(data, model, decoder):
    own = features(model, data.tuning(2, seed=0).images).double()
    covariance = torch.tensor([0.0, 1e9]).diag().double()
    expected, trust = decoder.expected(own, covariance, torch.ones(576, dtype=torch.bool))
    assert torch.allclose(expected[0], own[0], atol=1e-4)
    assert torch.allclose(expected[1], decoder.decoder.centre.double(), atol=1e-6)
    assert torch.allclose(trust, torch.tensor([1.0, 0.0]).double(), atol=1e-3)


def test_expected_features_are_those_of_a_normal_distribution(data):
    """Against Gaussian conditioning on all features of both images at once."""
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    model = gipip.client_model(network, (0.5,) * 3, (0.25,) * 3)
    decoder = gipip.train_decoder(model, data.auxiliary()[:500], steps=0, copies=1)
    own = features(model, data.tuning(2, seed=0).images).double()
    covariance = torch.tensor([[0.05, 0.03], [0.03, 0.04]]).double()
    known = torch.arange(48) % 4 > 0
    expected, trust = decoder.expected(own, covariance, known)
    prior = torch.kron(torch.eye(2), decoder.decoder.covariance).double()
    noise = torch.kron(covariance, torch.eye(36).double())
    seen = known.repeat(2)
    gain = torch.linalg.solve(prior[seen][:, seen] + noise, prior[seen]).T
    away = (own - decoder.decoder.centre).flatten()[seen]
    assert torch.allclose(expected, decoder.decoder.centre + (gain @ away).view(2, 48), atol=1e-6)
    explained = (gain @ prior[seen]).diagonal().view(2, 48).sum(dim=1)
    assert torch.allclose(trust, explained / decoder.decoder.variance, atol=1e-5)


def test_a_saved_decoder_is_the_same_and_belongs_to_one_model(data, model, decoder, tmp_path):
    loaded = gipip.FeatureDecoder.load(decoder.save(tmp_path / "decoder.safetensors"))
    assert loaded.fingerprint == decoder.fingerprint
    other = gipip.build_model("convnet16", seed=1)
    update = gipip.Client(other).share(data.tuning(2))
    with pytest.raises(UpdateError, match="another client model"):
        gipip.FeatureInversion(prior=loaded)(other, update)
    update = gipip.Client(model).share(data.tuning(2), mode="train")
    with pytest.raises(UpdateError, match="mode='train'"):
        gipip.FeatureInversion(prior=loaded)(model, update)


def test_a_finished_training_is_loaded(data, model, tmp_path):
    def train():
        images = data.auxiliary()[:50]
        return gipip.train_decoder(model, images, steps=2, copies=1, store=tmp_path)

    assert train().fingerprint == train().fingerprint
    assert len(list(tmp_path.glob("**/*.safetensors"))) == 1


def test_images_of_other_sizes_are_refused(data, model):
    auxiliary = data.auxiliary()[:20]
    odd = gipip.LabeledImages(auxiliary.pixels[:, :, :30, :30].contiguous(), auxiliary.labels)
    with pytest.raises(DataError, match="multiple of 4"):
        gipip.train_decoder(model, odd, steps=0)


# The attack -------------------------------------------------------------------------


def test_without_iterations_the_decoded_images_come_back(data, model, decoder):
    batch = data.tuning(4, seed=1)
    update = gipip.Client(model).share(batch)
    result = gipip.FeatureInversion(prior=decoder, iterations=0)(model, update)
    assert torch.allclose(result.images, decoder(features(model, batch.images)), atol=1e-4)
    assert torch.equal(result.labels, batch.labels)


@pytest.mark.parametrize("score", [None, gipip.load_prior()], ids=["plain", "with a score"])
def test_refining_lowers_the_cost(data, model, decoder, score):
    update = gipip.Client(model).share(data.tuning(2, seed=1))
    settings = {"prior": decoder, "score": score, "learning_rate": 0.02, "pull_weight": 0.01}
    decoded = gipip.FeatureInversion(**settings, iterations=0)(model, update)
    refined = gipip.FeatureInversion(**settings, iterations=60)(model, update)
    assert refined.cost < decoded.cost
    assert ("anomaly score" in refined.history) == (score is not None)


def test_steps_are_as_long_as_the_start_explains_the_update(data, model, decoder):
    """The first step of Adam on signs moves a pixel by the learning rate."""
    update = gipip.Client(model).share(data.tuning(2, seed=1))
    decoded, moved = (
        gipip.FeatureInversion(prior=decoder, iterations=count, learning_rate=0.1)(model, update)
        for count in (0, 1)
    )
    inside = (decoded.images > 0.1) & (decoded.images < 0.9)  # no step ends at the box
    steps = model.normalize(moved.images) - model.normalize(decoded.images)
    cosine = 1 - moved.history["gradient matching"][0]
    assert steps[inside].abs().max().item() == pytest.approx(0.1 * cosine.item(), rel=0.01)


def test_with_no_weight_on_features_the_whole_gradient_is_matched(data, model, decoder):
    update = gipip.Client(model).share(data.tuning(2, seed=1))
    attack = gipip.FeatureInversion(prior=decoder, iterations=0, feature_weight=0)
    found = attack(model, update)
    batch = LabeledImages(found.images, found.labels)
    own = [gradient.flatten() for gradient in gipip.Client(model).share(batch).gradients]
    shared = [gradient.flatten() for gradient in update.gradients]
    cosine = torch.cosine_similarity(torch.cat(own), torch.cat(shared), dim=0)
    assert found.history["gradient matching"][0].item() == pytest.approx(
        1 - cosine.item(), abs=1e-3
    )


def test_withheld_labels_are_found_with_the_features(data, model, decoder):
    batch = data.tuning(4, seed=2)
    update = gipip.Client(model).share(batch, labels="withheld")
    result = gipip.FeatureInversion(prior=decoder, iterations=1)(model, update)
    assert sorted(result.labels.tolist()) == sorted(batch.labels.tolist())


def test_settings_are_told_apart_by_the_fingerprints_of_both_priors(decoder):
    plain = gipip.FeatureInversion(prior=decoder)
    scored = gipip.FeatureInversion(prior=decoder, score=gipip.load_prior())
    assert plain.model_dump(mode="json")["prior"] == decoder.fingerprint
    assert scored.model_dump(mode="json")["score"] == gipip.load_prior().fingerprint


def test_an_attack_of_no_iterations_keeps_no_checkpoint(data, model, decoder, tmp_path):
    update = gipip.Client(model).share(data.tuning(2, seed=0))
    checkpoint = Checkpoint(tmp_path / "attack")
    attack = gipip.FeatureInversion(prior=decoder, iterations=0)
    assert len(attack(model, update, checkpoint=checkpoint).images) == 2
    assert not list(tmp_path.iterdir())
