"""How an attack computes the client's gradient, which it then differentiates once more.

Autograd's double backward ("eager") spends 8 forward passes' worth of multiplications an iteration. Written out once as a plain function
of the images, the gradient is differentiated like any other function ("traced"): the weights are constants there, so 7 are left, which
is what the arithmetic needs. That function can be compiled ("compiled"), or the whole iteration captured and replayed on a GPU
("cudagraph", see `gipip.attacks.replay`). All give the same numbers within rounding.
"""

import inspect
import shutil
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from gipip.errors import EngineError
from gipip.federation import FedAvg, local_update

Engine = Literal["eager", "traced", "compiled", "cudagraph"]
ClientGradient = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Normalised images and their labels (class indices or distributions) → the update that a client with these would share."""

_aten = torch.ops.aten


def choose_engine(wanted: str, *, cuda: bool, replayable: bool) -> Engine:
    """The engine for an attack: the one wanted, or with "auto" the fastest one measured. Raises EngineError when it cannot run here."""
    if wanted == "auto":
        return "cudagraph" if cuda and replayable else "traced"
    if wanted not in get_args(Engine):
        raise EngineError(f"Unknown engine {wanted!r}. Known engines: auto, {', '.join(get_args(Engine))}.")
    if wanted == "cudagraph" and not cuda:
        raise EngineError("The engine 'cudagraph' needs model and update on an NVIDIA GPU. On a CPU use 'traced'.")
    if wanted == "cudagraph" and not replayable:
        raise EngineError("This attack's optimiser decides on the values it sees: its steps cannot be captured. Use 'traced' or 'eager'.")
    if wanted == "compiled" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise EngineError("The engine 'compiled' needs a C++ compiler (g++ or clang++) and none was found. Install one, or use 'traced'.")
    return wanted


def client_gradient(network: nn.Module, parameters: Mapping[str, Tensor], fedavg: FedAvg | None, engine: Engine) -> ClientGradient:
    """What `local_update` computes for given images and labels, differentiable with respect to both."""
    if engine == "eager":
        return lambda inputs, labels: local_update(network, parameters, inputs, labels, fedavg, create_graph=True)

    def update(inputs: Tensor, labels: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(parameters, (weight.detach().requires_grad_() for weight in weights), strict=True))
        return local_update(network, own, inputs, labels, fedavg, create_graph=True)

    return _WrittenOut(update, tuple(parameter.detach() for parameter in parameters.values()), engine == "compiled")


class _WrittenOut:
    """`function(inputs, labels, *constants)` as the line of tensor operations that it runs for inputs of one shape."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], constants: tuple[Tensor, ...], compiled: bool):
        self.function, self.constants, self.compiled = function, constants, compiled
        self.recorded = {}

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return self.record(inputs, labels)(inputs, labels, *self.constants)

    def record(self, inputs: Tensor, labels: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        """The operations for inputs of these shapes, recorded at the first call."""
        kind = (inputs.shape, labels.shape, labels.dtype)
        if kind not in self.recorded:
            recorded = make_fx(self.function)(inputs.detach(), labels.detach(), *self.constants)
            for node in recorded.graph.nodes:
                node.target = _REPLACED.get(node.target, node.target)
                if node.target is _aten.alias.default:  # what `detach` leaves in a recording: the same tensor
                    node.replace_all_uses_with(node.args[0])
                    recorded.graph.erase_node(node)
            recorded.recompile()
            self.recorded[kind] = torch.compile(recorded, dynamic=False) if self.compiled else recorded
        return self.recorded[kind]


def in_chunks(gradient: _WrittenOut, chunk_size: int) -> ClientGradient:
    """The same gradient of a mean loss from at most `chunk_size` images at a time: less memory for up to half as much computation again.

    Exact, because the gradient of a mean is the mean of the gradients, as long as images do not meet in the network (BatchNorm in eval
    mode). Each chunk is computed a second time when its derivative is wanted.
    """

    def chunked(inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        total = None
        for some, theirs in zip(inputs.split(chunk_size), labels.split(chunk_size), strict=True):
            part = checkpoint(gradient.record(some, theirs), some, theirs, *gradient.constants, use_reentrant=False)
            part = [len(some) / len(inputs) * tensor for tensor in part]
            total = [a + b for a, b in zip(total, part, strict=True)] if total else part
        return tuple(total)

    return chunked


# A convolution is linear in its images and in its weights, so that the derivatives of its two gradients are convolutions again. Autograd's
# own formula for them computes what nothing needs here, and the one for the weights with kernels as large as the images.


def _convolution_backward(output_gradient, inputs, weight, bias_sizes, *options) -> tuple[Tensor | None, ...]:
    *options, (wants_inputs, wants_weight, wants_bias) = options
    return (
        _InputGradient.apply(output_gradient, inputs.detach(), weight, options) if wants_inputs else None,
        _WeightGradient.apply(output_gradient, inputs, weight.detach(), options) if wants_weight else None,
        output_gradient.sum(dim=(0, *range(2, output_gradient.ndim))) if wants_bias else None,
    )


class _InputGradient(torch.autograd.Function):
    """∂⟨output_gradient, conv(inputs, weight)⟩ / ∂inputs: linear in the output gradient and in the weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output_gradient, inputs, weight, options):
        return _aten.convolution_backward(output_gradient, inputs, weight, None, *options, [True, False, False])[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        output_gradient, _, weight, ctx.options = inputs
        ctx.save_for_backward(output_gradient, weight)

    @staticmethod
    def backward(ctx, direction):
        output_gradient, weight = ctx.saved_tensors
        to_output = _aten.convolution(direction, weight, None, *ctx.options)
        to_weight = None
        if ctx.needs_input_grad[2]:  # only where local training has moved the weights
            to_weight = _aten.convolution_backward(output_gradient, direction, weight, None, *ctx.options, [False, True, False])[1]
        return to_output, None, to_weight, None


class _WeightGradient(torch.autograd.Function):
    """∂⟨output_gradient, conv(inputs, weight)⟩ / ∂weight: linear in the output gradient and in the inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output_gradient, inputs, weight, options):
        return _aten.convolution_backward(output_gradient, inputs, weight, None, *options, [False, True, False])[1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        output_gradient, images, _, ctx.options = inputs
        ctx.save_for_backward(output_gradient, images)

    @staticmethod
    def backward(ctx, direction):
        output_gradient, inputs = ctx.saved_tensors
        to_output = _aten.convolution(inputs, direction, None, *ctx.options)
        to_inputs = _aten.convolution_backward(output_gradient, inputs, direction, None, *ctx.options, [True, False, False])[0]
        return to_output, to_inputs, None, None


def _batch_norm_backward(output_gradient, inputs, weight, mean, variance, batch_mean, batch_invstd, train, eps, mask):
    """In eval mode BatchNorm is affine, which autograd's formula for its second derivative makes no use of."""
    if train or weight is None:
        return _aten.native_batch_norm_backward(
            output_gradient, inputs, weight, mean, variance, batch_mean, batch_invstd, train, eps, mask
        )
    invstd = (variance + eps).rsqrt()
    over = (0, *range(2, inputs.ndim))
    bias_gradient = output_gradient.sum(dim=over)
    weight_gradient = ((output_gradient * inputs).sum(dim=over) - mean * bias_gradient) * invstd
    return output_gradient * (weight * invstd).view(-1, *[1] * (inputs.ndim - 2)), weight_gradient, bias_gradient


# ReLU and max-pooling are linear in pieces: the second argument says which piece, and the derivative by it is zero. Autograd would add up
# zeros as large as the layer.


def _relu_backward(output_gradient, outputs, threshold):
    return _aten.threshold_backward(output_gradient, outputs.detach(), threshold)


def _max_pool_backward(output_gradient, inputs, *options):
    return _aten.max_pool2d_with_indices_backward(output_gradient, inputs.detach(), *options)


_REPLACED = {
    _aten.convolution_backward.default: _convolution_backward,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
    _aten.threshold_backward.default: _relu_backward,
    _aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
}

for _function in (_InputGradient, _WeightGradient):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # PyTorch asks for it at every call: a tenth of a millisecond
