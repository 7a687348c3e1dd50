"""From features to images: what the last layer's gradient gives away, made visible by a
decoder that auxiliary images have taught what the features of one client model mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import InstanceOf, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from gipip.data.datasets import LabeledImages
from gipip.errors import UpdateError
from gipip.federation.models import ClientModel, Mode, in_mode, last_linear, model_fingerprint
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
from gipip.progress import progress

Features = Float[Tensor, "batch features"]
_FOLDS = 5
_STRENGTHS = [10.0**power for power in range(-6, 3)]  # of the ridge, relative to the mean variance
_TOGETHER = 8  # images of which a client takes batch statistics


class Decoder(Network):
    """A linear map from `features` numbers to size × size pixels, and a correction by
    convolutions (`width` and 2·`width` channels at a half and a quarter of the size).

    `centre`, `covariance`, `variance`: the features' mean, their covariance and its trace.
    """

    centre: Tensor
    covariance: Tensor

    @validated
    def __init__(self, features: PositiveInt, size: PositiveInt, width: PositiveInt = 32):
        super().__init__()
        self.arguments = {"features": features, "size": size, "width": width}
        self.linear = nn.Linear(features, 3 * size * size)
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("covariance", torch.eye(features))
        half: dict[str, Any] = {"kernel_size": 4, "stride": 2, "padding": 1}
        last = nn.ConvTranspose2d(width, 3, **half)
        self.correction = nn.Sequential(
            nn.Conv2d(3, width, **half),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, **half),
            nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, **half),
            nn.ReLU(),
            last,
        )
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    @property
    def variance(self) -> Float[Tensor, ""]:
        return self.covariance.trace()

    def corrected(self, images: Images) -> Images:
        return images + self.correction(images)

    def forward(self, features: Features) -> Images:
        size = self.arguments["size"]
        return self.corrected(self.linear(features).unflatten(1, (3, size, size))).clamp(0, 1)

    def misfit(self, image_shape: Sequence[int]) -> str:
        size = self.arguments["size"]
        if tuple(image_shape) == (3, size, size) and size % 4 == 0:
            return ""
        taken = f"a decoder of {size} × {size} pixels (a multiple of 4)"
        return f"{taken}, not {'×'.join(map(str, image_shape))}. Train one: gipip.train_decoder."


class FeatureDecoder(Prior):
    """Gives images for the features that `gipip.recover_features` finds.

    It belongs to one client model (`model`: its fingerprint), with BatchNorm in one `mode`.
    """

    kind = "decoder"
    network_class = Decoder
    constants = ("model", "mode")

    decoder: Decoder

    @validated
    def __init__(
        self, decoder: Decoder, model: str, mode: Mode = "eval", provenance: dict | None = None
    ):
        super().__init__(decoder, provenance)
        self.model, self.mode = model, mode

    def forward(self, features: Features) -> Images:
        """Images in [0, 1]."""
        return self.decoder(features)

    def expected(
        self, features: Features, covariance: Float[Tensor, "batch batch"], known: Bool[Tensor, "_"]
    ) -> tuple[Features, Float[Tensor, "batch"]]:
        """Features to expect, given those `known` and the `covariance` of their errors
        between the images, where auxiliary images' features are normally distributed;
        and how much these tell of each image: a share of variance, in [0, 1].
        """
        noise, images = torch.linalg.eigh(covariance)
        spread = self.decoder.covariance.to(covariance)
        variance, directions = torch.linalg.eigh(spread[known][:, known])
        total = variance.clamp(min=1e-12 * variance.max()) + noise.clamp(min=0)[:, None]
        centre = self.decoder.centre.to(covariance)
        away = images.T @ (features - centre)[:, known] @ directions / total
        spread = directions.T @ spread[known]
        told = spread.square().sum(dim=1) / total
        trust = images.square() @ told.sum(dim=1) / self.decoder.variance.to(covariance)
        return centre + images @ away @ spread, trust

    def check_model(self, model: str, mode: Mode) -> None:
        """Raise UpdateError unless it was trained for the client model of this
        fingerprint, in this mode.
        """
        if (model, mode) != (self.model, self.mode):
            raise UpdateError(
                f"The decoder is for another client model, or its features in {self.mode} mode. "
                f"Train one: gipip.train_decoder(model, auxiliary, mode={mode!r})."
            )


@validated
def train_decoder(
    model: InstanceOf[ClientModel],
    auxiliary: InstanceOf[LabeledImages],
    *,
    mode: Mode = "eval",
    copies: PositiveInt = 4,
    width: PositiveInt = 32,
    steps: NonNegativeInt = 2_000,
    batch_size: PositiveInt = 64,
    learning_rate: LearningRate = 2e-3,
    seed: Seed = 0,
    store: Path | str | None = None,
) -> FeatureDecoder:
    """Learn on auxiliary images what the features of one client model look like.

    In closed form, ridge regression from the features to the pixels; its strength is
    the one whose error on a held-out fifth of the images is lowest. Then `steps` steps
    of Adam on convolutions that correct its images. These see only what a regression
    without the image in question makes of it (five folds), and are judged on the
    held-out fifth. With `steps=0` the regression alone, within seconds. Features are
    centred, never divided by their deviations: one that is almost always zero would let
    single auxiliary images show through.

    `copies` of each image are used: as it is, mirrored, then also shifted. `mode`:
    BatchNorm's, in the updates to be attacked. `store`: as of
    `gipip.train_autoencoder`. Raises DataError for images or settings that cannot be
    used, ModelError for a model without a linear last layer.
    """
    settings = {
        "mode": mode,
        "copies": copies,
        "width": width,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "model": model_fingerprint(model),
    }
    return trained(DecoderTraining, auxiliary, store, given=(model,), **settings)


class DecoderTraining(Training[FeatureDecoder]):
    """Ridge regression, then Adam on the convolutions, judged by the error on held-out images."""

    prior = FeatureDecoder
    measure = "validation"
    every = 100

    network: Decoder

    def __init__(self, auxiliary: LabeledImages, settings: Mapping[str, Any], model: ClientModel):
        self.settings = settings
        self.random = torch.Generator().manual_seed(settings["seed"])
        images = augmented(auxiliary.images, settings["copies"], self.random)
        features = features_of(model, images, settings["mode"], self.random)
        folds = torch.randperm(len(auxiliary), generator=self.random) % _FOLDS
        regression = Ridge(features, images.flatten(1), folds.repeat(settings["copies"]))
        network = Decoder(features.shape[1], images.shape[-1], settings["width"])
        network.linear.load_state_dict(regression.solution())
        network.centre, network.covariance = regression.centre, regression.covariance
        super().__init__(network.to(self.device), auxiliary)
        wanted = range(_FOLDS) if settings["steps"] else [0]  # the held-out fold
        self.blurred = regression.out_of_fold(wanted).view(images.shape)
        self.images, self.training = images, (regression.folds > 0).nonzero().squeeze(1)
        self.held_out = (regression.folds == 0).nonzero().squeeze(1)
        self.optimizer = torch.optim.Adam(
            network.correction.parameters(), lr=settings["learning_rate"]
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, max(settings["steps"], 1)
        )

    def advance(self) -> None:
        chosen = torch.randint(
            len(self.training), (self.settings["batch_size"],), generator=self.random
        )
        self.optimizer.zero_grad()
        self.error(self.training[chosen]).backward()
        self.optimizer.step()
        self.schedule.step()

    def error(self, rows: Int[Tensor, "rows"]) -> Float[Tensor, ""]:
        blurred, images = self.blurred[rows].to(self.device), self.images[rows].to(self.device)
        return nn.functional.mse_loss(self.network.corrected(blurred), images)

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        parts = self.held_out.split(500)
        errors = [self.error(rows).item() * len(rows) for rows in parts]
        return {"validation": sum(errors) / len(self.held_out)}

    def finish(self) -> FeatureDecoder:
        return FeatureDecoder(self.network.cpu(), self.settings["model"], self.settings["mode"])


class Ridge:
    """Ridge regression from features to pixels on all but one fold of the images, for each fold."""

    def __init__(self, features: Features, pixels: Float[Tensor, "batch pixels"], folds: Tensor):
        self.centre, self.mean = features.mean(dim=0), pixels.mean(dim=0)
        self.features, self.pixels, self.folds = features - self.centre, pixels - self.mean, folds
        parts = [(self.features[folds == k], self.pixels[folds == k]) for k in range(_FOLDS)]
        self.grams = [part.double().T @ part.double() for part, _ in parts]
        self.products = [(part.T @ pixels).double() for part, pixels in parts]
        self.strength = min(_STRENGTHS, key=self.error)

    def equations(self, strength: float, without: int | None = None) -> tuple[Tensor, Tensor]:
        """The normal equations of the regression on all folds, or all but one: the
        Cholesky factor of their left side, and their right side.
        """
        used = [k for k in range(_FOLDS) if k != without]
        gram = torch.stack([self.grams[k] for k in used]).sum(dim=0)
        product = torch.stack([self.products[k] for k in used]).sum(dim=0)
        gram = gram + strength * gram.diagonal().mean() * torch.eye(len(gram))
        return torch.linalg.cholesky(gram), product

    def weights(self, strength: float, without: int | None = None) -> Float[Tensor, "features _"]:
        left, right = self.equations(strength, without)
        return torch.cholesky_solve(right, left).float()

    def error(self, strength: float) -> float:
        """On the first fold, of the regression without it."""
        rows = self.folds == 0
        left, right = self.equations(strength, without=0)
        solved = torch.cholesky_solve(self.features[rows].double().T, left)  # fewer than the pixels
        return (solved.T @ right - self.pixels[rows]).square().mean().item()

    def solution(self) -> dict[str, Tensor]:
        """Weights and bias of the linear map, from all folds."""
        weight = self.weights(self.strength).T
        return {"weight": weight, "bias": self.mean - weight @ self.centre}

    @property
    def covariance(self) -> Float[Tensor, "features features"]:
        """Of the features."""
        return (torch.stack(self.grams).sum(dim=0) / len(self.features)).float()

    def out_of_fold(self, wanted: Iterable[int]) -> Float[Tensor, "batch pixels"]:
        """The pixels of each image of the folds `wanted`, by the regression without its fold."""
        made = torch.zeros_like(self.pixels)
        for fold in wanted:
            rows = self.folds == fold
            made[rows] = self.features[rows] @ self.weights(self.strength, fold) + self.mean
        return made


def augmented(
    images: Images, copies: int, random: torch.Generator
) -> Float[Tensor, "more 3 height width"]:
    """The images, mirrored ones, and further ones shifted by up to a sixteenth, every
    other one of them mirrored: `copies` times as many.
    """
    side, reach = images.shape[-1], images.shape[-1] // 16
    padded = nn.functional.pad(images, [reach] * 4, mode="replicate")
    made = []
    for number in range(copies):
        down, right = reach, reach
        if number > 1:
            down, right = torch.randint(2 * reach + 1, (2,), generator=random).tolist()
        moved = padded[:, :, down : down + side, right : right + side]
        made.append(moved.flip(3) if number % 2 else moved)
    return torch.cat(made)


@torch.no_grad()
def features_of(
    model: ClientModel, images: Images, mode: Mode, random: torch.Generator
) -> Features:
    """What enters the model's last layer; in train mode of random batches."""
    model = in_mode(model, mode)
    order = torch.arange(len(images))
    if mode == "train":
        order = torch.randperm(len(images), generator=random)
    parts = order.split(_TOGETHER if mode == "train" else 100)
    found = []
    for rows in progress(parts, description="features", unit="batch"):
        inputs = model.normalize(images[rows].to(next(model.parameters())))
        found.append(last_linear(model.network, inputs)[1].float().cpu())
    return torch.cat(found)[order.argsort()]
