"""Labels read off an update, on real images."""

import pytest
import torch
from torch import nn

from gipip.attacks.labels import _round_to_total, infer_labels
from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import LabelError
from gipip.federation.client import Client
from gipip.federation.models import build_model, client_model, model_fingerprint


@pytest.fixture(scope="module")
def data():
    return load_dataset("cifar10")


def inferred(model, batch, mode="eval"):
    return infer_labels(model, Client(model).share(batch, mode=mode, labels="withheld"))


def exact(model, batches, mode="eval"):
    """In how many of the batches every label was found, and the share of all labels found."""
    truths = [batch.labels.sort().values for batch in batches]
    guesses = [inferred(model, batch, mode) for batch in batches]
    counts = [
        (torch.bincount(t, minlength=10), torch.bincount(g, minlength=10))
        for t, g in zip(truths, guesses, strict=True)
    ]
    found = sum(int(torch.minimum(t, g).sum()) for t, g in counts)
    return sum(torch.equal(t, g) for t, g in counts), found / sum(map(len, truths))


@pytest.mark.parametrize(("name", "images"), [("convnet", 40), ("lenet", 100), ("resnet18", 10)])
def test_the_label_of_one_image_is_found_for_every_image(data, name, images):
    model = build_model(name)
    assert exact(model, [data.private(seed=seed) for seed in range(images)]) == (images, 1.0)


def test_the_label_of_one_image_is_found_in_train_mode_too(data):
    model = build_model("convnet")
    assert exact(model, [data.private(seed=seed) for seed in range(10)], "train") == (10, 1.0)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("size", [4, 8])
def test_label_counts_are_exact_on_an_untrained_convnet(data, mode, size):
    batches = [data.private(size, seed=seed, distinct_labels=seed % 2 == 0) for seed in range(8)]
    assert exact(build_model("convnet", seed=2), batches, mode) == (8, 1.0)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_label_counts_are_exact_on_an_untrained_resnet18(data, mode):
    assert exact(build_model("resnet18"), [data.private(8, distinct_labels=False)], mode) == (
        1,
        1.0,
    )


@pytest.mark.parametrize("name", ["convnet", "lenet"])
def test_a_label_that_fills_the_whole_batch_is_found_as_often(data, name):
    pool = data.private_pool
    same = pool[(pool.labels == 7).nonzero().flatten()[:4]]
    assert inferred(build_model(name), same).tolist() == [7, 7, 7, 7]


def test_label_counts_are_mostly_but_not_always_exact_on_the_sigmoid_lenet(data):
    model = build_model("lenet")
    batches, found = exact(model, [data.private(4, seed=seed) for seed in range(50)])
    assert (
        25 <= batches < 50 and found > 0.85
    )  # its initial weights are large: predictions depend on the image


def test_inference_leaves_a_model_in_train_mode_untouched(data):
    model = build_model("convnet").train()
    before = model_fingerprint(model)
    inferred(model, data.private(4), mode="train")
    assert model_fingerprint(model) == before and model.training


def test_a_batch_on_a_model_without_bias_is_refused_with_the_remedy():
    model = client_model(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    batch = LabeledImages(torch.rand(2, 3, 2, 2), torch.tensor([0, 2]))
    with pytest.raises(LabelError, match="bias.*labels='given'"):
        inferred(model, batch)


@pytest.mark.parametrize(
    ("counts", "labels"),
    [
        ([2.0, 0.0, 1.0], [0, 0, 2]),
        ([1.4, 0.9, 0.7], [0, 1, 2]),
        ([2.6, -0.3, 0.7], [0, 0, 2]),
        ([3.2, -0.1, -0.1], [0, 0, 0]),
    ],
)
def test_counts_are_rounded_to_whole_numbers_of_the_right_sum(counts, labels):
    assert _round_to_total(torch.tensor(counts), 3).tolist() == labels
