"""The anomaly score of GI-PIP: the reconstruction error of an autoencoder trained on a
few auxiliary images.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, InstanceOf, PositiveInt
from torch import Tensor, nn

from gipip.data.datasets import LabeledImages
from gipip.errors import DataError
from gipip.priors.base import (
    Images,
    LearningRate,
    Network,
    Prior,
    Seed,
    Training,
    trained,
    validated,
)


class Autoencoder(Network):
    """`depth` convolutions (kernel 4, stride 2) that double the channels from `width`,
    mirrored, with a sigmoid at the end.

    Width 12 and depth 3 are GI-PIP's network for CIFAR-10 and ImageNet at 64×64: its
    code has a quarter of the input's numbers. Images in [0, 1], sides divisible by
    2**depth.
    """

    @validated
    def __init__(self, width: PositiveInt = 12, depth: PositiveInt = 3):
        super().__init__()
        channels = [3, *(width * 2**level for level in range(depth))]
        convolution: dict[str, Any] = {"kernel_size": 4, "stride": 2, "padding": 1}
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.Conv2d(inputs, outputs, **convolution), nn.ReLU()]
        for inputs, outputs in itertools.pairwise(reversed(channels)):
            layers += [nn.ConvTranspose2d(inputs, outputs, **convolution), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())
        self.depth, self.arguments = depth, {"width": width, "depth": depth}

    def forward(self, images: Images) -> Images:
        return self.layers(images)

    def misfit(self, image_shape: Sequence[int]) -> str:
        channels, *sides = image_shape
        if channels == 3 and len(sides) == 2 and not any(side % 2**self.depth for side in sides):
            return ""
        taken = f"of depth {self.depth} takes 3 channels and sides divisible by {2**self.depth}"
        remedy = "Resize them, or gipip.train_autoencoder(…, depth=…)."
        return f"an autoencoder {taken}, not {'×'.join(map(str, image_shape))}. {remedy}"


class AnomalyScore(Prior):
    """AS(x) = |MSE(x, AE(x)) − c| (Sun et al. 2024): how far an image's reconstruction
    error is from that of natural images.

    `offset` is c. `provenance` says how the autoencoder was trained.
    """

    kind = "autoencoder"
    network_class = Autoencoder
    constants = ("offset",)

    autoencoder: Autoencoder

    @validated
    def __init__(
        self, autoencoder: Autoencoder, offset: float = 0.0, provenance: dict | None = None
    ):
        # channels last: a fifth less time on a CPU
        super().__init__(autoencoder.to(memory_format=torch.channels_last), provenance)
        self.offset = offset

    def errors(self, images: Images) -> Float[Tensor, "batch"]:
        """Mean squared reconstruction error of each image in [0, 1]; DataError for
        images that the autoencoder cannot take.
        """
        if reason := self.autoencoder.misfit(images.shape[1:]):
            raise DataError(f"These images cannot be scored: {reason}")
        return (self.autoencoder(images) - images).square().mean(dim=(1, 2, 3))

    def forward(
        self, images: Images, per: Literal["image", "batch"] = "image"
    ) -> Float[Tensor, "scores"]:
        """Scores ≥ 0 of images in [0, 1]: one an image, or (the reference's form) one
        of the whole batch's mean error.
        """
        errors = self.errors(images)
        if per == "batch":
            errors = errors.mean(dim=0, keepdim=True)
        return (errors - self.offset).abs()

    def with_offset(self, offset: float) -> "AnomalyScore":
        """The same autoencoder with another c, e.g. 0, or 0.001 as GI-PIP released it
        for CIFAR-10.
        """
        return AnomalyScore(self.autoencoder, offset=offset, provenance=self.provenance)


def load_prior(name: str = "cifar10") -> AnomalyScore:
    """An anomaly score that ships with gipip: "cifar10" is trained on the 1,900
    embedded auxiliary images; see data/README.md for more.

    Raises DataError when there is none of that name.
    """
    return AnomalyScore.shipped(name)


@validated
def train_autoencoder(
    auxiliary: InstanceOf[LabeledImages],
    *,
    width: PositiveInt = 12,
    depth: PositiveInt = 3,
    steps: PositiveInt = 6_000,
    batch_size: PositiveInt = 64,
    learning_rate: LearningRate = 1e-2,
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1,
    patience: PositiveInt = 10,
    seed: Seed = 0,
    store: Path | str | None = None,
) -> AnomalyScore:
    """Train an autoencoder on auxiliary images and calibrate the offset c to its mean
    error on held-out ones.

    A `validation_fraction` of the images is held out: the weights of the lowest
    validation error are kept, and training stops early after `patience` evaluations
    (one every 100 steps) without a better one. Adam, learning rate falling to zero
    along a cosine. Ctrl-C after the first step keeps the best weights so far. With a
    `store` (a folder) a finished training of the same settings on the same images is
    loaded instead of repeated. Raises pydantic's ValidationError for settings out of
    range, DataError for images the autoencoder cannot be trained on, GipipError when
    the training diverges.
    """
    return trained(AutoencoderTraining, **locals())


class AutoencoderTraining(Training[AnomalyScore]):
    """Adam on shuffled images, judged by the error on held-out ones."""

    prior = AnomalyScore
    measure = "validation"
    every = 100

    network: Autoencoder

    def __init__(self, auxiliary: LabeledImages, settings: Mapping[str, Any]):
        network = Autoencoder(settings["width"], settings["depth"]).to(self.device)
        super().__init__(network, auxiliary, settings["patience"])
        random = torch.Generator().manual_seed(settings["seed"])
        training, validation = _split(auxiliary, settings["validation_fraction"], random)
        self.validation = validation.to(self.device)
        self.batches = _batches(training.to(self.device), settings["batch_size"], random)
        self.losses: list[Tensor] = []
        self.optimizer = torch.optim.Adam(network.parameters(), lr=settings["learning_rate"])
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, settings["steps"]
        )

    def advance(self) -> None:
        batch = next(self.batches)
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.network(batch), batch)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.detach())

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """The mean training loss since the last judgement, and the validation error."""
        error = nn.functional.mse_loss(self.network(self.validation), self.validation).item()
        loss = torch.stack(self.losses).mean().item()
        self.losses.clear()
        return {"training": loss, "validation": error}

    def finish(self) -> AnomalyScore:
        prior = super().finish()
        prior.offset = prior.errors(self.validation.cpu()).mean().item()
        return prior


def _split(
    auxiliary: LabeledImages, validation_fraction: float, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Training and validation images, at least one of each."""
    count = len(auxiliary)
    order = torch.randperm(count, generator=random)
    held_out = min(max(1, round(validation_fraction * count)), count - 1)
    return auxiliary[order[held_out:]].images, auxiliary[order[:held_out]].images


def _batches(images: Images, batch_size: int, random: torch.Generator) -> Iterator[Images]:
    """Endless shuffled batches; a pass over the images ends with a smaller one if need
    be.
    """
    while True:
        order = torch.randperm(len(images), generator=random).to(images.device)
        yield from images[order].split(batch_size)
