"""What reconstructions should be compared with: pictures by someone who knows little of
the private images, and the private images made worse by a known amount.
"""

import math
from functools import cache
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import interpolate

from gipip.data.datasets import load_dataset
from gipip.errors import DataError
from gipip.evaluation import metrics
from gipip.federation.models import Images
from gipip.files import read_tensors, shipped
from gipip.priors.base import validated

Image = Float[Tensor, "channels height width"]
PerImage = Float[Tensor, "batch"]

REFERENCES = ("mean image", "mean colour", "4×4 thumbnail", "8×8 thumbnail")
"""Their names, in the order of how much they know."""


def references(truth: Images, mean: Image) -> dict[str, Images]:
    """For each private image what one would show who knows nothing but …

    "mean image": the attacker's auxiliary images, of which this is the `mean` (see
    `mean_image`); "mean colour": the image's own; "4×4 thumbnail", "8×8 thumbnail": the
    image's own, of averaged areas, scaled up bilinearly, as viewers of images do.
    """
    thumbnails = [_thumbnail(truth, side) for side in (1, 4, 8)]
    return dict(zip(REFERENCES, [mean.expand_as(truth), *thumbnails], strict=True))


def _thumbnail(images: Images, side: int) -> Images:
    small = interpolate(images, size=side, mode="area")
    return interpolate(small, size=images.shape[-2:], mode="bilinear")


@cache
def mean_image(dataset: str) -> Image:
    """The mean of the attacker's auxiliary images of a data set, in [0, 1].

    Of "cifar10" the 1,900 that the paper grants; of "imagenet64" and "imagenet64-…" the
    48,600 photographs on which the shipped priors were trained. Raises DataError for an
    unknown data set.
    """
    if dataset.split("-")[0] == "imagenet64":
        path = shipped("mean", "imagenet64", "Make it: python data/draw_imagenet_sample.py.")
        return read_tensors(path)[0]["mean"]
    return load_dataset(dataset).auxiliary().images.mean(dim=0)


@validated
def at_psnr(
    images: Images,
    psnr: Annotated[float, Field(gt=0, lt=90)],
    kind: Literal["blurred", "noisy", "blocky"],
) -> Images:
    """The images made worse until each has this PSNR in dB, to within 0.05.

    "blurred": by a Gaussian, mirrored at the borders; "noisy": Gaussian noise, the same
    at every PSNR, clipped to [0, 1]; "blocky": averages of areas, 1 × 1, 2 × 2, 4 × 4, …
    pixels, between two of these sizes a mixture of both. What is blurred or averaged to
    a single colour fades from there to black. Raises DataError for an image that does
    not get so bad.
    """
    spoiled = {"blurred": _blurred, "noisy": _noisy, "blocky": _blocky}[kind]
    little, much = torch.zeros(len(images)), torch.ones(len(images))
    for _ in range(30):
        middle = (little + much) / 2
        enough = metrics.psnr(spoiled(images, middle), images) <= psnr
        little, much = torch.where(enough, little, middle), torch.where(enough, middle, much)
    found = spoiled(images, much)
    highest, row = metrics.psnr(found, images).max(dim=0)
    if highest > psnr + 0.05:
        least = f"Image {row}, {kind}, has at least {highest:.1f} dB"
        raise DataError(f"{least}; asked for were {psnr:g}. Ask for more, or leave it out.")
    return found


def _blurred(images: Images, amount: PerImage) -> Images:
    """As heat spreads: each cosine of the image loses exp(−σ²ω²/2). At half the amount
    σ is the longer side; then the colour that is left fades.
    """
    from scipy.fft import dctn, idctn  # slow to import

    amount = amount.view(-1, 1, 1, 1)
    sigma = max(images.shape[2:]) * (2 * amount).clamp(max=1)
    down, right = (torch.arange(side) * math.pi / side for side in images.shape[2:])
    kept = (-sigma.square() * (down[:, None].square() + right.square()) / 2).exp()
    kept = kept * (2 - 2 * amount).clamp(max=1)
    cosines = kept * torch.from_numpy(dctn(images.numpy(), axes=(2, 3), norm="ortho"))
    return torch.from_numpy(idctn(cosines.numpy(), axes=(2, 3), norm="ortho")).clamp(0, 1)


def _noisy(images: Images, amount: PerImage) -> Images:
    """With noise of σ up to 2."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + 2 * amount.view(-1, 1, 1, 1) * noise).clamp(0, 1)


def _blocky(images: Images, amount: PerImage) -> Images:
    """In equal steps from the image through ever larger blocks to black."""
    levels = [images]
    cells = list(images.shape[2:])
    while max(cells) > 1:
        cells = [max(1, count // 2) for count in cells]
        averages = interpolate(images, size=cells, mode="area")
        levels.append(interpolate(averages, size=images.shape[2:], mode="nearest"))
    steps, rows = torch.stack([*levels, torch.zeros_like(images)]), torch.arange(len(images))
    place = amount * len(levels)
    below = place.long().clamp(max=len(levels) - 1)
    share = (place - below).view(-1, 1, 1, 1)
    return torch.lerp(steps[below, rows], steps[below + 1, rows], share)
