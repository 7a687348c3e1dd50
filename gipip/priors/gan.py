"""The prior of GAN-based inversion: a small DCGAN generator trained on auxiliary images
(Radford et al. 2016).
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from gipip.data.datasets import LabeledImages
from gipip.errors import DamagedFileError, DataError, GipipError, UpdateError
from gipip.files import DATA, fingerprint, read_tensors, shipped, write_tensors
from gipip.priors.training import kept, seeded, told
from gipip.progress import progress

Images = Float[Tensor, "batch 3 height width"]

_EVALUATE_EVERY = 500
_SAMPLES = 1_000  # images that a checkpoint is judged by


class Generator(nn.Module):
    """DCGAN: latents to a 4×4 map, then one transposed convolution (kernel 4, stride 2)
    a doubling; images in [0, 1].

    `width`: channels of the last hidden layer, which double with every layer before it.
    `image_size`: 16, 32, 64, …
    """

    def __init__(self, width: int = 32, latent_size: int = 64, image_size: int = 32):
        super().__init__()
        channels = _channels(width, image_size)
        layers = [
            nn.ConvTranspose2d(latent_size, channels[0], kernel_size=4, bias=False),
            nn.BatchNorm2d(channels[0]),
            nn.ReLU(),
        ]
        for inputs, outputs in itertools.pairwise(channels):
            layers += [
                nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=False)
            ]
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(
            *layers, nn.ConvTranspose2d(width, 3, kernel_size=4, stride=2, padding=1), nn.Sigmoid()
        )
        self.width, self.latent_size, self.image_size = width, latent_size, image_size

    def forward(self, latents: Float[Tensor, "batch latent_size"]) -> Images:
        return self.layers(latents[:, :, None, None])


def _channels(width: int, image_size: int) -> list[int]:
    """Channels from the 4×4 map to the last hidden layer."""
    levels = image_size.bit_length() - 4  # 32 = 4·2³: two hidden doublings, a last to the image
    if image_size < 16 or image_size & (image_size - 1):
        raise DataError(
            f"A generator makes images of 16, 32, 64, … pixels a side, not {image_size}. "
            "Resize the auxiliary images."
        )
    return [width * 2**level for level in range(levels, -1, -1)]


def _discriminator(width: int, image_size: int) -> nn.Module:
    """The generator's mirror image with spectral normalisation (Miyato et al. 2018)."""
    channels = [3, *reversed(_channels(width, image_size))]
    layers = []
    for inputs, outputs in itertools.pairwise(channels):
        layers += [
            spectral_norm(nn.Conv2d(inputs, outputs, kernel_size=4, stride=2, padding=1)),
            nn.LeakyReLU(0.2),
        ]
    return nn.Sequential(
        *layers, spectral_norm(nn.Conv2d(channels[-1], 1, kernel_size=4)), nn.Flatten(0)
    )


class GenerativePrior(nn.Module):
    """A trained generator G: latents z ~ N(0, I) to images in [0, 1]. `provenance` says
    how it was trained and travels with the weights.
    """

    def __init__(self, generator: Generator, provenance: dict | None = None):
        super().__init__()
        self.generator = generator.eval().requires_grad_(False)
        self.provenance = provenance or {}

    def forward(self, latents: Float[Tensor, "batch latent_size"]) -> Images:
        return self.generator(latents)

    def check(self, image_shape: Sequence[int]) -> None:
        """Raise UpdateError unless it makes images of this shape, (3, height, width)."""
        size, (height, width) = self.generator.image_size, image_shape[-2:]
        if (height, width) != (size, size):
            raise UpdateError(
                f"The generator makes {size}×{size} images, but the update is of {height}×{width}. "
                "Use a generator trained on images of the update's size: "
                "gipip.train_generator(auxiliary)."
            )

    @torch.no_grad()
    def sample(self, count: int, seed: int = 0) -> Images:
        """Random images, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        return self(torch.randn(count, self.generator.latent_size, generator=generator))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        return fingerprint(self.state_dict())

    def save(self, path: Path | str) -> Path:
        """Write weights and provenance to one safetensors file."""
        generator = self.generator
        shape = {
            "width": generator.width,
            "latent_size": generator.latent_size,
            "image_size": generator.image_size,
        }
        return write_tensors(
            path, generator.state_dict(), {"generator": shape, "provenance": self.provenance}
        )

    @classmethod
    def load(cls, path: Path | str) -> "GenerativePrior":
        """Read what `save` wrote; DamagedFileError when the file is corrupt or holds
        something else.
        """
        tensors, metadata = read_tensors(path)
        try:
            generator = Generator(**metadata["generator"])
            generator.load_state_dict(tensors)
            return cls(generator, metadata["provenance"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise DamagedFileError(
                f"{path} does not hold a generator ({error}). Train one: gipip train generator."
            ) from error


def load_generator(name: str) -> GenerativePrior:
    """A generator that ships with gipip, such as "cifar10-3.8%"; see data/README.md.
    Raises DataError when there is none of that name.
    """
    return GenerativePrior.load(
        shipped("generator", name, "Train one: gipip.train_generator(auxiliary).")
    )


def train_generator(
    auxiliary: LabeledImages,
    *,
    width: int = 32,
    latent_size: int = 64,
    steps: int = 3_000,
    batch_size: int = 64,
    learning_rate: float = 4e-4,
    ema: float = 0.998,
    augment: bool = True,
    seed: int = 0,
    store: Path | str | None = None,
) -> GenerativePrior:
    """Train a DCGAN on auxiliary images with the hinge loss; the exponential moving
    average of the generator's weights is what is kept.

    `augment`: differentiable augmentation of what the discriminator sees (Zhao et al.,
    NeurIPS 2020: brightness, saturation, contrast, translation, cutout), without which
    it memorises a small set. Every 500 steps the average is judged by its kernel
    distance to the auxiliary images (KID, Bińkowski et al. 2018, on features of a fixed
    ImageNet AlexNet), and the best checkpoint is returned. With a `store` (a folder) a
    finished training of the same settings on the same images is loaded. Raises
    DataError for images no generator can be trained on, GipipError when the training
    diverges.
    """
    provenance = told(auxiliary, locals())
    path = kept(store, provenance)
    if path and path.exists():
        return GenerativePrior.load(path)
    image_size = auxiliary.pixels.shape[-1]
    if len(auxiliary) < 2 or auxiliary.pixels.shape[-2] != image_size:
        found = f"{len(auxiliary)} of {auxiliary.pixels.shape[-2]}×{image_size} pixels"
        raise DataError(f"A generator needs at least 2 square images; found {found}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with seeded(seed):
        networks = (
            Generator(width, latent_size, image_size).to(device),
            _discriminator(width, image_size).to(device),
        )
    training = _Training(*networks, learning_rate, ema)
    judge = _Judge(auxiliary, device)
    random = torch.Generator().manual_seed(seed)
    for step in progress(range(1, steps + 1), description="generator", unit="step"):
        rows = torch.randint(len(auxiliary), (batch_size,), generator=random)
        training.step(
            auxiliary[rows].images.to(device),
            _augmentation(batch_size, random) if augment else nn.Identity(),
            random,
        )
        if step % _EVALUATE_EVERY == 0 or step == steps:
            judge.evaluate(step, training.average)
    training.average.load_state_dict(judge.best)
    prior = GenerativePrior(training.average.cpu(), provenance | {"history": judge.history})
    if path:
        prior.save(path)
    return prior


class _Training:
    """Generator, discriminator, their optimisers, and the generator's moving average."""

    def __init__(
        self, generator: Generator, discriminator: nn.Module, learning_rate: float, ema: float
    ):
        self.generator, self.discriminator, self.ema, self.steps = generator, discriminator, ema, 0
        self.average = copy.deepcopy(generator).eval().requires_grad_(False)
        networks = (generator, discriminator)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.5, 0.999))
            for network in networks
        ]

    def step(self, real: Images, augmentation, random: torch.Generator) -> None:
        """One step of the discriminator, one of the generator (hinge loss, Lim and Ye
        2017), one of the average.
        """
        latents = torch.randn(2, len(real), self.generator.latent_size, generator=random).to(
            real.device
        )
        fake = self.generator(latents[0]).detach()
        loss = (1 - self.discriminator(augmentation(real))).relu().mean() + (
            1 + self.discriminator(augmentation(fake))
        ).relu().mean()
        self._descend(1, loss)
        self._descend(0, -self.discriminator(augmentation(self.generator(latents[1]))).mean())
        self.steps += 1
        decay = min(
            self.ema, self.steps / (self.steps + 10)
        )  # the first weights, which are random, are soon forgotten
        with torch.no_grad():
            for kept, new in zip(
                self.average.state_dict().values(),
                self.generator.state_dict().values(),
                strict=True,
            ):
                kept.copy_(kept * decay + new * (1 - decay) if kept.is_floating_point() else new)

    def _descend(self, which: int, loss: Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()
        self.optimizers[which].step()


def _augmentation(batch_size: int, random: torch.Generator):
    """A random differentiable augmentation, to be applied alike to real and generated
    images (DiffAugment: colour, translation, cutout).
    """
    brightness, saturation, contrast = (
        torch.rand(batch_size, 1, 1, 1, generator=random) for _ in range(3)
    )
    shift, hole = (
        torch.rand(batch_size, 2, generator=random),
        torch.rand(batch_size, 2, generator=random),
    )

    def augment(images: Images) -> Images:
        x = images - 0.5 + (brightness.to(images) - 0.5)
        mean = x.mean(dim=1, keepdim=True)
        x = (x - mean) * (2 * saturation.to(x)) + mean
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = (x - mean) * (contrast.to(x) + 0.5) + mean
        return _cut_out(_translate(x, shift.to(x)), hole.to(x))

    return augment


def _translate(x: Images, shift: Float[Tensor, "batch 2"]) -> Images:
    """Moved by up to an eighth of the side in each direction; what comes in is grey."""
    side, reach = x.shape[-1], x.shape[-1] // 8
    start = (shift * (2 * reach + 1)).long()
    rows, columns = (start[:, axis, None] + torch.arange(side, device=x.device) for axis in (0, 1))
    padded = nn.functional.pad(x, [reach] * 4).permute(0, 2, 3, 1)
    return padded[
        torch.arange(len(x), device=x.device)[:, None, None], rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)


def _cut_out(x: Images, hole: Float[Tensor, "batch 2"]) -> Images:
    """A square of half the side becomes grey."""
    side = x.shape[-1]
    inside = [
        (
            (torch.arange(side, device=x.device) - (hole[:, axis, None] * side).long()).abs()
            <= side // 4
        )
        for axis in (0, 1)
    ]
    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


@dataclass(eq=False)
class _Judge:
    """Kernel distance of generated images to the auxiliary ones, and the checkpoint
    where it was smallest.
    """

    auxiliary: LabeledImages
    device: str
    best: dict[str, Tensor] = field(default_factory=dict)
    history: dict[str, list] = field(default_factory=lambda: {"step": [], "kernel distance": []})

    def __post_init__(self):
        rows = torch.randperm(len(self.auxiliary), generator=torch.Generator().manual_seed(0))[
            :_SAMPLES
        ]
        self.distance = kernel_distance(len(rows)).to(self.device)
        for part in self.auxiliary[rows].images.split(250):
            self.distance.update(part.to(self.device), real=True)

    @torch.no_grad()
    def evaluate(self, step: int, generator: Generator) -> None:
        latents = torch.randn(
            _SAMPLES, generator.latent_size, generator=torch.Generator().manual_seed(0)
        )
        self.distance.reset()
        for part in latents.split(250):
            self.distance.update(generator(part.to(self.device)), real=False)
        with seeded(0):  # the metric draws its subsets from the global generator
            found = self.distance.compute()[0].item()
        if not math.isfinite(found):
            diverged = f"not finite after {step} steps"
            advice = "Use a smaller learning_rate."
            raise GipipError(f"The generator's training diverged: {diverged}. {advice}")
        if not self.history["step"] or found < min(self.history["kernel distance"]):
            self.best = copy.deepcopy(generator.state_dict())
        self.history["step"].append(step)
        self.history["kernel distance"].append(found)


def kernel_distance(images: int) -> Any:
    """KID between sets of at least `images` images in [0, 1], on the features of gipip's ImageNet
    AlexNet instead of Inception's: a torchmetrics KernelInceptionDistance.
    """
    from torchmetrics.image.kid import KernelInceptionDistance  # takes seconds to import

    return KernelInceptionDistance(
        feature=_Features(), subsets=20, subset_size=min(500, images), reset_real_features=False
    )


class _Features(nn.Module):
    """256 channels of AlexNet's last convolution, averaged over space, of images scaled
    to 64×64.
    """

    def __init__(self):
        super().__init__()
        from torchvision.models import alexnet  # takes a second to import

        with torch.device("meta"):
            self.network = alexnet().features
        tensors, _ = read_tensors(DATA / "lpips-alexnet-trunk.safetensors")
        weights = {name.removeprefix("features."): value for name, value in tensors.items()}
        self.network.load_state_dict(weights, assign=True)
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1))

    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def forward(self, images: Images) -> Float[Tensor, "batch 256"]:
        images = nn.functional.interpolate(
            images, size=(64, 64), mode="bilinear", align_corners=False
        )
        return self.network[:-1]((images - self.mean) / self.std).mean(dim=(2, 3))
