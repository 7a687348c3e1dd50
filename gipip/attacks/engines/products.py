"""Products with a gradient that is not formed where its two factors have fewer numbers."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import fold, unfold

from gipip.attacks.objectives import Gradients

_BLOCK = 2**14  # numbers that are added up in float32: enough for speed, few enough for precision


@dataclass(frozen=True, eq=False)
class Factored:
    """The gradient g of a convolution's weight as the two matrices that it is the product of.

    Where a layer has few positions and many channels, g has more numbers than its
    factors, and ‖g‖² follows from theirs: the trick by which ghost clipping (Li et al.,
    ICLR 2022; layer by layer as in Bu et al., NeurIPS 2022) gets the norm of each
    image's gradient.
    """

    output_gradient: Float[Tensor, "batch channels out_height out_width"]
    inputs: Float[Tensor, "batch input_channels height width"]
    shape: torch.Size
    options: list

    @staticmethod
    def pays(output_gradient: Tensor, weight: Tensor, options: list) -> bool:
        """Whether two products of matrices with a row a position take fewer multiplications."""
        *_, transposed, _, groups = options
        if transposed or groups > 1 or weight.ndim != 4:
            return False
        positions, channels = output_gradient[:, 0].numel(), weight.shape[0]
        inputs = weight[0].numel()
        return 2 * positions * (channels + inputs) < channels * inputs

    def products(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """⟨g, target⟩ and ‖g‖², without g."""
        return _FactoredProducts.apply(self.output_gradient, self.inputs, target, self.options)

    def formed(self) -> Tensor:
        """g itself."""
        weight = self.inputs.new_empty(self.shape)
        wanted = [False, True, False]
        return torch.ops.aten.convolution_backward(
            self.output_gradient, self.inputs, weight, None, *self.options, wanted
        )[1]


class PartlyFactored(Gradients):
    """Gradients of which some are formed only for those who look at them."""

    def __init__(self, parts: Iterable[Tensor | Factored]):
        self.parts = tuple(parts)

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:  # type: ignore[override]
        return tuple(part.formed() if isinstance(part, Factored) else part for part in self.parts)

    def cosine(self, other: Gradients) -> Float[Tensor, ""]:
        pairs = list(zip(self.parts, other, strict=True))
        found = [part.products(target) for part, target in pairs if isinstance(part, Factored)]
        whole = [pair for pair in pairs if isinstance(pair[0], Tensor)]
        if whole:
            gradients, target = zip(*whole, strict=True)
            found.append(_Products.apply(len(whole), *gradients, *target))
        product, square = (sum(values) for values in zip(*found, strict=True))
        return product / (square.sqrt() * other.norm)


class _Products(Function):
    """⟨g, g*⟩ and ‖g‖² of `count` tensors and as many others, added up in float64.

    Autograd would pass over millions of numbers three times as often.
    """

    @staticmethod
    def forward(ctx, count, *tensors):
        ctx.count = count
        ctx.save_for_backward(*tensors)
        gradients, target = tensors[:count], tensors[count:]
        product = sum(map(_dot, gradients, target))
        return product, sum(map(_dot, gradients, gradients))

    @staticmethod
    def backward(ctx, by_product, by_square):
        gradients, target = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        once, twice = by_product.to(target[0]), 2 * by_square.to(target[0])
        pairs = zip(gradients, target, strict=True)
        return None, *(torch.addcmul(a * twice, b, once) for a, b in pairs), *[None] * ctx.count


def _dot(a: Tensor, b: Tensor) -> Float[Tensor, ""]:
    """Σ a·b in float64, without a product as large as they are, in the order of a's memory."""
    if a.ndim > 2:
        order = sorted(range(a.ndim), key=a.stride, reverse=True)
        a, b = a.permute(order), b.permute(order)
    size = a.numel() if a.is_cuda else _BLOCK  # a GPU adds up in many blocks by itself
    blocks = zip(a.flatten().split(size), b.flatten().split(size), strict=True)
    return torch.stack([torch.dot(x, y) for x, y in blocks]).sum(dtype=torch.float64)


class _FactoredProducts(Function):
    """⟨g, T⟩ = ⟨R, T·C⟩ and ‖g‖² = ⟨RᵀR, CᵀC⟩ of g = R·Cᵀ, added up in float64.

    R is the output gradient and C the patches of the inputs, with a column for each
    position of each image.
    """

    @staticmethod
    def forward(ctx, output_gradient, inputs, target, options):
        stride, padding, dilation, *_ = options
        rows = _columns(output_gradient.flatten(2))
        patches = unfold(inputs, target.shape[2:], dilation, padding, stride)
        patches = patches.unflatten(1, (target.shape[1], -1)).transpose(1, 2).flatten(1, 2)
        patches = _columns(patches)
        towards, among_rows = _matrix(target) @ patches, rows.T @ rows
        among_patches = patches.T @ patches
        ctx.options, ctx.shapes = options, (output_gradient.shape, inputs.shape)
        ctx.save_for_backward(target, rows, patches, towards, among_rows, among_patches)
        product = (rows * towards).sum(dtype=torch.float64)
        return product, (among_rows * among_patches).sum(dtype=torch.float64)

    @staticmethod
    def backward(ctx, by_product, by_square):
        target, rows, patches, towards, among_rows, among_patches = ctx.saved_tensors
        (batch_size, _, *size), (_, channels, *image_size) = ctx.shapes
        stride, padding, dilation, *_ = ctx.options
        once, twice = by_product.to(rows), 2 * by_square.to(rows)
        to_rows = towards * once + rows @ (among_patches * twice)
        to_patches = torch.addmm(patches @ (among_rows * twice), _matrix(target).T, rows * once)
        to_patches = to_patches.unflatten(1, (batch_size, -1)).unflatten(0, (-1, channels))
        to_patches = to_patches.transpose(0, 1).flatten(0, 1).movedim(1, 0)
        to_inputs = fold(to_patches, image_size, target.shape[2:], dilation, padding, stride)
        return to_rows.unflatten(1, (batch_size, *size)).movedim(1, 0), to_inputs, None, None


def _columns(
    layer: Float[Tensor, "batch channels positions"],
) -> Float[Tensor, "channels batch*positions"]:
    return layer.movedim(0, 1).flatten(1)


def _matrix(
    weight: Float[Tensor, "channels input_channels kernel_height kernel_width"],
) -> Float[Tensor, "channels patch"]:
    """A view of the weight, where its channels come last in memory."""
    return weight.movedim(1, -1).flatten(1)
