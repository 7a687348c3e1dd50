"""The anomaly score of GI-PIP: the reconstruction error of an autoencoder trained on a
few auxiliary images.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gipip.data.datasets import LabeledImages
from gipip.errors import DamagedFileError, DataError, GipipError, UpdateError
from gipip.files import fingerprint, read_tensors, shipped, write_tensors
from gipip.priors.training import kept, seeded, told
from gipip.progress import progress

_EVALUATE_EVERY = 100


class Autoencoder(nn.Module):
    """`depth` convolutions (kernel 4, stride 2) that double the channels from `width`,
    mirrored, with a sigmoid at the end.

    Width 12 and depth 3 are GI-PIP's network for CIFAR-10 and ImageNet at 64×64: its
    code has a quarter of the input's numbers. Images in [0, 1], sides divisible by
    2**depth.
    """

    def __init__(self, width: int = 12, depth: int = 3):
        super().__init__()
        channels = [3, *(width * 2**level for level in range(depth))]
        pairs = list(itertools.pairwise(channels))
        down = [
            layer
            for i, o in pairs
            for layer in (nn.Conv2d(i, o, kernel_size=4, stride=2, padding=1), nn.ReLU())
        ]
        up = [
            layer
            for i, o in reversed(pairs)
            for layer in (nn.ConvTranspose2d(o, i, kernel_size=4, stride=2, padding=1), nn.ReLU())
        ]
        self.layers = nn.Sequential(*down, *up[:-1], nn.Sigmoid())
        self.width, self.depth = width, depth

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        return self.layers(images)


class AnomalyScore(nn.Module):
    """AS(x) = |MSE(x, AE(x)) − c| (Sun et al. 2024): how far an image's reconstruction
    error is from that of natural images.

    `offset` is c. `provenance` says how the autoencoder was trained (data, settings,
    losses) and travels with the weights.
    """

    def __init__(
        self, autoencoder: Autoencoder, offset: float = 0.0, provenance: dict | None = None
    ):
        super().__init__()
        self.autoencoder = (
            autoencoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        )  # a fifth less time on a CPU
        self.offset = float(offset)
        self.provenance = provenance or {}

    def errors(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch"]:
        """Mean squared reconstruction error of each image in [0, 1]; DataError for images
        whose sides the autoencoder cannot halve.
        """
        if reason := self._misfit(images.shape):
            raise DataError(f"These images cannot be scored: {reason}")
        return (self.autoencoder(images) - images).square().mean(dim=(1, 2, 3))

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        per: Literal["image", "batch"] = "image",
    ) -> Float[Tensor, "scores"]:
        """Scores ≥ 0 of images in [0, 1]: one an image, or (the reference's form) one
        of the whole batch's mean error.
        """
        errors = self.errors(images)
        return (
            (errors if per == "image" else errors.mean(dim=0, keepdim=True)) - self.offset
        ).abs()

    def check(self, image_shape: Sequence[int]) -> None:
        """Raise UpdateError unless images of this shape, (3, height, width), can be scored."""
        if self._misfit(image_shape):
            raise UpdateError(
                f"This anomaly score does not fit the update: {self._misfit(image_shape)}"
            )

    def _misfit(self, image_shape: Sequence[int]) -> str:
        """Why images of this shape cannot be scored; empty if they can."""
        depth, (height, width) = self.autoencoder.depth, image_shape[-2:]
        if not (height % 2**depth or width % 2**depth):
            return ""
        return (
            f"an autoencoder of depth {depth} halves images {depth} times, so their sides must be "
            f"divisible by {2**depth}, but they are of {height}×{width}. Train another: "
            "gipip.train_autoencoder(…, depth=…)."
        )

    def with_offset(self, offset: float) -> "AnomalyScore":
        """The same autoencoder with another c, e.g. 0, or 0.001 as GI-PIP released it
        for CIFAR-10.
        """
        return AnomalyScore(self.autoencoder, offset, self.provenance)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the offset."""
        return fingerprint(self.state_dict(), repr(self.offset))

    def save(self, path: Path | str) -> Path:
        """Write weights, offset and provenance to one safetensors file."""
        shape = {"width": self.autoencoder.width, "depth": self.autoencoder.depth}
        metadata = {"autoencoder": shape, "offset": self.offset, "provenance": self.provenance}
        return write_tensors(path, self.autoencoder.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path | str) -> "AnomalyScore":
        """Read what `save` wrote; DamagedFileError when the file is corrupt or holds
        something else.
        """
        tensors, metadata = read_tensors(path)
        try:
            autoencoder = Autoencoder(**metadata["autoencoder"])
            autoencoder.load_state_dict(tensors)
            return cls(autoencoder, metadata["offset"], metadata["provenance"])
        except (KeyError, TypeError, RuntimeError) as error:
            advice = "Train one: gipip train autoencoder."
            problem = f"{path} does not hold an autoencoder ({error})"
            raise DamagedFileError(f"{problem}. {advice}") from error


def load_prior(name: str = "cifar10") -> AnomalyScore:
    """An anomaly score that ships with gipip: "cifar10" is trained on the 1,900
    embedded auxiliary images; see data/README.md for more.

    Raises DataError when there is none of that name.
    """
    return AnomalyScore.load(
        shipped("autoencoder", name, "Train one: gipip.train_autoencoder(data.auxiliary()).")
    )


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
    """Train an autoencoder on auxiliary images and calibrate the offset c to its mean
    error on held-out ones.

    A `validation_fraction` of the images is held out: the weights of the lowest
    validation error are kept, and training stops early after `patience` evaluations
    (one every 100 steps) without a better one. Adam, learning rate falling to zero
    along a cosine. Ctrl-C keeps the best weights so far. With a `store` (a folder) a
    finished training of the same settings on the same images is loaded instead of
    repeated. Raises DataError for images the autoencoder cannot be trained on,
    GipipError when the training diverges.
    """
    provenance = told(auxiliary, locals())
    path = kept(store, provenance)
    if path and path.exists():
        return AnomalyScore.load(path)
    _check_images(auxiliary, depth)
    generator = torch.Generator().manual_seed(seed)
    training, validation = _split(auxiliary, validation_fraction, generator)
    with seeded(seed):
        autoencoder = Autoencoder(width, depth)
    course = _fit(
        autoencoder, training, validation, steps, batch_size, learning_rate, patience, generator
    )
    outcome = {"history": course.history} | ({"interrupted": True} if course.interrupted else {})
    prior = AnomalyScore(autoencoder.cpu(), provenance=provenance | outcome)
    prior.offset = prior.errors(validation).mean().item()
    if path and not course.interrupted:
        prior.save(path)
    return prior


def _check_images(auxiliary: LabeledImages, depth: int) -> None:
    height, width = auxiliary.pixels.shape[-2:]
    if len(auxiliary) < 2:
        raise DataError(
            f"An autoencoder cannot be trained on {len(auxiliary)} images: one is held out. "
            "Give at least 2, better 1,000."
        )
    if height % 2**depth or width % 2**depth:
        raise DataError(
            f"The sides of images of {height}×{width} pixels must be divisible by 2**depth = "
            f"{2**depth}. Resize them."
        )


def _split(
    auxiliary: LabeledImages, validation_fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Training and validation images, at least one of each."""
    order = torch.randperm(len(auxiliary), generator=generator)
    held_out = min(max(1, round(validation_fraction * len(auxiliary))), len(auxiliary) - 1)
    return auxiliary[order[held_out:]].images, auxiliary[order[:held_out]].images


@dataclass(eq=False)
class _Course:
    """The course of a training: loss curves, and the weights of the lowest validation error."""

    best: dict[str, Tensor]
    best_error: float = float("inf")
    evaluations_since_best: int = 0
    interrupted: bool = False
    history: dict[str, list] = field(
        default_factory=lambda: {"step": [], "training": [], "validation": []}
    )

    def evaluate(
        self, autoencoder: Autoencoder, step: int, losses: list[Tensor], validation: Tensor
    ) -> None:
        """Note the mean of the training losses since the last evaluation and the
        validation error; empties `losses`.
        """
        with torch.no_grad():
            error = nn.functional.mse_loss(autoencoder(validation), validation).item()
        for name, value in {
            "step": step,
            "training": torch.stack(losses).mean().item(),
            "validation": error,
        }.items():
            self.history[name].append(value)
        losses.clear()
        self.evaluations_since_best += 1
        if error < self.best_error:
            self.best, self.best_error, self.evaluations_since_best = (
                copy.deepcopy(autoencoder.state_dict()),
                error,
                0,
            )


def _fit(
    autoencoder, training, validation, steps, batch_size, learning_rate, patience, generator
) -> _Course:
    """Train in place, on the GPU if there is one, and end with the weights of the
    lowest validation error.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    autoencoder, training, validation = (
        autoencoder.to(device),
        training.to(device),
        validation.to(device),
    )
    course, losses, step = _Course(copy.deepcopy(autoencoder.state_dict())), [], 0
    batches = _batches(training, batch_size, generator)
    try:
        for step, loss in enumerate(_losses(autoencoder, batches, steps, learning_rate), start=1):
            losses.append(loss)
            if step % _EVALUATE_EVERY == 0 or step == steps:
                course.evaluate(autoencoder, step, losses, validation)
            if course.evaluations_since_best >= patience:
                break
    except KeyboardInterrupt:
        course.interrupted = True
        if losses:
            course.evaluate(autoencoder, step, losses, validation)
    if step and not math.isfinite(course.best_error):
        diverged = f"its error is not finite after {step} steps"
        advice = "Use a smaller learning_rate."
        raise GipipError(f"The autoencoder's training diverged: {diverged}. {advice}")
    autoencoder.load_state_dict(course.best)
    return course


def _losses(
    autoencoder: Autoencoder, batches: Iterator[Tensor], steps: int, learning_rate: float
) -> Iterator[Tensor]:
    """Take `steps` steps of Adam; gives each one's loss."""
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in progress(
        itertools.islice(batches, steps), total=steps, description="autoencoder", unit="step"
    ):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(autoencoder(batch), batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.detach()


def _batches(images: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless shuffled batches; a pass over the images ends with a smaller one if need be."""
    while True:
        yield from images[torch.randperm(len(images), generator=generator).to(images.device)].split(
            batch_size
        )
