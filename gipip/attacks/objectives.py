"""The terms that attacks minimise, each a few lines of mathematics."""

from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor


class Gradients(Sequence):
    """The gradient by all parameters of a model, a tensor each; for products one long vector."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.tensors = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index):
        return self.tensors[index]

    @cached_property
    def norm(self) -> Float[Tensor, ""]:
        """‖g‖ over all parameters, in float64."""
        norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in self]
        return torch.linalg.vector_norm(torch.stack(norms))

    def cosine(self, other: "Gradients") -> Float[Tensor, ""]:
        """cos(g, g') of one angle over all parameters concatenated, in float64."""
        return inner(self, other) / (self.norm * other.norm)


def inner(a: Gradients, b: Gradients) -> Float[Tensor, ""]:
    """⟨a, b⟩ over all parameters, added up in float64."""
    return sum((x * y).sum(dtype=torch.float64) for x, y in zip(a, b, strict=True))


def cosine_distance(gradients: Gradients, target: Gradients) -> Float[Tensor, ""]:
    """1 − cos(g, g*), one angle over all parameters (Geiping et al. 2020, eq. 4); in [0, 2]."""
    return (1 - gradients.cosine(target)).to(target[0].dtype)


def squared_distance(gradients: Gradients, target: Gradients) -> Float[Tensor, ""]:
    """Σ (g − g*)² over all parameters (Zhu et al. 2019, eq. 4)."""
    return sum((a - b).square().sum() for a, b in zip(gradients, target, strict=True))


def total_variation(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, ""]:
    """Mean |horizontal difference| + mean |vertical difference| over the whole batch."""
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return horizontal + vertical
