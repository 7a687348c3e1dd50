"""Client models: the references' architectures, seeded weights, and one normalisation layer."""

import importlib.util

import pytest
import torch
from torch import nn
from torchvision.transforms.functional import normalize

from gipip.data.datasets import CIFAR10_MEAN, CIFAR10_STD, LabeledImages
from gipip.errors import ModelError
from gipip.federation.models import (
    Normalize,
    build_model,
    check_client_model,
    client_model,
    count_classes,
    last_linear,
    load_model,
    mixes_images,
    model_fingerprint,
    trainable,
)
from gipip.federation.training import accuracy
from gipip.files import DATA, write_tensors

NETWORKS = ["convnet", "convnet16", "convnet16-groupnorm", "lenet", "resnet18"]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def sizes(kind, model):
    return [module.out_channels for module in model.modules() if isinstance(module, kind)]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("classes", "size"), [(10, 32), (7, 64)])
def test_every_network_gives_logits_of_its_classes_for_its_image_size(name, classes, size):
    assert build_model(name, classes, image_size=size)(torch.rand(2, 3, size, size)).shape == (
        2,
        classes,
    )


def test_resnet18_has_the_parameters_of_the_references_resnet18():
    assert parameters(build_model("resnet18")) == 11_173_962


def test_resnet18_keeps_the_resolution_in_its_stem():
    network = build_model("resnet18").network
    stem = network.maxpool(network.relu(network.bn1(network.conv1(torch.zeros(1, 3, 32, 32)))))
    assert network.conv1.kernel_size == (3, 3) and network.conv1.stride == (1, 1)
    assert stem.shape == (1, 64, 32, 32)


def test_resnet18_stem_is_initialised_with_kaiming_fan_out():
    weight = build_model("resnet18").network.conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)


def test_convnet_has_six_convolutions_of_the_references_widths_and_two_pools():
    model = build_model("convnet")
    pools = [module.kernel_size for module in model.modules() if isinstance(module, nn.MaxPool2d)]
    assert sizes(nn.Conv2d, model) == [32, 64, 64, 128, 128, 128] and pools == [3, 3]
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 6


def test_convnet16_is_the_convnet_of_half_the_width():
    model = build_model("convnet16")
    assert (
        sizes(nn.Conv2d, model) == [16, 32, 32, 64, 64, 64] and model.network[-1].in_features == 576
    )


def test_the_groupnorm_variant_is_convnet16_and_holds_nothing_but_its_weights():
    model, usual = build_model("convnet16-groupnorm"), build_model("convnet16")
    groups = [(m.num_groups, m.num_channels) for m in model.modules() if hasattr(m, "num_groups")]
    assert groups == [(8, 16), (8, 32), (8, 32), (8, 64), (8, 64), (8, 64)]
    assert [name for name, _ in model.named_buffers()] == ["normalize.mean", "normalize.std"]
    for (name, value), expected in zip(model.named_parameters(), usual.parameters(), strict=True):
        assert torch.equal(value, expected), name


def test_lenet_is_the_sigmoid_network_of_dlg():
    model = build_model("lenet")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size, c.stride, c.padding) for c in convolutions] == [
        (12, (5, 5), (2, 2), (2, 2)),
        (12, (5, 5), (2, 2), (2, 2)),
        (12, (5, 5), (1, 1), (2, 2)),
    ]
    assert model.network[-1].in_features == 768
    assert sum(isinstance(module, nn.Sigmoid) for module in model.modules()) == 3
    assert all(
        0.4 < float(p.detach().abs().max()) <= 0.5
        for p in (model.network[2].weight, model.network[-1].weight)
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_model_is_in_eval_mode(name):
    assert not any(module.training for module in build_model(name).modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_seed_gives_the_same_weights_and_another_seed_others(name):
    first, again, other = (model_fingerprint(build_model(name, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_building_a_model_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    build_model("convnet", seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(
        ModelError, match="'vgg'.*convnet16, convnet16-groupnorm, lenet.*client_model"
    ):
        build_model("vgg")


@pytest.mark.parametrize("setting", [{"num_classes": 0}, {"seed": 2**63}, {"seed": -(2**63)}])
def test_a_model_of_no_class_or_a_seed_too_large_is_refused(setting):
    with pytest.raises(ModelError, match=f"got.*{next(iter(setting.values()))}"):
        build_model("lenet", **setting)


def test_the_normalisation_layer_equals_torchvisions_normalize():
    images = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(
        Normalize(CIFAR10_MEAN, CIFAR10_STD)(images), normalize(images, CIFAR10_MEAN, CIFAR10_STD)
    )


def test_the_inverse_of_the_normalisation_gives_the_images_back():
    layer, images = Normalize(CIFAR10_MEAN, CIFAR10_STD), torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(layer.inverse(layer(images)), images)


def test_the_box_is_what_black_and_white_become():
    layer = Normalize(CIFAR10_MEAN, CIFAR10_STD)
    black, white = layer(torch.zeros(1, 3, 1, 1))[0], layer(torch.ones(1, 3, 1, 1))[0]
    torch.testing.assert_close(torch.stack(layer.box), torch.stack([black, white]))


def test_an_own_network_receives_normalised_images():
    own = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model = client_model(own, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    images = torch.rand(5, 3, 2, 2)
    check_client_model(model)
    torch.testing.assert_close(
        model(images), own(normalize(images, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)))
    )


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))


def frozen():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(2, 2), "Linear.*normalisation layer.*gipip.client_model"),
        (client_model(lazy(), (0,) * 3, (1,) * 3), "lazy layers.*Run it once"),
        (client_model(nn.Flatten(), (0,) * 3, (1,) * 3), "no trainable parameters"),
        (client_model(frozen(), (0,) * 3, (1,) * 3), "no trainable parameters.*requires_grad_"),
        (build_model("lenet").half(), r"torch.float16; expected all float32.*model.float\(\)"),
        (build_model("lenet").bfloat16(), "torch.bfloat16; expected all float32"),
    ],
    ids=["no normalisation", "lazy", "no parameters", "frozen", "half", "bfloat16"],
)
def test_a_model_that_cannot_be_attacked_is_refused_with_the_remedy(model, reason):
    with pytest.raises(ModelError, match=reason):
        check_client_model(model)


class Gives(nn.Module):
    """A network that gives what `form` makes of its logits."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(12, 3), form

    def forward(self, inputs):
        return self.form(self.linear(inputs.flatten(1)))


def some(size):
    return LabeledImages(torch.rand(2, 3, size, size), torch.tensor([0, 1]))


def test_the_classes_are_counted_by_the_logits_and_the_model_stays_as_it_was():
    model = build_model("convnet", 7).train()
    before = model_fingerprint(model)
    with torch.no_grad():
        assert count_classes(model, some(32)) == 7
    assert model_fingerprint(model) == before


@pytest.mark.parametrize(
    ("form", "found"),
    [
        (lambda logits: (logits, logits), "a tuple"),
        (lambda logits: {"logits": logits}, "a dict"),
        (lambda logits: logits[:, :, None, None], r"torch.float32 of shape \(2, 3, 1, 1\)"),
        (lambda logits: logits.argmax(dim=1), r"torch.int64 of shape \(2,\)"),
        (lambda logits: logits.detach(), r"torch.float32 of shape \(2, 3\)"),
    ],
    ids=["tuple", "dict", "image", "class", "detached"],
)
def test_a_network_that_gives_no_logits_is_refused_with_what_it_gives(form, found):
    with pytest.raises(ModelError, match=f"gives {found}; expected logits.*Wrap it"):
        count_classes(client_model(Gives(form), (0,) * 3, (1,) * 3), some(2))


def normalised_by(layer):
    return nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
    ],
    ids=["BatchNorm", "BatchNorm on batch statistics", "InstanceNorm", "GroupNorm"],
)
def test_images_mix_where_one_images_logits_depend_on_another(layer, mode):
    network, images = normalised_by(layer).train(mode == "train"), torch.rand(2, 3, 2, 2)
    other = torch.stack([images[0], torch.rand(3, 2, 2)])
    depend = not torch.allclose(network(images)[0], network(other)[0])
    assert mixes_images(network) == depend


def test_the_fingerprint_sees_a_change_of_one_weight_and_of_one_buffer():
    model = build_model("convnet")
    prints = [model_fingerprint(model)]
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
        prints.append(model_fingerprint(model))
        model.network[1].running_mean[0] += 1
    assert len({*prints, model_fingerprint(model)}) == 3


def test_frozen_parameters_are_not_trainable():
    model = build_model("lenet")
    next(model.parameters()).requires_grad_(False)
    assert len(trainable(model)) == len(list(model.parameters())) - 1


def test_the_last_linear_layer_is_the_classifier_and_gets_the_features():
    model, images = build_model("resnet18"), torch.rand(2, 3, 32, 32)
    name, features = last_linear(model, images)
    assert name == "network.fc"
    torch.testing.assert_close(model.network.fc(features), model(images))


def test_a_model_without_linear_layer_is_refused_for_label_inference():
    network = nn.Sequential(nn.Conv2d(3, 3, 2), nn.Flatten())
    with pytest.raises(ModelError, match="linear layer.*labels='given'"):
        last_linear(network, torch.rand(1, 3, 2, 2))


# Training ----------------------------------------------------------------------


@pytest.fixture
def bright_or_dark():
    """512 images of 8×8 pixels in two classes that their brightness tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(512) % 2
    images = 0.3 * torch.rand(512, 3, 8, 8, generator=generator) + 0.6 * labels.view(-1, 1, 1, 1)
    return LabeledImages(images, labels)


def with_batch_norm():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)]
    return client_model(nn.Sequential(*layers), mean=(0.5,) * 3, std=(0.25,) * 3).eval()


def test_the_script_trains_in_place_and_gives_each_epochs_loss_the_same_every_time(bright_or_dark):
    spec = importlib.util.spec_from_file_location("train_client", DATA / "train_client.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    models = with_batch_norm(), with_batch_norm()
    for model in models:
        losses, modes = [], []
        for loss in script.epoch_by_epoch(model, bright_or_dark, 3):
            losses.append(loss)
            modes.append(model.training)
        assert len(losses) == 3 and losses[2] < losses[0] / 2 and modes == [False] * 3
        assert accuracy(model, bright_or_dark) == 1
    assert model_fingerprint(models[0]) == model_fingerprint(models[1])


def test_accuracy_is_the_share_of_right_classes(bright_or_dark):
    brightness = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    with torch.no_grad():
        brightness[1].weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 192))
        brightness[1].bias.zero_()
    labels = bright_or_dark.labels.clone()
    labels[:128] = 1 - labels[:128]
    wrong = LabeledImages(bright_or_dark.pixels, labels)
    assert accuracy(client_model(brightness, mean=(0.45,) * 3, std=(0.25,) * 3), wrong) == 0.75


def test_accuracy_is_that_of_eval_mode_and_leaves_a_model_in_train_mode_as_it_was(bright_or_dark):
    model = with_batch_norm()
    expected = accuracy(model, bright_or_dark)
    model.train()
    before = model_fingerprint(model)
    assert accuracy(model, bright_or_dark) == expected
    assert model_fingerprint(model) == before and model.training


# Trained models ----------------------------------------------------------------


def test_a_trained_model_in_the_cache_folder_is_the_one_of_its_epoch(tmp_path, monkeypatch):
    monkeypatch.setenv("GIPIP_CACHE", str(tmp_path))
    epochs = {epoch: build_model("lenet", 7, seed=epoch) for epoch in (1, 10)}
    tensors = {}
    for epoch, model in epochs.items():
        tensors |= {f"{epoch}/{name}": value for name, value in model.state_dict().items()}
    about = {"num_classes": 7, "accuracy": {"1": 0.2, "10": 0.3}}
    write_tensors(tmp_path / "client-imagenet64-lenet.safetensors", tensors, about)
    for epoch, model in epochs.items():
        loaded = load_model("lenet", "imagenet64", epochs=epoch)
        assert model_fingerprint(loaded) == model_fingerprint(model) and not loaded.training
    with pytest.raises(
        ModelError,
        match=r"'lenet' trained for 5 epochs on 'imagenet64'.*at hand: \[1, 10\].*train_client",
    ):
        load_model("lenet", "imagenet64", epochs=5)


def test_a_model_that_does_not_ship_is_refused_with_the_remedy():
    with pytest.raises(
        ModelError, match="'lenet' trained for 3 epochs on 'mnist'.*at hand: none.*train_client"
    ):
        load_model("lenet", "mnist", epochs=3)
