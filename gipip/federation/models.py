"""The networks of a federated-learning client, and what may be asked of any of them.

Every model is `ClientModel(normalize, network)`: images in [0, 1] enter, the first
layer normalises them. Attacks use the two parts apart, because their variable lives in
normalised space.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

from gipip.data.datasets import CIFAR10_MEAN, CIFAR10_STD, LabeledImages, described
from gipip.data.download import cache_folder
from gipip.errors import ModelError, UpdateError
from gipip.files import DATA, fingerprint, read_tensors

Images = Float[Tensor, "batch channels height width"]
Mode = Literal["eval", "train"]


class Normalize(nn.Module):
    """(x − mean) / std per channel: maps images in [0, 1] to the network's normalised space."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Images) -> Images:
        return (images - self.mean) / self.std

    def inverse(self, normalized: Images) -> Images:
        """Back to image space; in [0, 1] for everything inside `box`."""
        return normalized * self.std + self.mean

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """What [0, 1] becomes in normalised space: lower and upper bound per channel,
        each of shape (channels, 1, 1).
        """
        return -self.mean / self.std, (1 - self.mean) / self.std


class ClientModel(nn.Module):
    """A network behind its normalisation layer: images in [0, 1] in, logits out.

    `label_smoothing`: of the cross-entropy that it is trained with.
    """

    def __init__(self, normalize: Normalize, network: nn.Module, label_smoothing: float = 0.0):
        super().__init__()
        self.normalize = normalize
        self.network = network
        self.label_smoothing = label_smoothing

    def forward(self, images: Images) -> Float[Tensor, "batch classes"]:
        return self.network(self.normalize(images))


def client_model(
    network: nn.Module,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    *,
    label_smoothing: float = 0.0,
) -> ClientModel:
    """Your own network, made ready for gipip: `network` expects images normalised with
    `mean` and `std`, one a channel, and gives logits. Leave both out for a network that
    takes images in [0, 1].

    It is trained with the mean cross-entropy, with `label_smoothing` from 0 to less
    than 1 as PyTorch defines it. A single logit is the second of two classes, which is
    binary cross-entropy. Raises ModelError for another smoothing.
    """
    if not 0 <= label_smoothing < 1:
        raise ModelError(f"{label_smoothing=}: expected a number from 0 to less than 1.")
    return ClientModel(Normalize(mean, std), network, label_smoothing)


def class_logits(logits: Float[Tensor, "batch logits"]) -> Float[Tensor, "batch classes"]:
    """A logit for each class: (0, z) for the only one z of a binary classifier, so that
    its binary cross-entropy is the cross-entropy of two classes.
    """
    return logits if logits.shape[1] > 1 else nn.functional.pad(logits, (1, 0))


def prepared(model: ClientModel, batch: LabeledImages) -> tuple[Images, Int[Tensor, "batch"]]:
    """What the network is trained on: the batch's images, normalised, in the type and on
    the device of the model, and the labels there.
    """
    parameter = next(model.parameters())
    return model.normalize(batch.images.to(parameter)), batch.labels.to(parameter.device)


def build_model(
    name: str,
    num_classes: int = 10,
    *,
    image_size: int = 32,
    mean: Sequence[float] = CIFAR10_MEAN,
    std: Sequence[float] = CIFAR10_STD,
    seed: int = 0,
) -> ClientModel:
    """An untrained client model in eval mode; the same seed gives the same weights and
    leaves the global generator alone.

    `name`: "resnet18", "convnet", "convnet16" (half as wide), "convnet16-groupnorm"
    (that with GroupNorm for BatchNorm, so that nothing of the images stays in the
    model, as differential privacy needs it) or "lenet". Raises ModelError for any
    other, for less than one class and for a seed of 2⁶³ or more.
    """
    if num_classes < 1 or abs(seed) >= 2**63:
        raise ModelError(
            f"Expected num_classes ≥ 1 and a seed below 2⁶³; got {num_classes}, {seed}."
        )
    if name not in _NETWORKS:
        raise ModelError(
            f"Unknown model {name!r}. Known models: {', '.join(sorted(_NETWORKS))}. "
            "For your own network use gipip.client_model."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        return client_model(_NETWORKS[name](num_classes, image_size), mean, std).eval()


def _resnet18(num_classes: int, image_size: int) -> nn.Module:
    """ResNet18 with the CIFAR stem of the Inverting Gradients code: 3×3 convolution of
    stride 1, no max-pool, Kaiming fan-out.
    """
    from torchvision.models import resnet18  # takes a second to import, and few need it

    network = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def _convnet(num_classes: int, image_size: int, width: int = 32, groups: int = 0) -> nn.Module:
    """Six 3×3 convolutions with BatchNorm, or GroupNorm of so many `groups`, and ReLU
    (32-64-64, pool, 128-128-128, pool for width 32) and a linear layer.
    """
    widths = [3, width, *[2 * width] * 2, *[4 * width] * 3]
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        norm = nn.GroupNorm(groups, outputs) if groups else nn.BatchNorm2d(outputs)
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU()]
        if index in (2, 5):
            layers.append(nn.MaxPool2d(3))
    features = 4 * width * (image_size // 9) ** 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, num_classes))


def _lenet(num_classes: int, image_size: int) -> nn.Module:
    """The sigmoid LeNet of Deep Leakage from Gradients (Zhu et al. 2019), weights
    uniform in ±0.5.
    """
    layers: list[nn.Module] = []
    for inputs, stride in [(3, 2), (12, 2), (12, 1)]:
        layers += [nn.Conv2d(inputs, 12, kernel_size=5, padding=2, stride=stride), nn.Sigmoid()]
    features = 12 * (-(-image_size // 4)) ** 2
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, num_classes))
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return network


_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": _resnet18,
    "convnet": _convnet,
    "convnet16": partial(_convnet, width=16),
    "convnet16-groupnorm": partial(_convnet, width=16, groups=8),
    "lenet": _lenet,
}


def load_model(name: str, dataset: str = "cifar10", epochs: int = 0) -> ClientModel:
    """The client model `name` after `epochs` of training on `dataset`, in eval mode.

    It ships with gipip (see data/README.md), or `data/train_client.py` has put it into
    the cache folder.

    Raises ModelError when there is no such model.
    """
    file = f"client-{dataset}-{name}.safetensors"
    path = next(filter(Path.exists, (DATA / file, cache_folder() / file)), None)
    tensors, about = read_tensors(path) if path else ({}, {})
    there = sorted(map(int, about.get("accuracy", {})))
    if epochs not in there:
        raise ModelError(
            f"There is no {name!r} trained for {epochs} epochs on {dataset!r} (epochs at hand: "
            f"{there or 'none'}). Train one: python data/train_client.py {dataset} {name}."
        )
    model = build_model(name, about["num_classes"], **about.get("input", {}))
    weights = {name: tensors[f"{epochs}/{name}"] for name in model.state_dict()}
    model.load_state_dict(weights)
    return model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters a client trains, and so shares gradients of, by name; frozen ones
    (requires_grad=False) are left out.
    """
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def in_mode(model: ClientModel, mode: Mode) -> ClientModel:
    """A copy of the model whose BatchNorm layers use running ("eval") or batch ("train")
    statistics. All else is in eval mode: what acts at random, such as dropout, is off.
    """
    if mode not in ("eval", "train"):
        raise UpdateError(f"Unknown {mode=}. Expected 'eval' or 'train'.")
    model = copy.deepcopy(model).eval()  # whose running statistics may move
    for module in model.modules():
        module.training = mode == "train" and isinstance(module, _NormBase)
    return model


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    return fingerprint(model.state_dict())


def mixes_images(network: nn.Module) -> bool:
    """Whether the images of a batch meet in the network, so that its gradient is not
    the mean of its images' gradients: in BatchNorm in train mode, and in either mode
    where it keeps no running statistics (track_running_stats=False).
    """
    layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    return any(layer.training or layer.running_mean is None for layer in layers)


def check_client_model(model: nn.Module) -> None:
    """Raise ModelError unless `model` is a ClientModel, whose normalisation an attack
    can take apart, with trainable weights, all float32 or all float64.
    """
    if not isinstance(model, ClientModel):
        raise ModelError(
            f"{described(model)} has no normalisation layer. Use gipip.client_model(network, mean, "
            "std), without mean and std where it takes images in [0, 1]."
        )
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        raise ModelError("The model's lazy layers have no weights yet. Run it once: model(images).")
    if not trainable(model):
        raise ModelError("The model has no trainable parameters. Use model.requires_grad_(True).")
    types = {parameter.dtype for parameter in model.parameters()}
    if types not in ({torch.float32}, {torch.float64}):
        raise ModelError(
            f"The weights are {', '.join(map(str, types))}; expected all float32 or all float64. "
            "Convert them: model.float()."
        )


@torch.enable_grad()
def count_classes(model: ClientModel, batch: LabeledImages) -> int:
    """How many classes the model tells apart: the width of the logits that a copy of it
    gives the batch, and two for a single logit.

    Raises ModelError when it cannot take the images, when what it gives are no logits,
    or when these do not depend on a trainable parameter.
    """
    check_client_model(model)
    try:
        if len(model.normalize.mean) not in (1, batch.pixels.shape[1]):
            raise ValueError(f"mean and std are of {len(model.normalize.mean)} channels")
        logits = copy.deepcopy(model.network)(prepared(model, batch)[0])
    except Exception as error:  # the network may be anybody's code
        shape = tuple(batch.pixels.shape)
        raise ModelError(
            f"The model cannot take a batch of shape {shape} ({error}). Build it for images of "
            f"this shape, such as build_model(…, image_size={shape[-1]})."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or not logits.requires_grad:
        raise ModelError(
            f"The network gives {described(logits)}; expected logits, a tensor of shape (images, "
            "classes) that its trainable parameters differentiate. Wrap it in a module that does."
        )
    return class_logits(logits).shape[1]


Entered = list[tuple[str, nn.Module, Tensor]]


@contextlib.contextmanager
def entering(network: nn.Module, kind: type[nn.Module]) -> Iterator[Entered]:
    """Collects the name of each layer of a kind, the layer and what enters it, in the
    order of the forward pass run inside.
    """
    seen: Entered = []

    def keep(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append((name, layer, inputs[0]))

    with contextlib.ExitStack() as hooks:
        for name, layer in network.named_modules():
            if isinstance(layer, kind):
                hooks.enter_context(layer.register_forward_pre_hook(partial(keep, name)))
        yield seen


def last_linear(network: nn.Module, inputs: Images) -> tuple[str, Float[Tensor, "batch features"]]:
    """Name of the linear layer whose output the logits are, and the features that enter
    it, found by running the network on `inputs`.

    Raises ModelError when the logits come from something else.
    """
    with entering(network, nn.Linear) as seen:
        logits = network(inputs)
    for name, layer, features in seen:
        if torch.equal(layer(features), logits):
            return name, features
    raise ModelError(
        "The model's logits do not come straight from a linear layer. To need none for the "
        "labels, share them: labels='given'."
    )
