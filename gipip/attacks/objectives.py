"""The terms that attacks minimise, each a few lines of mathematics."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def cosine_distance(gradients: Sequence[Tensor], target: Sequence[Tensor], target_norm: Tensor | None = None) -> Float[Tensor, ""]:
    """1 − cos(g, g*), one angle over all parameters concatenated (Geiping et al. 2020, eq. 4); in [0, 2].

    `target_norm`: ‖g*‖, when it is known.
    """
    if target_norm is None:
        target_norm = norm(target)
    return _CosineDistance.apply(target_norm, len(gradients), *gradients, *target)[0]


def norm(gradients: Sequence[Tensor]) -> Float[Tensor, ""]:
    """‖g‖ over all parameters."""
    return sum(map(_dot, gradients, gradients)).sqrt()


class _CosineDistance(torch.autograd.Function):
    """With its derivative (cos·g/‖g‖ − g*/‖g*‖) / ‖g‖ written out: autograd's would pass over millions of numbers three times as often."""

    generate_vmap_rule = True

    @staticmethod
    def forward(target_norm, count, *tensors):
        pairs = [(_dot(a, b), _dot(a, a)) for a, b in zip(tensors[:count], tensors[count:], strict=True)]
        product, square = map(sum, zip(*pairs, strict=True))
        cosine = product / (square.sqrt() * target_norm)
        return 1 - cosine, cosine, square.sqrt()

    @staticmethod
    def setup_context(ctx, inputs, output):
        target_norm, ctx.count, *tensors = inputs
        ctx.save_for_backward(target_norm, *output[1:], *tensors)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, weight, *_):
        target_norm, cosine, own_norm, *tensors = ctx.saved_tensors
        along, towards = weight * cosine / own_norm.square(), -weight / (own_norm * target_norm)
        pairs = zip(tensors[: ctx.count], tensors[ctx.count :], strict=True)
        return None, None, *(torch.addcmul(a * along, b, towards) for a, b in pairs), *[None] * ctx.count


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, ""]:
    """Σ a·b, without a product as large as they are."""
    return torch.dot(a.flatten(), b.flatten())


def squared_distance(gradients: Sequence[Tensor], target: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Σ (g − g*)² over all parameters (Zhu et al. 2019, eq. 4)."""
    return sum((a - b).square().sum() for a, b in zip(gradients, target, strict=True))


def total_variation(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """Anisotropic total variation: mean |horizontal difference| + mean |vertical difference| over the whole batch."""
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return horizontal + vertical
