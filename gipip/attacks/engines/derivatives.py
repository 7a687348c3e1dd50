"""The operations of a client's backward pass, with derivatives that compute only what is needed.

Autograd differentiates a backward pass by general formulas: some of what they compute
nobody needs here, some with kernels as large as the images, and some in several passes
over a layer where one is enough.
"""

import torch
from torch import Tensor
from torch.autograd import Function

from gipip.attacks.engines.products import Factored

_aten = torch.ops.aten


def convolution_backward(
    output_gradient, inputs, weight, bias_sizes, *options, factored: bool = False
) -> list[Tensor | Factored | None]:
    """The gradients by inputs, weight and bias, None where not wanted.

    With `factored` the weight's as its factors, where that pays.
    """
    *options, wanted = options
    factored = factored and wanted[1] and Factored.pays(output_gradient, weight, options)
    formed = [wanted[0], wanted[1] and not factored, wanted[2]]
    arguments = output_gradient, inputs, weight, bias_sizes, options, formed
    gradients = list(_ConvolutionBackward.apply(*arguments))
    if factored:
        gradients[1] = Factored(output_gradient, inputs, weight.shape, options)
    return gradients


class _ConvolutionBackward(Function):
    """A convolution is linear in its inputs and in its weight, so that the derivatives
    of its gradients are convolutions again.
    """

    @staticmethod
    def forward(ctx, output_gradient, inputs, weight, bias_sizes, options, wanted):
        ctx.options = options
        ctx.save_for_backward(output_gradient, inputs, weight)
        ctx.set_materialize_grads(False)
        arguments = output_gradient, inputs, weight, bias_sizes, *options, wanted
        found = zip(_aten.convolution_backward(*arguments), wanted, strict=True)
        return tuple(gradient if is_wanted else None for gradient, is_wanted in found)

    @staticmethod
    def backward(ctx, by_inputs, by_weight, by_bias):
        output_gradient, inputs, weight = ctx.saved_tensors
        to_output = to_inputs = to_weight = None
        if by_weight is not None:
            to_output = _aten.convolution(inputs, by_weight, by_bias, *ctx.options)
            to_inputs = _aten.convolution_backward(
                output_gradient, inputs, by_weight, None, *ctx.options, [True, False, False]
            )[0]
        elif by_bias is not None:
            channelwise = (-1, *[1] * (output_gradient.ndim - 2))
            to_output = by_bias.view(channelwise).expand_as(output_gradient)
        if by_inputs is not None:
            along = _aten.convolution(by_inputs, weight, None, *ctx.options)
            to_output = along if to_output is None else along + to_output
            if ctx.needs_input_grad[2]:  # only where local training has moved the weight
                to_weight = _aten.convolution_backward(
                    output_gradient, by_inputs, weight, None, *ctx.options, [False, True, False]
                )[1]
        return to_output, to_inputs, to_weight, None, None, None


def batch_norm_backward(output_gradient, inputs, weight, mean, variance, *others) -> tuple:
    """The gradients by inputs, weight and bias.

    In eval mode BatchNorm is affine, which autograd's second derivative makes no use of.
    """
    *_, train, eps, wanted = others
    arguments = output_gradient, inputs, weight, mean, variance, *others
    if train or weight is None or not all(wanted):
        return _aten.native_batch_norm_backward(*arguments)
    return _BatchNormBackward.apply(eps, *arguments)


class _BatchNormBackward(Function):
    """In eval mode, with a weight."""

    @staticmethod
    def forward(ctx, eps, *arguments):
        ctx.eps = eps
        ctx.save_for_backward(*arguments[:5])
        return _aten.native_batch_norm_backward(*arguments)

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
        if ctx.needs_input_grad[3]:  # only where local training has moved the weight
            to_weight = (by_inputs * output_gradient).sum(dim=(0, *range(2, inputs.ndim))) * invstd
        return None, to_output, to_inputs, to_weight, *[None] * 7


# ReLU and max-pooling are linear in pieces: the second argument says which piece, and
# the derivative by it is zero. Autograd would add up zeros as large as the layer.


def relu_backward(output_gradient, outputs, threshold):
    return _aten.threshold_backward(output_gradient, outputs.detach(), threshold)


def max_pool_backward(output_gradient, inputs, *options):
    return _aten.max_pool2d_with_indices_backward(output_gradient, inputs.detach(), *options)


# What PyTorch's kernels do, in operations that have a derivative.


def hardsigmoid_backward(output_gradient, inputs):
    return torch.where((inputs > -3) & (inputs < 3), output_gradient / 6, 0)


def silu_backward(output_gradient, inputs):
    gate = inputs.sigmoid()
    return output_gradient * gate * (1 + inputs * (1 - gate))


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
    _aten.hardsigmoid_backward.default: hardsigmoid_backward,
    _aten.silu_backward.default: silu_backward,
    _aten.view.default: _reshape,
    _aten._reshape_alias.default: _reshape,
    _aten.as_strided.default: _as_strided,
}
"""What to call in place of an operation of a recorded backward pass."""
