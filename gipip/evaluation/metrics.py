"""How close reconstructions come to the private images.

Only here is the ground truth seen. Everything is computed on the CPU, image by image, on images
clamped to [0, 1].
"""

import copy
import warnings
from functools import cache
from importlib.resources import files as package_files

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gipip.errors import BatchSizeError
from gipip.federation.models import Images, last_linear
from gipip.files import DATA, read_tensors

PerImage = Float[Tensor, "batch"]
_LPIPS_SIDE = 32  # pixels that AlexNet needs at least


def evaluate(reconstruction, batch, model: nn.Module | None = None) -> pd.DataFrame:
    """How well each private image was reconstructed: one row per image of `batch`.

    `reconstruction` and `batch`: images in [0, 1], or anything that holds them as `.images`.
    Columns: `image` (index in the batch), `matched` (index of the reconstruction assigned to it),
    `psnr`, `ssim`, `lpips` (nan, with a warning, for images of fewer than 32 pixels a side) and, if
    a model is given, `feature_mse`. One assignment serves all metrics (see `match`). Raises
    BatchSizeError for different numbers of images, ValueError for unusable images.
    """
    images, truth = _checked(reconstruction, "reconstruction"), _checked(batch, "batch")
    if len(images) != len(truth):
        raise BatchSizeError(
            f"{len(images)} reconstructed images cannot be matched one to one with {len(truth)} "
            "private ones."
        )
    if images.shape != truth.shape:
        shapes = f"{tuple(images.shape[1:])} for private ones of shape {tuple(truth.shape[1:])}"
        raise ValueError(f"Reconstructed images of shape {shapes}.")
    matched = match(images, truth)
    images = images[matched]
    columns = {
        "matched": matched,
        "psnr": psnr(images, truth),
        "ssim": ssim(images, truth),
        "lpips": _lpips_or_nan(images, truth),
    }
    if model is not None:
        columns["feature_mse"] = feature_mse(model, images, truth)
    values = {name: column.numpy() for name, column in columns.items()}
    return pd.DataFrame({"image": range(len(truth)), **values})


def _checked(source, role: str) -> Tensor:
    images = getattr(source, "images", source)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        found = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        expected = "images as a tensor of shape (batch, 3, height, width)"
        raise ValueError(f"The {role} must hold {expected}; found {found}.")
    if not torch.isfinite(images).all():
        advice = "There is nothing to measure: look at the attack's cost history."
        raise ValueError(f"The {role} holds NaN or infinite values. {advice}")
    low, high = images.min().item(), images.max().item()
    if low < -1e-4 or high > 1 + 1e-4:
        raise ValueError(
            f"The {role} has values from {low:.3g} to {high:.3g}; expected images in [0, 1]. "
            "Undo the normalisation first."
        )
    return _prepared(images)


def _prepared(images: Tensor) -> Tensor:
    return images.detach().to("cpu", torch.float32).clamp(0, 1)


def match(images: Images, truth: Images) -> Int[Tensor, "batch"]:
    """The one-to-one assignment of least total MSE: `images[match(images, truth)]` fits `truth`.

    A gradient does not tell the order of a batch. Taking the best reconstruction for every image
    with replacement would flatter an attack.
    """
    from scipy.optimize import linear_sum_assignment  # takes a moment to import

    ours, private = (_prepared(batch).flatten(1).double() for batch in (images, truth))
    return torch.from_numpy(linear_sum_assignment(torch.cdist(private, ours).square())[1])


def psnr(images: Images, truth: Images) -> PerImage:
    """Peak signal-to-noise ratio per image in dB, data range 1.

    At most 100 dB, which identical images get, so that means stay finite.
    """
    mse = (_prepared(images) - _prepared(truth)).square().mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()


def ssim(images: Images, truth: Images) -> PerImage:
    """Structural similarity per image (Wang et al. 2004: 11×11 Gaussian window, σ 1.5), data range
    1; 1 for identical images.
    """
    # Takes seconds to import.
    from torchmetrics.functional.image import structural_similarity_index_measure as similarity

    # In float32 flat areas would lose three digits.
    pair = _prepared(images).double(), _prepared(truth).double()
    found = similarity(*pair, data_range=1.0, reduction="none")
    assert isinstance(found, Tensor), "without options it is a tensor"
    return found.reshape(-1).float()


@torch.no_grad()
def lpips(images: Images, truth: Images) -> PerImage:
    """LPIPS distance per image (Zhang et al. 2018, AlexNet, version 0.1); 0 for identical images,
    lower is better.

    Images in [0, 1]; they are mapped to the [−1, 1] that the network expects. Raises ValueError for
    fewer than 32 pixels a side.
    """
    if min(images.shape[-2:]) < _LPIPS_SIDE:
        size = "×".join(map(str, images.shape[-2:]))
        raise ValueError(f"LPIPS is defined from 32×32 pixels on; these images have {size}.")
    parts = zip(_prepared(images).split(64), _prepared(truth).split(64), strict=True)
    found = [_lpips_network()(*pair, normalize=True).reshape(-1) for pair in parts]
    return torch.cat(found)  # 64 at a time bounds the memory


def _lpips_or_nan(images: Images, truth: Images) -> PerImage:
    try:
        return lpips(images, truth)
    except ValueError as error:
        warnings.warn(f"{error} The column lpips is nan.", stacklevel=3)
        return torch.full((len(images),), torch.nan)


@cache
def _lpips_network() -> nn.Module:
    """The official network: linear heads from the package `lpips`, AlexNet from gipip's data;
    nothing is downloaded.
    """
    from lpips import LPIPS

    with torch.device("meta"), warnings.catch_warnings():  # draws no weights
        warnings.simplefilter("ignore", UserWarning)  # torchvision deprecates what lpips calls
        network = LPIPS(pretrained=False, pnet_rand=True, verbose=False)
    heads = package_files("lpips") / "weights/v0.1/alex.pth"
    weights = torch.load(str(heads), map_location="cpu", weights_only=True)
    trunk, _ = read_tensors(DATA / "lpips-alexnet-trunk.safetensors")
    for layer, place in {0: "1.0", 3: "2.3", 6: "3.6", 8: "4.8", 10: "5.10"}.items():
        for kind in ("weight", "bias"):
            weights[f"net.slice{place}.{kind}"] = trunk[f"features.{layer}.{kind}"]
    # Not strict, as the heads have a second name, lins.*; what is missing would fail on "meta".
    network.load_state_dict(weights, strict=False, assign=True)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def feature_mse(model: nn.Module, images: Images, truth: Images) -> PerImage:
    """Mean squared error per image of the features that enter the model's last linear layer, in
    eval mode; the model is left as it is.

    Raises ModelError for a model without a linear layer.
    """
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    _, features = last_linear(model, _prepared(torch.cat([images, truth])))
    reconstructed, private = features.chunk(2)
    return (reconstructed - private).square().mean(1)
