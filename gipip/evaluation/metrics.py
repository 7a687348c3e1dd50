"""How close reconstructions come to the private images.

Only this module sees the ground truth. Everything is computed on the CPU, image by
image, on images clamped to [0, 1].
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import cache, lru_cache, partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from gipip.errors import BatchSizeError, DataError
from gipip.federation.models import Images, last_linear
from gipip.files import DATA, read_tensors

PerImage = Float[Tensor, "batch"]

_SMALLEST = {"ssim": 11, "lpips": 31, "identified": 31}
"""Pixels a side: SSIM's window has eleven, and AlexNet's poolings shrink the rest."""


def evaluate(
    reconstruction: Any, batch: Any, model: nn.Module | None = None, pool: Any = None
) -> pd.DataFrame:
    """How well each private image was reconstructed: one row per image of `batch`.

    `reconstruction` and `batch`: images in [0, 1], or anything that holds them as
    `.images`. Columns: `image` (index in the batch), `matched` (index of the
    reconstruction assigned to it), `psnr`, `ssim`, `ssim_padded`, `lpips`; with a
    `pool`, the images of which the batch is a part, `identified` and `candidates` (the
    pool's size: by chance 1 in so many is identified); with a model, `feature_mse`. One
    assignment serves all metrics (see `match`). Images too small for `ssim` (under
    11×11), `lpips` or `identified` (under 31×31) get NaN there, with one warning.
    Raises BatchSizeError for different numbers of images, DataError for unusable ones
    or a pool without those of the batch.
    """
    images, truth = _checked(reconstruction, "reconstruction"), _checked(batch, "batch")
    if len(images) != len(truth):
        counts = f"{len(images)} reconstructed images cannot be matched one to one with"
        raise BatchSizeError(f"{counts} {len(truth)} private ones.")
    if images.shape != truth.shape:
        shapes = f"{tuple(images.shape[1:])} for private ones of shape {tuple(truth.shape[1:])}"
        raise DataError(f"Reconstructed images of shape {shapes}. Expected the same.")
    matched = match(images, truth)
    images = images[matched]
    metrics = {"psnr": psnr, "ssim": ssim, "ssim_padded": ssim_padded, "lpips": lpips}
    if pool is not None:
        pool = _checked(pool, "pool")
        metrics["identified"] = partial(identified, pool=pool)
        metrics["candidates"] = lambda images, truth: torch.full((len(truth),), len(pool))
    columns = {"matched": matched, **_measured(metrics, images, truth)}
    if model is not None:
        columns["feature_mse"] = feature_mse(model, images, truth)
    table = {"image": range(len(truth))} | {name: each.numpy() for name, each in columns.items()}
    return pd.DataFrame(table)


def _measured(
    metrics: Mapping[str, Callable], images: Images, truth: Images
) -> dict[str, PerImage]:
    side = min(truth.shape[-2:])
    unknown = [name for name in metrics if side < _SMALLEST.get(name, 0)]
    if unknown:
        warnings.warn(f"Too small, {side} pixels, for {' and '.join(unknown)}: NaN.", stacklevel=3)
    nothing = torch.full((len(truth),), torch.nan)
    return {
        name: nothing if name in unknown else metric(images, truth)
        for name, metric in metrics.items()
    }


def _checked(source: Any, role: str) -> Images:
    images = getattr(source, "images", source)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] not in (1, 3):
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        expected = "images as a tensor of shape (batch, 1 or 3, height, width)"
        raise DataError(f"The {role} must hold {expected}; found {found}.")
    if not images.numel():
        raise DataError(f"The {role} holds no images: {tuple(images.shape)}. Give at least one.")
    if not torch.isfinite(images).all():
        nothing = "there is nothing to measure. Look at the attack's cost history"
        raise DataError(f"The {role} holds NaN or infinite values: {nothing}.")
    low, high = images.min().item(), images.max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        expected = "expected images in [0, 1]. Undo the normalisation first"
        raise DataError(f"The {role} has values from {low:.3g} to {high:.3g}; {expected}.")
    return _prepared(images)


def _prepared(images: Tensor) -> Images:
    return images.detach().to("cpu", torch.float32).clamp(0, 1)


def _coloured(images: Tensor) -> Images:
    """Of three channels, as LPIPS takes them; three equal ones of a grey image."""
    return _prepared(images).expand(-1, 3, -1, -1)


def match(images: Images, truth: Images) -> Int[Tensor, "batch"]:
    """The one-to-one assignment of least total MSE: `images[match(images, truth)]` is
    aligned to `truth`.

    A gradient does not tell the order of a batch. Taking the best reconstruction for
    every image with replacement would flatter an attack.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import

    pixels, expected = (_prepared(each).flatten(1).double() for each in (images, truth))
    return torch.from_numpy(linear_sum_assignment(torch.cdist(expected, pixels).square())[1])


def psnr(images: Images, truth: Images) -> PerImage:
    """Peak signal-to-noise ratio per image in dB, data range 1; at most 100 dB, which
    identical images get, so that means stay finite.
    """
    mse = (_prepared(images) - _prepared(truth)).square().mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(images: Images, truth: Images) -> PerImage:
    """Structural similarity per image (Wang et al. 2004: 11×11 Gaussian window, σ 1.5),
    data range 1; 1 for identical images.

    The mean over the places where the whole window is inside the image, as its authors
    take it. DataError under 11×11 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure  # slow to import

    _require_size("ssim", images)
    # in float32 flat areas lose three digits
    images, truth = _prepared(images).double(), _prepared(truth).double()
    _, places = structural_similarity_index_measure(
        images, truth, data_range=1.0, reduction="none", return_full_image=True
    )
    # which border counts in its own mean depends on torchmetrics' version
    return places[..., 5:-5, 5:-5].mean((1, 2, 3)).float()


def ssim_padded(images: Images, truth: Images) -> PerImage:
    """`ssim` as the public code of GIAS and GI-PIP takes it: the image with zeros around
    it, the mean over all its pixels.

    The border, where both images are mostly zeros, makes it higher.
    """
    return ssim(pad(_prepared(images), [5] * 4), pad(_prepared(truth), [5] * 4))


@torch.no_grad()
def lpips(images: Images, truth: Images) -> PerImage:
    """LPIPS distance per image (Zhang et al. 2018, AlexNet, version 0.1); 0 for
    identical images, lower is better. DataError under 31×31 pixels.

    Of images in [0, 1]; they are mapped to the [−1, 1] that the network expects.
    """
    _require_size("lpips", images)
    network = _lpips_network()
    # 64 at a time bounds the memory
    pairs = zip(_coloured(images).split(64), _coloured(truth).split(64), strict=True)
    return torch.cat([network(*pair, normalize=True).reshape(-1) for pair in pairs])


@torch.no_grad()
def pairwise_lpips(
    images: Images, others: Float[Tensor, "others channels height width"]
) -> Float[Tensor, "batch others"]:
    """LPIPS distance, as `lpips`, of each of the images to each of the others.

    What the network makes of the `others` is kept, for up to a thousand of 64×64
    pixels, so that the next images are measured against them quickly.
    """
    _require_size("lpips", images)
    features = _lpips_features(_coloured(images))
    distances = []
    for part in _coloured(others).split(max(1, 2**18 // images[0, 0].numel())):
        kept = _kept_features(part.numpy().tobytes(), part.shape)
        exact = torch.cdist(features, kept, compute_mode="donot_use_mm_for_euclid_dist")
        distances.append(exact.square())
    return torch.cat(distances, dim=1)


def identified(images: Images, truth: Images, pool: Float[Tensor, "pool channels _ _"]) -> PerImage:
    """1 for each image whose nearest of the pool, by LPIPS, is its `truth`; else 0.

    Whether someone who has the pool could tell of whom it is. A copy of the truth in
    the pool counts as it. DataError for a pool without the truth, or under 31×31 pixels.
    """
    pool, truth = _prepared(pool), _prepared(truth)
    fits = pool.shape[1:] == truth.shape[1:]
    if not fits or not all(_equal(pool, image).any() for image in truth):
        expected = "Expected all images among which the batch's are to be told"
        raise DataError(f"The pool does not hold the batch's images. {expected}.")
    nearest = pairwise_lpips(images, pool).argmin(dim=1)
    return _equal(pool[nearest], truth).float()


def _equal(
    images: Images, others: Float[Tensor, "*any channels height width"]
) -> Bool[Tensor, "batch"]:
    return (images == others).flatten(1).all(dim=1)


def _require_size(metric: str, images: Images) -> None:
    if min(images.shape[-2:]) < _SMALLEST[metric]:
        found = "×".join(map(str, images.shape[-2:]))
        needed = f"of at least {_SMALLEST[metric]} pixels a side, not {found}"
        raise DataError(f"{metric} needs images {needed}. Enlarge them, or use psnr.")


@lru_cache(maxsize=16)
def _kept_features(images: bytes, shape: torch.Size) -> Float[Tensor, "batch features"]:
    return _lpips_features(torch.frombuffer(bytearray(images), dtype=torch.float32).view(shape))


def _lpips_features(images: Images) -> Float[Tensor, "batch features"]:
    """A vector for each image; LPIPS is the squared distance of two."""
    from lpips import normalize_tensor

    network = _lpips_network()
    parts = []
    layers = network.net(network.scaling_layer(2 * images - 1))
    for values, head in zip(layers, network.lins, strict=True):
        weights = head.model[-1].weight / values[0, 0].numel()
        parts.append((normalize_tensor(values) * weights.sqrt()).flatten(1))
    return torch.cat(parts, dim=1)


@cache
def _lpips_network() -> Any:
    """The official network: linear heads from the package `lpips`, AlexNet from gipip's
    data; nothing is downloaded.
    """
    from lpips import LPIPS

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # lpips uses torchvision's deprecated argument `pretrained`
        warnings.simplefilter("ignore", UserWarning)
        network = LPIPS(pnet_rand=True, verbose=False)
    weights, _ = read_tensors(DATA / "lpips-alexnet-trunk.safetensors")
    slices = {0: "slice1", 3: "slice2", 6: "slice3", 8: "slice4", 10: "slice5"}
    trunk = {
        f"{slices[layer]}.{layer}.{kind}": weights[f"features.{layer}.{kind}"]
        for layer in slices
        for kind in ("weight", "bias")
    }
    network.net.load_state_dict(trunk)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def feature_mse(model: nn.Module, images: Images, truth: Images) -> PerImage:
    """Mean squared error per image of the features that enter the model's last linear
    layer, in eval mode; the model is left as it is.

    Raises ModelError for a model without a linear layer.
    """
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    _, features = last_linear(model, _prepared(torch.cat([images, truth])))
    reconstructed, private = features.chunk(2)
    return (reconstructed - private).square().mean(1)
