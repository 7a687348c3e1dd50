"""The terms that attacks minimise, each a few lines of mathematics."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from gipip.attacks.engines.derivatives import Factored


def cosine_distance(
    gradients: Sequence[Tensor | Factored],
    target: Sequence[Tensor],
    target_norm: Tensor | None = None,
) -> Float[Tensor, ""]:
    """1 − cos(g, g*), one angle over all parameters concatenated (Geiping et al. 2020,
    eq. 4); in [0, 2].

    `target_norm`: ‖g*‖, when it is known.
    """
    pairs = list(zip(gradients, target, strict=True))
    products = [
        gradient.products(shared) for gradient, shared in pairs if isinstance(gradient, Factored)
    ]
    whole = [pair for pair in pairs if not isinstance(pair[0], Factored)]
    if whole:
        products.append(
            _Products.apply(
                len(whole), *(tensor for side in zip(*whole, strict=True) for tensor in side)
            )
        )
    product, square = map(sum, zip(*products, strict=True))
    return 1 - product / (square.sqrt() * (norm(target) if target_norm is None else target_norm))


def norm(gradients: Sequence[Tensor]) -> Float[Tensor, ""]:
    """‖g‖ over all parameters, without the rounding of millions of sums."""
    norms = torch.stack(
        [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    )
    return torch.linalg.vector_norm(norms).to(gradients[0].dtype)


class _Products(torch.autograd.Function):
    """⟨g, g*⟩ and ‖g‖² of `count` tensors and as many others, summed: autograd would
    pass over millions of numbers three times as often.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(count, *tensors):
        gradients, target = tensors[:count], tensors[count:]
        return torch.stack(list(map(_dot, gradients, target))).sum(), torch.stack(
            list(map(_dot, gradients, gradients))
        ).sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, by_product, by_square):
        gradients, target = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        twice = 2 * by_square
        return (
            None,
            *(
                torch.addcmul(a * twice, b, by_product)
                for a, b in zip(gradients, target, strict=True)
            ),
            *[None] * ctx.count,
        )


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, ""]:
    """Σ a·b, without a product as large as they are, in the order in which a's numbers
    lie in memory.
    """
    if a.ndim > 2:
        order = sorted(range(a.ndim), key=a.stride, reverse=True)
        a, b = a.permute(order), b.permute(order)
    return torch.dot(a.flatten(), b.flatten())


def squared_distance(gradients: Sequence[Tensor], target: Sequence[Tensor]) -> Float[Tensor, ""]:
    """Σ (g − g*)² over all parameters (Zhu et al. 2019, eq. 4)."""
    return sum((a - b).square().sum() for a, b in zip(gradients, target, strict=True))


def total_variation(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """Anisotropic total variation: mean |horizontal difference| + mean |vertical
    difference| over the whole batch.
    """
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return horizontal + vertical
