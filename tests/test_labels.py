"""Labels read off an update, on real images."""

import dataclasses

import pytest
import torch
from torch import nn

from gipip.attacks.labels import infer_labels
from gipip.data.datasets import LabeledImages, load_dataset
from gipip.errors import LabelError, ModelError
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


def small(*layers):
    """A model of 3 classes on images of 2 × 2 pixels, whose `layers` end in it."""
    torch.manual_seed(0)
    return client_model(nn.Sequential(nn.Flatten(), *layers), (0.5,) * 3, (0.25,) * 3).eval()


def some_images(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    return LabeledImages(torch.rand(count, 3, 2, 2, generator=generator), labels)


def single_labels_found(model, images):
    return sum(inferred(model, images[[row]]) == images.labels[row] for row in range(len(images)))


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.SiLU(), nn.ReLU()], ids=str)
def test_the_label_of_one_image_is_found_by_the_bias_whatever_the_sign_of_the_features(activation):
    model = small(nn.Linear(12, 40), activation, nn.Linear(40, 3))
    assert single_labels_found(model, some_images(100)) == 100


def test_the_label_of_one_image_is_found_by_the_weights_where_there_is_no_bias():
    model = small(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3, bias=False))
    assert single_labels_found(model, some_images(100)) == 100


class HeadFirst(nn.Module):
    """Its layers are not registered in the order in which it uses them."""

    def __init__(self):
        super().__init__()
        self.head, self.body, self.unused = nn.Linear(8, 3), nn.Linear(12, 8), nn.Linear(3, 3)

    def forward(self, inputs):
        return self.head(self.body(inputs.flatten(1)).tanh())


@pytest.mark.parametrize("size", [1, 4])
def test_labels_are_inferred_from_the_linear_layer_that_is_used_last_not_registered_last(size):
    torch.manual_seed(0)
    network = HeadFirst()
    with torch.no_grad():
        network.head.weight *= 0.01  # so that the mean prediction is known
    model = client_model(network, (0.5,) * 3, (0.25,) * 3)
    for seed in range(20):
        batch = some_images(size, seed)
        assert torch.equal(inferred(model, batch), batch.labels.sort().values)


@pytest.mark.parametrize("end", [nn.ReLU(inplace=True), nn.Softmax(dim=1)], ids=str)
def test_a_network_that_ends_in_something_else_is_refused(end):
    with pytest.raises(ModelError, match="not come straight from a linear layer.*'given'"):
        inferred(small(nn.Linear(12, 3), end), some_images(1))


def test_a_batch_on_a_model_without_bias_is_refused_with_the_remedy():
    with pytest.raises(LabelError, match="several images need its bias.*labels='given'"):
        inferred(small(nn.Linear(12, 3, bias=False)), some_images(2))


def test_a_frozen_classifier_tells_no_labels():
    model = small(nn.Linear(12, 4), nn.Linear(4, 3))
    model.network[-1].requires_grad_(False)
    with pytest.raises(LabelError, match="network.2.*holds none.*labels='given'"):
        inferred(model, some_images(1))


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
    model = small(nn.Linear(12, 3))
    nn.init.zeros_(model.network[1].weight)
    nn.init.zeros_(model.network[1].bias)  # each class has the probability 1/3
    update = Client(model).share(some_images(3), labels="withheld")
    bias = 1 / 3 - torch.tensor(counts) / 3
    update = dataclasses.replace(update, gradients=(update.gradients[0], bias))
    assert infer_labels(model, update).tolist() == labels
