"""How close reconstructions come to the private images, and how sure a comparison of
attacks is.

Only this module sees the ground truth. Everything is computed on the CPU, image by
image, on images clamped to [0, 1].
"""

import copy
import warnings
from functools import cache
from importlib.resources import files as package_files

import pandas as pd
import scipy.optimize
import scipy.stats
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from gipip.errors import BatchSizeError
from gipip.federation.models import last_linear
from gipip.files import DATA, read_tensors

Images = Float[Tensor, "batch 3 height width"]
PerImage = Float[Tensor, "batch"]


def evaluate(reconstruction, batch, model: nn.Module | None = None) -> pd.DataFrame:
    """How well each private image was reconstructed: one row per image of `batch`.

    `reconstruction` and `batch`: images in [0, 1], or anything that holds them as
    `.images`. Columns: `image` (index in the batch), `matched` (index of the
    reconstruction assigned to it), `psnr`, `ssim`, `lpips` and, if a model is given,
    `feature_mse`. One assignment serves all metrics (see `match`). Raises
    BatchSizeError for different numbers of images, ValueError for unusable images.
    """
    images, truth = _checked(reconstruction, "reconstruction"), _checked(batch, "batch")
    if len(images) != len(truth):
        raise BatchSizeError(
            f"{len(images)} reconstructed images cannot be matched one to one with {len(truth)} private ones."
        )
    if images.shape != truth.shape:
        raise ValueError(
            f"Reconstructed images of shape {tuple(images.shape[1:])} for private ones of shape {tuple(truth.shape[1:])}."
        )
    matched = match(images, truth)
    images = images[matched]
    columns = {
        "matched": matched,
        "psnr": psnr(images, truth),
        "ssim": ssim(images, truth),
        "lpips": lpips(images, truth),
    }
    if model is not None:
        columns["feature_mse"] = feature_mse(model, images, truth)
    return pd.DataFrame(
        {"image": range(len(truth))} | {name: column.numpy() for name, column in columns.items()}
    )


def _checked(source, role: str) -> Tensor:
    images = getattr(source, "images", source)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"The {role} must hold images as a tensor of shape (batch, 3, height, width); found {found}."
        )
    if not torch.isfinite(images).all():
        raise ValueError(
            f"The {role} holds NaN or infinite values: there is nothing to measure. Look at the attack's cost history."
        )
    low, high = images.min().item(), images.max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(
            f"The {role} has values from {low:.3g} to {high:.3g}; expected images in [0, 1]. Undo the normalisation first."
        )
    return _prepared(images)


def _prepared(images: Tensor) -> Tensor:
    return images.detach().to("cpu", torch.float32).clamp(0, 1)


def match(images: Images, truth: Images) -> Int[Tensor, "batch"]:
    """The one-to-one assignment of least total MSE: `images[match(images, truth)]` is
    aligned to `truth`.

    A gradient does not tell the order of a batch. Taking the best reconstruction for
    every image with replacement would flatter an attack.
    """
    cost = torch.cdist(
        _prepared(truth).flatten(1).double(), _prepared(images).flatten(1).double()
    ).square()
    return torch.from_numpy(scipy.optimize.linear_sum_assignment(cost)[1])


def psnr(images: Images, truth: Images) -> PerImage:
    """Peak signal-to-noise ratio per image in dB, data range 1; at most 100 dB, which
    identical images get, so that means stay finite.
    """
    mse = (_prepared(images) - _prepared(truth)).square().mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(images: Images, truth: Images) -> PerImage:
    """Structural similarity per image (Wang et al. 2004: 11×11 Gaussian window, σ 1.5),
    data range 1; 1 for identical images.
    """
    images, truth = (
        _prepared(images).double(),
        _prepared(truth).double(),
    )  # in float32 flat areas lose three digits
    return (
        structural_similarity_index_measure(images, truth, data_range=1.0, reduction="none")
        .reshape(-1)
        .float()
    )


@torch.no_grad()
def lpips(images: Images, truth: Images) -> PerImage:
    """LPIPS distance per image (Zhang et al. 2018, AlexNet, version 0.1); 0 for
    identical images, lower is better.

    Images of at least 32×32 pixels in [0, 1]; they are mapped to the [−1, 1] that the
    network expects.
    """
    pairs = zip(
        _prepared(images).split(64), _prepared(truth).split(64), strict=True
    )  # 64 at a time bounds the memory
    return torch.cat(
        [_lpips_network()(first, second, normalize=True).reshape(-1) for first, second in pairs]
    )


@cache
def _lpips_network() -> nn.Module:
    """The official network: linear heads from the package `lpips`, AlexNet from gipip's
    data; nothing is downloaded.
    """
    from lpips import LPIPS

    with (
        torch.device("meta"),
        warnings.catch_warnings(),
    ):  # on "meta" no weights are drawn: a weight missing below would fail loudly
        warnings.simplefilter(
            "ignore", UserWarning
        )  # lpips uses torchvision's deprecated argument `pretrained`
        network = LPIPS(pretrained=False, pnet_rand=True, verbose=False)
    trunk, _ = read_tensors(DATA / "lpips-alexnet-trunk.safetensors")
    heads = torch.load(
        package_files("lpips") / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True
    )
    slices = {
        "features.0": "1.0",
        "features.3": "2.3",
        "features.6": "3.6",
        "features.8": "4.8",
        "features.10": "5.10",
    }
    trunk = {
        f"net.slice{slices[layer]}.{kind}": trunk[f"{layer}.{kind}"]
        for layer in slices
        for kind in ("weight", "bias")
    }
    network.load_state_dict(
        trunk | heads, strict=False, assign=True
    )  # not strict: the heads have a second name, lins.*
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
