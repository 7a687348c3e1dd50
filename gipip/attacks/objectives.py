"""The terms that attacks minimise, each a few lines of mathematics."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor


def cosine_distance(gradients: Sequence[Tensor], target: Sequence[Tensor]) -> Float[Tensor, ""]:
    """1 − cos(g, g*), one angle over all parameters concatenated (Geiping et al. 2020, eq. 4); in [0, 2]."""
    product = sum((a * b).sum() for a, b in zip(gradients, target, strict=True))
    norm = sum(a.square().sum() for a in gradients).sqrt()
    target_norm = sum(b.square().sum() for b in target).sqrt()
    return 1 - product / (norm * target_norm)


def squared_distance(gradients: Sequence[Tensor], target: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Σ (g − g*)² over all parameters (Zhu et al. 2019, eq. 4)."""
    return sum((a - b).square().sum() for a, b in zip(gradients, target, strict=True))


def total_variation(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """Anisotropic total variation: mean |horizontal difference| + mean |vertical difference| over the whole batch."""
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return horizontal + vertical
