"""Trains the attacker's priors that ship with gipip: autoencoder-NAME.safetensors and
generator-NAME.safetensors on the same images.

`python data/train_priors.py TARGET_FOLDER NAME …`, where NAME is one of AUXILIARY
below; a prior that is in the folder already is left. Run `gipip data cifar10` first.
`fashion` reads the files of Debian's package dataset-fashion-mnist from $FASHION_MNIST;
`imagenet` and `imagenet64` read photographs from $GIPIP_DATA/auxiliary (layout
class/image; shipped: 48,600 of Tiny ImageNet's).
"""

import gzip
import os
import sys
from pathlib import Path

import torch
from torch import nn

from gipip.data.datasets import LabeledImages, load_dataset
from gipip.data.photographs import list_folder, read
from gipip.experiments.sweep import provenance
from gipip.priors.autoencoder import train_autoencoder
from gipip.priors.gan import train_generator

ANIMALS, VEHICLES = (2, 3, 4, 5, 6, 7), (0, 1, 8, 9)
COUNT = 1_900


def cifar10(fraction: float) -> LabeledImages:
    return load_dataset("cifar10", full=True).auxiliary(fraction)


def classes(wanted: tuple[int, ...]) -> LabeledImages:
    """760 images of these classes, of the 1,900 embedded ones: as many as there are of
    vehicles.
    """
    pool = load_dataset("cifar10").auxiliary()
    pool = pool[torch.isin(pool.labels, torch.tensor(wanted))]
    return pool[pool.shuffled("auxiliary:0")[:760]]


def fashion() -> LabeledImages:
    """Fashion-MNIST, 28×28 grey, with a border to 32×32 and equal colour channels."""
    path = Path(os.environ["FASHION_MNIST"]) / "train-images-idx3-ubyte"
    raw = (
        gzip.decompress(path.with_name(path.name + ".gz").read_bytes())
        if not path.exists()
        else path.read_bytes()
    )
    grey = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)[:COUNT]
    return LabeledImages(
        nn.functional.pad(grey, [2] * 4).expand(-1, 3, -1, -1).contiguous(),
        torch.zeros(COUNT, dtype=torch.int64),
    )


def photographs() -> LabeledImages:
    """All images of a folder at 64×64, shuffled so that every beginning holds each
    class in proportion.
    """
    found, pixels = read(list_folder(Path(os.environ["GIPIP_DATA"]) / "auxiliary"), 64)
    pool = LabeledImages(pixels, torch.tensor(found.labels))
    return pool[pool.shuffled("auxiliary:0")]


def imagenet() -> LabeledImages:
    """The first of them, shrunk to 32×32."""
    chosen = photographs()[:COUNT]
    small = nn.functional.interpolate(chosen.images, size=32, mode="area")
    return LabeledImages((small * 255).round().to(torch.uint8), chosen.labels, chosen.indices)


def textures() -> LabeledImages:
    """Gaussian random fields with the 1/f amplitude spectrum of photographs, each
    channel its own: no edges, no objects.
    """
    generator = torch.Generator().manual_seed(0)
    frequency = (
        (torch.fft.fftfreq(32)[:, None].square() + torch.fft.rfftfreq(32)[None].square())
        .sqrt()
        .clamp(min=1 / 32)
    )
    fields = torch.fft.irfft2(
        torch.fft.rfft2(torch.randn(COUNT, 3, 32, 32, generator=generator)) / frequency, s=(32, 32)
    )
    fields = fields / fields.std(dim=(1, 2, 3), keepdim=True) * 0.2 + 0.45
    return LabeledImages(
        (fields.clamp(0, 1) * 255).round().to(torch.uint8), torch.zeros(COUNT, dtype=torch.int64)
    )


AUXILIARY = {
    f"cifar10-{percent}%": (lambda percent=percent: cifar10(percent / 100))
    for percent in (0.1, 3.8, 10, 70, 100)
}
AUXILIARY |= {
    "cifar10-animals": lambda: classes(ANIMALS),
    "cifar10-vehicles": lambda: classes(VEHICLES),
}
AUXILIARY |= {
    "fashion": fashion,
    "imagenet": imagenet,
    "textures": textures,
    "imagenet64": photographs,
    "imagenet64-seed1": photographs,
    "imagenet64-seed2": photographs,
    "imagenet64-depth4": photographs,
}
VARIANTS = {f"cifar10-width{width}": {"width": width} for width in (6,)} | {
    f"cifar10-depth{depth}": {"depth": depth} for depth in (2, 4)
}
VARIANTS |= {f"cifar10-seed{seed}": {"seed": seed} for seed in (1, 2)}
"""Other autoencoders on the 1,900 embedded images."""
AUXILIARY |= {name: lambda: load_dataset("cifar10").auxiliary() for name in VARIANTS}
LONG = {"steps": 16_000, "validation_fraction": 0.02, "patience": 160}
SETTINGS = {("autoencoder", name): settings for name, settings in VARIANTS.items()}
SETTINGS |= {
    ("autoencoder", "imagenet64"): LONG,
    ("autoencoder", "imagenet64-seed1"): LONG | {"seed": 1},
    ("autoencoder", "imagenet64-seed2"): LONG | {"seed": 2},
    ("autoencoder", "imagenet64-depth4"): LONG | {"depth": 4},
}
SETTINGS |= {("generator", "imagenet64"): {"width": 16}}
"""Where they are not the defaults."""
AUTOENCODER_ONLY = (
    "cifar10-0.1%",
    "fashion",
    "imagenet",
    "textures",
    "imagenet64-depth4",
    "imagenet64-seed1",
    "imagenet64-seed2",
    *VARIANTS,
)


def train(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    auxiliary = AUXILIARY[name]()
    for kind, training in (("generator", train_generator), ("autoencoder", train_autoencoder)):
        path = folder / f"{kind}-{name}.safetensors"
        wanted = name not in (
            AUTOENCODER_ONLY if kind == "generator" else ("cifar10-3.8%", "cifar10-70%")
        )
        if wanted and not path.exists():
            prior = training(auxiliary, **SETTINGS.get((kind, name), {}))
            prior.provenance |= {
                "command": f"python data/train_priors.py {name}",
                "dataset": name,
                "made": provenance(),
            }
            print(prior.save(path), flush=True)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        train(Path(sys.argv[1]), name)
