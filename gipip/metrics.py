"""How close reconstructions come to the private images, and how sure a comparison of attacks is.

Only this module sees the ground truth. Everything is computed on the CPU, image by image, on images clamped to [0, 1].
"""

import copy
import math
import warnings
from functools import cache
from importlib.resources import files as package_files
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import scipy.optimize
import scipy.stats
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from gipip.errors import BatchSizeError
from gipip.files import DATA, read_tensors
from gipip.models import last_linear

Images = Float[Tensor, "batch 3 height width"]
PerImage = Float[Tensor, "batch"]


def evaluate(reconstruction, batch, model: nn.Module | None = None) -> pd.DataFrame:
    """How well each private image was reconstructed: one row per image of `batch`.

    `reconstruction` and `batch`: images in [0, 1], or anything that holds them as `.images`. Columns: `image` (index in the batch),
    `matched` (index of the reconstruction assigned to it), `psnr`, `ssim`, `lpips` and, if a model is given, `feature_mse`. One assignment
    serves all metrics (see `match`). Raises BatchSizeError for different numbers of images, ValueError for unusable images.
    """
    images, truth = _checked(reconstruction, "reconstruction"), _checked(batch, "batch")
    if len(images) != len(truth):
        raise BatchSizeError(f"{len(images)} reconstructed images cannot be matched one to one with {len(truth)} private ones.")
    if images.shape != truth.shape:
        raise ValueError(f"Reconstructed images of shape {tuple(images.shape[1:])} for private ones of shape {tuple(truth.shape[1:])}.")
    matched = match(images, truth)
    images = images[matched]
    columns = {"matched": matched, "psnr": psnr(images, truth), "ssim": ssim(images, truth), "lpips": lpips(images, truth)}
    if model is not None:
        columns["feature_mse"] = feature_mse(model, images, truth)
    return pd.DataFrame({"image": range(len(truth))} | {name: column.numpy() for name, column in columns.items()})


def _checked(source, role: str) -> Tensor:
    images = getattr(source, "images", source)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"The {role} must hold images as a tensor of shape (batch, 3, height, width); found {found}.")
    if not torch.isfinite(images).all():
        raise ValueError(f"The {role} holds NaN or infinite values: there is nothing to measure. Look at the attack's cost history.")
    low, high = images.min().item(), images.max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(f"The {role} has values from {low:.3g} to {high:.3g}; expected images in [0, 1]. Undo the normalisation first.")
    return _prepared(images)


def _prepared(images: Tensor) -> Tensor:
    return images.detach().to("cpu", torch.float32).clamp(0, 1)


def match(images: Images, truth: Images) -> Int[Tensor, "batch"]:
    """The one-to-one assignment of least total MSE: `images[match(images, truth)]` is aligned to `truth`.

    A gradient does not tell the order of a batch. Taking the best reconstruction for every image with replacement would flatter an attack.
    """
    cost = torch.cdist(_prepared(truth).flatten(1).double(), _prepared(images).flatten(1).double()).square()
    return torch.from_numpy(scipy.optimize.linear_sum_assignment(cost)[1])


def psnr(images: Images, truth: Images) -> PerImage:
    """Peak signal-to-noise ratio per image in dB, data range 1; at most 100 dB, which identical images get, so that means stay finite."""
    mse = (_prepared(images) - _prepared(truth)).square().mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(images: Images, truth: Images) -> PerImage:
    """Structural similarity per image (Wang et al. 2004: 11×11 Gaussian window, σ 1.5), data range 1; 1 for identical images."""
    images, truth = _prepared(images).double(), _prepared(truth).double()  # in float32 flat areas lose three digits
    return structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none").reshape(-1).float()


@torch.no_grad()
def lpips(images: Images, truth: Images) -> PerImage:
    """LPIPS distance per image (Zhang et al. 2018, AlexNet, version 0.1); 0 for identical images, lower is better.

    Images of at least 32×32 pixels in [0, 1]; they are mapped to the [−1, 1] that the network expects.
    """
    pairs = zip(_prepared(images).split(64), _prepared(truth).split(64), strict=True)  # 64 at a time bounds the memory
    return torch.cat([_lpips_network()(first, second, normalize=True).reshape(-1) for first, second in pairs])


@cache
def _lpips_network() -> nn.Module:
    """The official network: linear heads from the package `lpips`, AlexNet from gipip's data; nothing is downloaded."""
    from lpips import LPIPS

    with torch.device("meta"), warnings.catch_warnings():  # on "meta" no weights are drawn: a weight missing below would fail loudly
        warnings.simplefilter("ignore", UserWarning)  # lpips uses torchvision's deprecated argument `pretrained`
        network = LPIPS(pretrained=False, pnet_rand=True, verbose=False)
    trunk, _ = read_tensors(DATA / "lpips-alexnet-trunk.safetensors")
    heads = torch.load(package_files("lpips") / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)
    slices = {"features.0": "1.0", "features.3": "2.3", "features.6": "3.6", "features.8": "4.8", "features.10": "5.10"}
    trunk = {f"net.slice{slices[layer]}.{kind}": trunk[f"{layer}.{kind}"] for layer in slices for kind in ("weight", "bias")}
    network.load_state_dict(trunk | heads, strict=False, assign=True)  # not strict: the heads have a second name, lins.*
    return network.eval().requires_grad_(False)


@torch.no_grad()
def feature_mse(model: nn.Module, images: Images, truth: Images) -> PerImage:
    """Mean squared error per image of the features that enter the model's last linear layer, in eval mode; the model is left as it is.

    Raises ModelError for a model without a linear layer.
    """
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    reconstructed, private = _features(model, _prepared(torch.cat([images, truth]))).chunk(2)
    return (reconstructed - private).square().mean(1)


def _features(model: nn.Module, images: Images) -> Float[Tensor, "batch features"]:
    captured = []
    last_linear(model)[1].register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    model(images)
    return captured[0].flatten(1)


class Interval(NamedTuple):
    """A mean, the ends of its bootstrap interval (nan for a single observation) and the number of independent observations."""

    mean: float
    low: float
    high: float
    count: int

    def __format__(self, spec: str) -> str:
        """The three numbers in one format: `f"{interval:.3f}"` gives "0.420 [0.100, 0.750]", or "0.420 (no interval)"."""
        mean, low, high = (format(value, spec or "+.2f").replace("-", "−") for value in self[:3])
        return f"{mean} (no interval)" if math.isnan(self.low) else f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")


def bootstrap_interval(values: ArrayLike, *, groups: ArrayLike | None = None, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of `values` with its percentile bootstrap interval.

    `groups` says which batch each value belongs to: images of a batch are reconstructed together, so whole batches are resampled, and
    `count` is the number of batches. The percentiles are moved outward for small samples (the expanded percentile interval of
    Hesterberg 2015, "What teachers should know about the bootstrap"). One observation or batch has no interval: both ends are nan.
    Raises ValueError for values that are empty or not finite, or groups of another length.
    """
    values = np.asarray(values, dtype=float)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError("An interval needs a one-dimensional, non-empty set of finite values. Look for missing or NaN metrics.")
    if groups.shape != values.shape:
        raise ValueError(f"{len(values)} values but groups of shape {groups.shape}: expected one group a value.")
    totals = pd.Series(values).groupby(groups, dropna=False).agg(["sum", "count"]).to_numpy(float)
    low, high = _resampled_ends(totals, confidence, seed) if len(totals) > 1 else (np.nan, np.nan)
    return Interval(float(values.mean()), float(low), float(high), len(totals))


def _resampled_ends(totals: np.ndarray, confidence: float, seed: int) -> tuple[float, float]:
    """Ends of the bootstrap interval of Σ sums / Σ counts; `totals` has a row (sum, count) per group."""
    count = len(totals)
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, count - 1) * np.sqrt(count / (count - 1))
    result = scipy.stats.bootstrap(
        totals.T,
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        method="percentile",
        confidence_level=2 * scipy.stats.norm.cdf(quantile) - 1,
        batch=1_000,
        rng=np.random.default_rng(seed),
    )
    return result.confidence_interval


def paired_difference(a: ArrayLike, b: ArrayLike, *, groups: ArrayLike | None = None, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Mean of a − b with its bootstrap interval, as `bootstrap_interval`; a[i] and b[i] are two arms' values for the same private image."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape:
        raise ValueError(f"The arms have {a.shape} and {b.shape} values: a paired difference needs the same images in the same order.")
    return bootstrap_interval(a - b, groups=groups, confidence=confidence, seed=seed)


def verdict(difference: Interval) -> Literal["supported", "not supported", "undecided at this scale"]:
    """What an interval says about the claim that the difference is greater than 0.

    Undecided when both signs are possible, or with fewer than six independent observations: five all of one sign happen by chance with
    probability 2/2⁵ > 0.05 (two-sided sign test).
    """
    if difference.count < 6 or difference.low <= 0 < difference.high:
        return "undecided at this scale"
    return "supported" if difference.low > 0 else "not supported"
