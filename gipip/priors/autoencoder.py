"""The anomaly score of GI-PIP: the reconstruction error of an autoencoder trained on a few auxiliary images."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gipip.data import LabeledImages
from gipip.errors import DamagedFileError, DataError
from gipip.files import DATA, canonical_json, fingerprint, read_tensors, write_tensors
from gipip.progress import progress

_EVALUATE_EVERY = 100


class Autoencoder(nn.Module):
    """`depth` convolutions (kernel 4, stride 2) that double the channels from `width`, mirrored, with a sigmoid at the end.

    Width 12 and depth 3 are GI-PIP's network for CIFAR-10 and ImageNet at 64×64: its code has a quarter of the input's numbers.
    Images in [0, 1], sides divisible by 2**depth.
    """

    def __init__(self, width: int = 12, depth: int = 3):
        super().__init__()
        channels = [3, *(width * 2**level for level in range(depth))]
        pairs = list(zip(channels, channels[1:]))
        down = [layer for i, o in pairs for layer in (nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), nn.ReLU())]
        up = [layer for i, o in reversed(pairs) for layer in (nn.ConvTranspose2d(o, i, kernel_size=4, stride=2, padding=1), nn.ReLU())]
        self.layers = nn.Sequential(*down, *up[:-1], nn.Sigmoid())
        self.width, self.depth = width, depth

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        return self.layers(images)


class AnomalyScore(nn.Module):
    """AS(x) = |MSE(x, AE(x)) − c| (GI-PIP, eq. 3): how far an image's reconstruction error is from that of natural images.

    `offset` is c. `provenance` says how the autoencoder was trained (data, settings, losses) and travels with the weights.
    """

    def __init__(self, autoencoder: Autoencoder, offset: float = 0.0, provenance: dict | None = None):
        super().__init__()
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.offset = float(offset)
        self.provenance = provenance or {}

    def errors(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch"]:
        """Mean squared reconstruction error of each image in [0, 1]."""
        return (self.autoencoder(images) - images).square().mean(dim=(1, 2, 3))

    def forward(
        self, images: Float[Tensor, "batch 3 height width"], per: Literal["image", "batch"] = "image"
    ) -> Float[Tensor, "scores"]:
        """Scores ≥ 0 of images in [0, 1]: one an image, or (the reference's form) one of the whole batch's mean error."""
        errors = self.errors(images)
        return ((errors if per == "image" else errors.mean(dim=0, keepdim=True)) - self.offset).abs()

    def with_offset(self, offset: float) -> "AnomalyScore":
        """The same autoencoder with another c, e.g. 0, or 0.001 as GI-PIP released it for CIFAR-10."""
        return AnomalyScore(self.autoencoder, offset, self.provenance)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the offset."""
        return fingerprint(self.state_dict(), repr(self.offset))

    def save(self, path: Path | str) -> Path:
        """Write weights, offset and provenance to one safetensors file."""
        shape = {"width": self.autoencoder.width, "depth": self.autoencoder.depth}
        return write_tensors(path, self.autoencoder.state_dict(), {"autoencoder": shape, "offset": self.offset, "provenance": self.provenance})

    @classmethod
    def load(cls, path: Path | str) -> "AnomalyScore":
        """Read what `save` wrote; DamagedFileError when the file is corrupt or holds something else."""
        tensors, metadata = read_tensors(path)
        try:
            autoencoder = Autoencoder(**metadata["autoencoder"])
            autoencoder.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise DamagedFileError(f"{path} does not hold the weights of an autoencoder ({error}). Train one: gipip train-prior.") from error
        return cls(autoencoder, metadata["offset"], metadata["provenance"])


def load_prior(dataset: str = "cifar10") -> AnomalyScore:
    """The anomaly score that ships with gipip, trained on the embedded auxiliary images of `dataset`."""
    path = DATA / f"autoencoder-{dataset}.safetensors"
    if not path.exists():
        raise DataError(f"No trained autoencoder for {dataset!r} ships with gipip. Train one: gipip.train_autoencoder(data.auxiliary()).")
    return AnomalyScore.load(path)


def train_autoencoder(
    auxiliary: LabeledImages,
    *,
    width: int = 12,
    depth: int = 3,
    steps: int = 6_000,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    validation_fraction: float = 0.1,
    patience: int = 10,
    seed: int = 0,
    store: Path | str | None = None,
) -> AnomalyScore:
    """Train an autoencoder on auxiliary images and calibrate the offset c to its mean error on held-out ones.

    A `validation_fraction` of the images is held out: the weights of the lowest validation error are kept, and training stops early after
    `patience` evaluations (one every 100 steps) without a better one. Adam, learning rate falling to zero along a cosine. Ctrl-C keeps the
    best weights so far. With a `store` (a folder) a training of the same settings on the same images is loaded instead of repeated.
    """
    settings = {name: value for name, value in locals().items() if name not in ("auxiliary", "store")}
    provenance = {"data": auxiliary.fingerprint, "images": len(auxiliary), "settings": settings}
    path = Path(store) / "priors" / f"{fingerprint({}, canonical_json(provenance))[:24]}.safetensors" if store else None
    if path and path.exists():
        return AnomalyScore.load(path)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(auxiliary), generator=generator)
    held_out = max(1, round(validation_fraction * len(auxiliary)))
    validation, training = auxiliary.images[order[:held_out]], auxiliary.images[order[held_out:]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = Autoencoder(width, depth)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    history = _fit(autoencoder.to(device), training.to(device), validation.to(device), steps, batch_size, learning_rate, patience, generator)
    prior = AnomalyScore(autoencoder.cpu(), provenance=provenance | {"history": history})
    prior.offset = prior.errors(validation).mean().item()
    if path:
        prior.save(path)
    return prior


def _fit(autoencoder, training, validation, steps, batch_size, learning_rate, patience, generator) -> dict[str, list]:
    """Train in place, end with the weights of the lowest validation error, and return the loss curves."""
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best, best_error, waited = copy.deepcopy(autoencoder.state_dict()), float("inf"), 0
    history = {"step": [], "training": [], "validation": []}
    losses = []
    try:
        for step, batch in progress(zip(range(1, steps + 1), _batches(training, batch_size, generator)), total=steps, description="autoencoder"):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(autoencoder(batch), batch)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if step % _EVALUATE_EVERY and step != steps:
                continue
            with torch.no_grad():
                error = nn.functional.mse_loss(autoencoder(validation), validation).item()
            for name, value in zip(history, (step, torch.stack(losses).mean().item(), error)):
                history[name].append(value)
            losses.clear()
            waited += 1
            if error < best_error:
                best, best_error, waited = copy.deepcopy(autoencoder.state_dict()), error, 0
            if waited >= patience:
                break
    except KeyboardInterrupt:
        history["interrupted"] = True
    autoencoder.load_state_dict(best)
    return history


def _batches(images: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled batches; a pass over the images ends with a smaller one if need be."""
    while True:
        yield from images[torch.randperm(len(images), generator=generator).to(images.device)].split(batch_size)
