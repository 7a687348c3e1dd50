"""The operations of a client's backward pass, with derivatives that compute only what
an attack needs.

Autograd differentiates a backward pass by general formulas: some of what they compute
nobody needs here, some with kernels as large as the images, and some in several passes
over a layer where one is enough.
"""

import inspect
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import fold, unfold

_aten = torch.ops.aten


def convolution_backward(
    output_gradient, inputs, weight, bias_sizes, *options, factored: bool = False
) -> list:
    """The gradients by inputs, weight and bias, None where not wanted; with `factored`
    the weight's as its factors, where that pays.
    """
    *options, wanted = options
    factored = factored and wanted[1] and _factors_pay(output_gradient, weight, options)
    computed = [wanted[0], wanted[1] and not factored, wanted[2]]
    found = iter(
        _ConvolutionBackward.apply(output_gradient, inputs, weight, bias_sizes, options, computed)
        if any(computed)
        else ()
    )
    gradients = [next(found) if computes else None for computes in computed]
    if factored:
        gradients[1] = Factored(output_gradient, inputs, options)
    return gradients


class _ConvolutionBackward(Function):
    """A convolution is linear in its inputs and in its weight, so that the derivatives
    of its gradients are convolutions again.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(output_gradient, inputs, weight, bias_sizes, options, wanted):
        gradients = _aten.convolution_backward(
            output_gradient, inputs, weight, bias_sizes, *options, wanted
        )
        return tuple(gradient for gradient in gradients if gradient is not None)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, ctx.options, ctx.wanted = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *directions):
        output_gradient, inputs, weight = ctx.saved_tensors
        directions = iter(directions)
        by_inputs, by_weight, by_bias = (
            next(directions) if wanted else None for wanted in ctx.wanted
        )
        to_output = to_inputs = to_weight = None
        if by_weight is not None:
            to_output = _aten.convolution(inputs, by_weight, by_bias, *ctx.options)
            to_inputs = _aten.convolution_backward(
                output_gradient, inputs, by_weight, None, *ctx.options, [True, False, False]
            )[0]
        elif by_bias is not None:
            to_output = by_bias.view(-1, *[1] * (output_gradient.ndim - 2)).expand_as(
                output_gradient
            )
        if by_inputs is not None:
            along = _aten.convolution(by_inputs, weight, None, *ctx.options)
            to_output = along if to_output is None else along + to_output
            if ctx.needs_input_grad[2]:  # only where local training has moved the weight
                to_weight = _aten.convolution_backward(
                    output_gradient, by_inputs, weight, None, *ctx.options, [False, True, False]
                )[1]
        return to_output, to_inputs, to_weight, None, None, None


@dataclass(frozen=True, eq=False)
class Factored:
    """The gradient g of a convolution's weight as the two matrices that it is the
    product of, for who needs only products with it.

    Where a layer has few positions and many channels, g has more numbers than its
    factors, and ‖g‖² follows from theirs: the trick by which ghost clipping (Li et al.,
    ICLR 2022; layer by layer as in Bu et al., NeurIPS 2022) gets the norm of each
    image's gradient.
    """

    output_gradient: Float[Tensor, "batch channels out_height out_width"]
    inputs: Float[Tensor, "batch input_channels height width"]
    options: list

    def products(
        self, target: Float[Tensor, "channels input_channels kernel_height kernel_width"]
    ) -> tuple[Tensor, Tensor]:
        """⟨g, target⟩ and ‖g‖², without g."""
        return _FactoredProducts.apply(self.output_gradient, self.inputs, target, self.options)[:2]


def _factors_pay(output_gradient: Tensor, weight: Tensor, options: list) -> bool:
    """Whether two products of matrices with as many rows as there are positions take
    fewer multiplications than one with the gradient.
    """
    _, _, _, transposed, _, groups = options
    if transposed or groups > 1 or weight.ndim != 4:
        return False
    positions, channels, inputs = output_gradient[:, 0].numel(), weight.shape[0], weight[0].numel()
    return 2 * positions * (channels + inputs) < channels * inputs


class _FactoredProducts(Function):
    """⟨g, T⟩ = ⟨R, T·C⟩ and ‖g‖² = ⟨RᵀR, CᵀC⟩ of g = R·Cᵀ.

    R is the output gradient and C the patches of the inputs, with a column for each
    position of each image.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(output_gradient, inputs, target, options):
        stride, padding, dilation, *_ = options
        rows = _columns(output_gradient.flatten(2))
        patches = unfold(inputs, target.shape[2:], dilation, padding, stride).unflatten(
            1, (target.shape[1], -1)
        )
        patches = _columns(patches.transpose(1, 2).flatten(1, 2))
        towards, among_rows, among_patches = (
            _matrix(target) @ patches,
            rows.T @ rows,
            patches.T @ patches,
        )
        return (
            (rows * towards).sum(),
            (among_rows * among_patches).sum(),
            rows,
            patches,
            towards,
            among_rows,
            among_patches,
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        output_gradient, images, target, ctx.options = inputs
        ctx.shapes = output_gradient.shape, images.shape
        ctx.save_for_backward(target, *output[2:])
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx, by_product, by_square, *_):
        target, rows, patches, towards, among_rows, among_patches = ctx.saved_tensors
        (batch_size, _, *size), (_, channels, *image_size) = ctx.shapes
        stride, padding, dilation, *_ = ctx.options
        to_rows = towards * by_product + rows @ (among_patches * (2 * by_square))
        to_patches = torch.addmm(
            patches @ (among_rows * (2 * by_square)), _matrix(target).T, rows * by_product
        )
        to_patches = (
            to_patches.unflatten(1, (batch_size, -1))
            .unflatten(0, (-1, channels))
            .transpose(0, 1)
            .flatten(0, 1)
            .movedim(1, 0)
        )
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


def batch_norm_backward(
    output_gradient, inputs, weight, mean, variance, batch_mean, batch_invstd, train, eps, wanted
) -> tuple:
    """The gradients by inputs, weight and bias. In eval mode BatchNorm is affine, which
    autograd's second derivative makes no use of.
    """
    arguments = (
        output_gradient,
        inputs,
        weight,
        mean,
        variance,
        batch_mean,
        batch_invstd,
        train,
        eps,
        wanted,
    )
    if train or weight is None or not all(wanted):
        return _aten.native_batch_norm_backward(*arguments)
    return _BatchNormBackward.apply(
        output_gradient, inputs, weight, mean, variance, batch_mean, batch_invstd, eps
    )


class _BatchNormBackward(Function):
    """In eval mode, with a weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output_gradient, inputs, weight, mean, variance, batch_mean, batch_invstd, eps):
        return _aten.native_batch_norm_backward(
            output_gradient,
            inputs,
            weight,
            mean,
            variance,
            batch_mean,
            batch_invstd,
            False,
            eps,
            [True, True, True],
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, _, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, by_inputs, by_weight, by_bias):
        output_gradient, inputs, weight, mean, variance = ctx.saved_tensors
        invstd = (variance + ctx.eps).rsqrt()
        channelwise = (-1, *[1] * (inputs.ndim - 2))
        affine = _aten.native_batch_norm(
            inputs, by_weight, by_bias, mean, variance, False, 0.0, ctx.eps
        )[0]
        to_output = torch.addcmul(affine, by_inputs, (weight * invstd).view(channelwise))
        to_inputs = output_gradient * (by_weight * invstd).view(channelwise)
        to_weight = None
        if ctx.needs_input_grad[2]:  # only where local training has moved the weight
            to_weight = (by_inputs * output_gradient).sum(dim=(0, *range(2, inputs.ndim))) * invstd
        return to_output, to_inputs, to_weight, *[None] * 5


# ReLU and max-pooling are linear in pieces: the second argument says which piece, and
# the derivative by it is zero. Autograd would add up zeros as large as the layer.


def relu_backward(output_gradient, outputs, threshold):
    return _aten.threshold_backward(output_gradient, outputs.detach(), threshold)


def max_pool_backward(output_gradient, inputs, *options):
    return _aten.max_pool2d_with_indices_backward(output_gradient, inputs.detach(), *options)


# A recording says how a tensor lay in memory, which need not be how it lies when the
# recording runs.


def _reshape(tensor, shape, stride=None):
    return tensor.reshape(shape)


def _as_strided(tensor, *layout):
    return tensor.contiguous().as_strided(*layout)


INSTEAD = {
    _aten.convolution_backward.default: convolution_backward,
    _aten.native_batch_norm_backward.default: batch_norm_backward,
    _aten.threshold_backward.default: relu_backward,
    _aten.max_pool2d_with_indices_backward.default: max_pool_backward,
    _aten.view.default: _reshape,
    _aten._reshape_alias.default: _reshape,
    _aten.as_strided.default: _as_strided,
}
"""What to call in place of an operation of a recorded backward pass."""

for _function in (_ConvolutionBackward, _FactoredProducts, _BatchNormBackward):
    _function.forward.__signature__ = inspect.signature(
        _function.forward
    )  # PyTorch asks for it at every call: a tenth of a millisecond
