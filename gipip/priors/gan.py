"""The prior of GAN-based inversion: a small DCGAN generator trained on auxiliary images
(Radford et al. 2016).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import InstanceOf, PositiveInt
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel

from gipip.data.datasets import LabeledImages
from gipip.errors import DataError
from gipip.files import DATA, read_tensors
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


class Generator(Network):
    """DCGAN: latents to a 4×4 map, then one transposed convolution (kernel 4, stride 2)
    a doubling; images in [0, 1].

    `width`: channels of the last hidden layer, which double with every layer before it.
    `image_size`: 16, 32, 64, …; DataError for any other.
    """

    def __init__(self, width: int = 32, latent_size: int = 64, image_size: int = 32):
        super().__init__()
        channels = _channels(width, image_size)
        doubling: dict[str, Any] = {"kernel_size": 4, "stride": 2, "padding": 1}
        layers: list[nn.Module] = []
        layers += [nn.ConvTranspose2d(latent_size, channels[0], kernel_size=4, bias=False)]
        layers += [nn.BatchNorm2d(channels[0]), nn.ReLU()]
        for inputs, outputs in itertools.pairwise(channels):
            layers += [nn.ConvTranspose2d(inputs, outputs, bias=False, **doubling)]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.ConvTranspose2d(width, 3, **doubling), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)
        self.latent_size, self.image_size = latent_size, image_size
        self.arguments = {"width": width, "latent_size": latent_size, "image_size": image_size}

    def forward(self, latents: Float[Tensor, "batch latent_size"]) -> Images:
        return self.layers(latents[:, :, None, None])

    def misfit(self, image_shape: Sequence[int]) -> str:
        size, shape = self.image_size, "×".join(map(str, image_shape[1:]))
        if tuple(image_shape) == (3, size, size):
            return ""
        remedy = "Use one trained on images of that size: gipip.train_generator(auxiliary)."
        return f"it makes {size}×{size} images, but the update is of {shape}. {remedy}"


def _channels(width: int, image_size: int) -> list[int]:
    """Channels from the 4×4 map to the last hidden layer."""
    if image_size < 16 or image_size & (image_size - 1):
        sizes = f"16, 32, 64, … pixels a side, not {image_size}"
        raise DataError(f"A generator makes images of {sizes}. Resize the auxiliary images.")
    # 32 = 4·2³: two hidden doublings, and a last one to the image
    levels = image_size.bit_length() - 4
    return [width * 2**level for level in range(levels, -1, -1)]


def discriminator(width: int, image_size: int) -> nn.Module:
    """The generator's mirror image with spectral normalisation (Miyato et al. 2018): a
    score an image.
    """
    channels = [3, *reversed(_channels(width, image_size))]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(channels):
        halving = nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1)
        layers += [spectral_norm(halving), nn.LeakyReLU(0.2)]
    last = nn.Conv2d(channels[-1], 1, kernel_size=4)
    return nn.Sequential(*layers, spectral_norm(last), nn.Flatten(0))


class GenerativePrior(Prior):
    """A trained generator G: latents z ~ N(0, I) to images in [0, 1]."""

    kind = "generator"
    network_class = Generator

    generator: Generator

    def forward(self, latents: Float[Tensor, "batch latent_size"]) -> Images:
        return self.generator(latents)

    @torch.no_grad()
    @validated
    def sample(self, count: PositiveInt, seed: Seed = 0) -> Images:
        """Random images, the same for the same seed."""
        random = torch.Generator().manual_seed(seed)
        return self(torch.randn(count, self.generator.latent_size, generator=random))


def load_generator(name: str) -> GenerativePrior:
    """A generator that ships with gipip, such as "cifar10-3.8%"; see data/README.md.
    Raises DataError when there is none of that name.
    """
    return GenerativePrior.shipped(name)


@validated
def train_generator(
    auxiliary: InstanceOf[LabeledImages],
    *,
    width: PositiveInt = 32,
    latent_size: PositiveInt = 64,
    steps: PositiveInt = 3_000,
    batch_size: PositiveInt = 64,
    learning_rate: LearningRate = 4e-4,
    seed: Seed = 0,
    store: Path | str | None = None,
) -> GenerativePrior:
    """Train a DCGAN on auxiliary images with the hinge loss; the exponential moving
    average of the generator's weights is what is kept.

    What the discriminator sees is augmented (see `augmentation`). Every 500 steps the
    average is judged by its kernel distance to the auxiliary images (KID, Bińkowski et
    al. 2018, on features of a fixed ImageNet AlexNet), and the best checkpoint is
    returned. Ctrl-C after the first step keeps the best so far. With a `store` (a
    folder) a finished training of the same settings on the same images is loaded.
    Raises pydantic's ValidationError for settings out of range, DataError for images no
    generator can be trained on, GipipError when the training diverges.
    """
    return trained(GeneratorTraining, **locals())


class GeneratorTraining(Training[GenerativePrior]):
    """Generator against discriminator; `network` is the generator's moving average.
    `samples`: images that it is judged by, at most.
    """

    prior = GenerativePrior
    measure = "kernel distance"
    every = 500
    samples = 1_000

    def __init__(self, auxiliary: LabeledImages, settings: Mapping[str, Any]):
        side = auxiliary.pixels.shape[-1]
        generator = Generator(settings["width"], settings["latent_size"], side)
        self.generator = generator.to(self.device)
        self.discriminator = discriminator(settings["width"], side).to(self.device)
        self.average = AveragedModel(self.generator, avg_fn=_forgetting, use_buffers=True)
        network = self.average.module.eval().requires_grad_(False)
        super().__init__(network, auxiliary)  # type: ignore[arg-type]
        self.auxiliary, self.batch_size = auxiliary, settings["batch_size"]
        self.augment = augmentation()
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=settings["learning_rate"], betas=(0.5, 0.999))
            for network in (self.generator, self.discriminator)
        ]
        fixed = torch.Generator().manual_seed(0)
        shown = auxiliary[torch.randperm(len(auxiliary), generator=fixed)[: self.samples]]
        self.distance = kernel_distance(shown.images.to(self.device))
        latents = torch.randn(len(shown), generator.latent_size, generator=fixed)
        self.latents = latents.to(self.device)

    def advance(self) -> None:
        """One step of the discriminator, one of the generator (hinge loss, Lim and Ye
        2017), one of the average.
        """
        rows = torch.randint(len(self.auxiliary), (self.batch_size,))
        real = self.auxiliary[rows].images.to(self.device)
        on_real, on_fake = self._judged(real), self._judged(self._made().detach())
        self._descend(1, (1 - on_real).relu().mean() + (1 + on_fake).relu().mean())
        self._descend(0, -self._judged(self._made()).mean())
        self.average.update_parameters(self.generator)

    def _made(self) -> Images:
        latents = torch.randn(self.batch_size, self.generator.latent_size)
        return self.generator(latents.to(self.device))

    def _judged(self, images: Images) -> Float[Tensor, "batch"]:
        return self.discriminator(self.augment(images))

    def _descend(self, which: int, loss: Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """The kernel distance of what the moving average makes of the same latents each time."""
        made = torch.cat([self.network(part) for part in self.latents.split(250)])
        return {"kernel distance": self.distance(made)}


def _forgetting(average: Tensor, latest: Tensor, steps: Tensor | int) -> Tensor:
    """Of the first, random weights soon, of others over some 500 steps."""
    decay = min(0.998, int(steps) / (int(steps) + 10))
    return average * decay + latest * (1 - decay)


def augmentation() -> Callable[[Images], Images]:
    """What the discriminator sees of real and of generated images: colours, places and
    a hole vary at random from batch to batch, so that it does not memorise a small set
    (DiffAugment, Zhao et al., NeurIPS 2020).
    """
    from torchvision.transforms import v2  # slow to import

    return v2.Compose(
        [
            v2.ColorJitter(brightness=0.5, contrast=0.5, saturation=1),
            v2.RandomAffine(degrees=0, translate=(1 / 8, 1 / 8), fill=0.5),
            v2.RandomErasing(p=1, scale=(1 / 4, 1 / 4), ratio=(1, 1), value=0.5),
        ]
    )


def kernel_distance(real: Images) -> Callable[[Images], float]:
    """A function that gives the distance of as many images in [0, 1] to these real
    ones: KID, on 256 channels of gipip's ImageNet AlexNet in place of Inception's.
    """
    from torchmetrics.image.kid import poly_mmd  # slow to import

    network = _features().to(real.device)

    def features(images: Images) -> Float[Tensor, "images channels"]:
        return torch.cat([network(part) for part in images.split(250)])

    known = features(real)
    return lambda images: poly_mmd(known, features(images)).item()


def _features() -> nn.Module:
    """AlexNet's last convolution, averaged over space, of images scaled to 64×64."""
    from torchvision.models import alexnet  # slow to import
    from torchvision.transforms import Normalize

    with torch.device("meta"):
        convolutions = alexnet().features[:-1]
    tensors, _ = read_tensors(DATA / "lpips-alexnet-trunk.safetensors")
    weights = {name.removeprefix("features."): value for name, value in tensors.items()}
    convolutions.load_state_dict(weights, assign=True)
    scaled = nn.Upsample(size=(64, 64), mode="bilinear")
    standard = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    layers = (scaled, standard, *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers).requires_grad_(False)
