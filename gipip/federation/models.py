"""The networks of a federated-learning client, and how they are trained to an epoch.

Every model is `ClientModel(normalize, network)`: images in [0, 1] enter, the first
layer normalises them. Attacks use the two parts apart, because their variable lives in
normalised space.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn

from gipip.data.datasets import CIFAR10_MEAN, CIFAR10_STD, LabeledImages
from gipip.data.download import cache_folder
from gipip.errors import ModelError
from gipip.files import DATA, fingerprint, read_tensors
from gipip.progress import progress


class Normalize(nn.Module):
    """(x − mean) / std per channel: maps images in [0, 1] to the network's normalised space."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        return (images - self.mean) / self.std

    def inverse(
        self, normalized: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Back to image space; in [0, 1] for everything inside `box`."""
        return normalized * self.std + self.mean

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """What [0, 1] becomes in normalised space: lower and upper bound per channel,
        each of shape (3, 1, 1).
        """
        return -self.mean / self.std, (1 - self.mean) / self.std


class ClientModel(nn.Module):
    """A network behind its normalisation layer: images in [0, 1] in, logits out."""

    def __init__(self, normalize: Normalize, network: nn.Module):
        super().__init__()
        self.normalize = normalize
        self.network = network

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch classes"]:
        return self.network(self.normalize(images))


def client_model(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> ClientModel:
    """Your own network, made ready for gipip: `network` expects images normalised with
    `mean` and `std` and gives logits.
    """
    return ClientModel(Normalize(mean, std), network)


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

    `name`: "resnet18", "convnet", "convnet16" (half as wide) or "lenet". Raises
    ModelError for any other.
    """
    if name not in _NETWORKS:
        known = ", ".join(sorted(_NETWORKS))
        raise ModelError(
            f"Unknown model {name!r}. Known models: {known}. For your own network use gipip.client_model."
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        return client_model(_NETWORKS[name](num_classes, image_size), mean, std).eval()


def _resnet18(num_classes: int, image_size: int) -> nn.Module:
    """ResNet18 with the CIFAR stem of the Inverting Gradients code: 3×3 convolution of
    stride 1, no max-pool, Kaiming fan-out.
    """
    network = torchvision.models.resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def _convnet(num_classes: int, image_size: int, *, width: int = 32) -> nn.Module:
    """Six 3×3 convolutions with BatchNorm and ReLU (32-64-64, pool, 128-128-128, pool
    for width 32) and a linear layer.
    """
    widths = [3, width, *[2 * width] * 2, *[4 * width] * 3]
    layers = []
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layers += [
            nn.Conv2d(inputs, outputs, kernel_size=3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
        if index in (2, 5):
            layers.append(nn.MaxPool2d(kernel_size=3))
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(4 * width * (image_size // 9) ** 2, num_classes)
    )


def _lenet(num_classes: int, image_size: int) -> nn.Module:
    """The sigmoid LeNet of Deep Leakage from Gradients (Zhu et al. 2019), weights
    uniform in ±0.5.
    """
    layers = []
    for inputs, stride in [(3, 2), (12, 2), (12, 1)]:
        layers += [nn.Conv2d(inputs, 12, kernel_size=5, padding=2, stride=stride), nn.Sigmoid()]
    network = nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(12 * (-(-image_size // 4)) ** 2, num_classes)
    )
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return network


_NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": _resnet18,
    "convnet": _convnet,
    "convnet16": partial(_convnet, width=16),
    "lenet": _lenet,
}


def load_model(name: str, dataset: str = "cifar10", epochs: int = 0) -> ClientModel:
    """The client model `name` after `epochs` of training on `dataset`, in eval mode.

    It ships with gipip (see data/README.md), or `data/train_client.py` has put it into
    the cache folder.

    Raises ModelError when there is no such model.
    """
    file = f"client-{dataset}-{name}.safetensors"
    path = next(
        (folder / file for folder in (DATA, cache_folder()) if (folder / file).exists()), None
    )
    tensors, provenance = read_tensors(path) if path else ({}, {})
    there = sorted(int(epoch) for epoch in provenance.get("accuracy", {}))
    if epochs not in there:
        raise ModelError(
            f"There is no {name!r} trained for {epochs} epochs on {dataset!r} (epochs at hand: {there or 'none'}). "
            f"Train one: python data/train_client.py {dataset} {name}."
        )
    model = build_model(name, provenance["num_classes"], **provenance.get("input", {}))
    model.load_state_dict(
        {
            key.removeprefix(f"{epochs}/"): value
            for key, value in tensors.items()
            if key.startswith(f"{epochs}/")
        }
    )
    return model


def train_client(
    model: ClientModel,
    images: LabeledImages,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 0.05,
    seed: int = 0,
) -> Iterator[float]:
    """Train in place, as a server's global model is: gives the mean training loss after
    each epoch, with the model in eval mode.

    SGD with momentum 0.9 and weight decay 5e-4, learning rate falling to zero along a
    cosine, random horizontal flips.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=learning_rate, momentum=0.9, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, epochs * (len(images) // batch_size)
    )
    for epoch in range(epochs):
        model.train()
        losses = []
        batches = torch.randperm(len(images), generator=generator).split(batch_size)[
            : len(images) // batch_size
        ]
        for rows in progress(batches, description=f"epoch {epoch + 1}/{epochs}"):
            batch = images[rows]
            flipped = (torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5).expand_as(
                batch.images
            )
            x = torch.where(flipped, batch.images.flip(3), batch.images).to(
                device, memory_format=torch.channels_last
            )
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), batch.labels.to(device))
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        model.eval()
        yield torch.stack(losses).mean().item()


@torch.no_grad()
def accuracy(model: ClientModel, images: LabeledImages) -> float:
    """Share of the images that the model, in eval mode, puts in their class; in [0, 1]."""
    model = copy.deepcopy(model).cpu().eval()
    predicted = torch.cat(
        [model(images[rows].images).argmax(dim=1) for rows in torch.arange(len(images)).split(250)]
    )
    return (predicted == images.labels).double().mean().item()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters a client trains, and so shares gradients of, by name; frozen ones
    (requires_grad=False) are left out.
    """
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    return fingerprint(model.state_dict())


def check_client_model(model: nn.Module) -> None:
    """Raise ModelError unless `model` is a ClientModel, whose normalisation an attack
    can take apart.
    """
    if not isinstance(model, ClientModel):
        raise ModelError(
            f"The model ({type(model).__name__}) has no normalisation layer that gipip knows. Expected a gipip.ClientModel, whose first "
            "layer normalises images in [0, 1]. Wrap your network: gipip.client_model(network, mean=(…), std=(…))."
        )


def last_linear(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the model's classification layer; ModelError when it ends in
    something else.
    """
    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)
    ]
    if not layers:
        raise ModelError(
            "The model has no linear layer, from whose gradient labels are inferred. Share the labels: Client.share(batch, labels='given')."
        )
    return layers[-1]


def mixes_images(network: nn.Module, mode: str) -> bool:
    """Whether images meet in the network: BatchNorm in train mode or without running statistics."""
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return any(mode == "train" or layer.running_mean is None for layer in layers)
