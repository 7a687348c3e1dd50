"""How an attack computes the client's gradient, which it then differentiates once more.

Autograd's double backward ("eager") spends 8 forward passes' worth of multiplications
an iteration. Written out once as a plain function of the images, the gradient is
differentiated like any other function ("traced"): the weights are constants there, so 7
are left, and fewer for a cost that asks only for products with the gradient, which late
layers then need not form (see `gipip.attacks.derivatives`). That function can be
compiled ("compiled"), or the whole iteration captured and replayed on a GPU
("cudagraph", see `gipip.attacks.replay`). All give the same numbers within rounding.
"""

import operator
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from gipip.attacks.engines.derivatives import INSTEAD, Factored, convolution_backward
from gipip.errors import EngineError
from gipip.federation.client import FedAvg, local_update

Engine = Literal["eager", "traced", "compiled", "cudagraph"]
ClientGradient = Callable[..., tuple[Tensor | Factored, ...]]
"""Normalised images and their labels (class indices or distributions) → the update that
a client with these would share.

With `factored=True` some of its tensors may come as `Factored`, for who needs only
their products with others.
"""

_aten = torch.ops.aten


def choose_engine(wanted: str, *, cuda: bool, replayable: bool) -> Engine:
    """The engine for an attack: the one wanted, or with "auto" the fastest one
    measured. Raises EngineError when it cannot run here.
    """
    if wanted == "auto":
        return "cudagraph" if cuda and replayable else "traced"
    if wanted not in get_args(Engine):
        raise EngineError(
            f"Unknown engine {wanted!r}. Known engines: auto, {', '.join(get_args(Engine))}."
        )
    if wanted == "cudagraph" and not cuda:
        raise EngineError(
            "The engine 'cudagraph' needs model and update on an NVIDIA GPU. On a CPU use 'traced'."
        )
    if wanted == "cudagraph" and not replayable:
        raise EngineError(
            "This attack's optimiser decides on the values it sees: its steps cannot be captured. Use 'traced' or 'eager'."
        )
    if wanted == "compiled" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise EngineError(
            "The engine 'compiled' needs a C++ compiler (g++ or clang++) and none was found. Install one, or use 'traced'."
        )
    return wanted


def client_gradient(
    network: nn.Module, parameters: Mapping[str, Tensor], fedavg: FedAvg | None, engine: Engine
) -> ClientGradient:
    """What `local_update` computes for given images and labels, differentiable with
    respect to both.
    """
    if engine == "eager":
        return lambda inputs, labels, factored=False: local_update(
            network, parameters, inputs, labels, fedavg, create_graph=True
        )

    def update(inputs: Tensor, labels: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        own = dict(
            zip(parameters, (weight.detach().requires_grad_() for weight in weights), strict=True)
        )
        return local_update(network, own, inputs, labels, fedavg, create_graph=True)

    return _WrittenOut(
        update,
        laid_out([parameter.detach() for parameter in parameters.values()], engine),
        engine == "compiled",
    )


def laid_out(weights: Sequence[Tensor], engine: Engine) -> tuple[Tensor, ...]:
    """Weights, or gradients by them, as the engine reads them fastest: convolutions of
    oneDNN take a fifth less time with channels last.

    It has none in float64, where PyTorch's own give wrong gradients for some tensors
    with channels last and several groups (2.14).
    """
    if engine != "traced":
        return tuple(weights)
    last = (
        weight.ndim == 4 and weight.dtype == torch.float32 and not weight.is_cuda
        for weight in weights
    )
    return tuple(
        weight.contiguous(memory_format=torch.channels_last) if it else weight
        for weight, it in zip(weights, last, strict=True)
    )


class _WrittenOut:
    """`function(inputs, labels, *constants)` as the line of tensor operations that it
    runs for inputs of one shape.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        constants: tuple[Tensor, ...],
        compiled: bool,
    ):
        self.function, self.constants, self.compiled = function, constants, compiled
        self.recorded = {}

    def __call__(
        self, inputs: Tensor, labels: Tensor, factored: bool = False
    ) -> tuple[Tensor | Factored, ...]:
        return self.record(inputs, labels, factored)(inputs, labels, *self.constants)

    def record(
        self, inputs: Tensor, labels: Tensor, factored: bool = False
    ) -> Callable[..., tuple[Tensor | Factored, ...]]:
        """The operations for inputs of these shapes, recorded at the first call."""
        factored = factored and not self.compiled
        kind = (inputs.shape, labels.shape, labels.dtype, factored)
        if kind not in self.recorded:
            plain = (
                tensor.detach().contiguous() for tensor in (inputs, labels, *self.constants)
            )  # as the network may take for granted
            recorded = make_fx(self.function)(*plain)
            for node in recorded.graph.nodes:
                node.target = INSTEAD.get(node.target, node.target)
                if (
                    node.target is _aten.alias.default
                ):  # what `detach` leaves in a recording: the same tensor
                    node.replace_all_uses_with(node.args[0])
                    recorded.graph.erase_node(node)
            if factored:
                _leave_factored(recorded.graph)
            recorded.graph.eliminate_dead_code()
            recorded.recompile()
            self.recorded[kind] = (
                torch.compile(recorded, dynamic=False) if self.compiled else recorded
            )
        return self.recorded[kind]


def _leave_factored(graph: Graph) -> None:
    """Let the gradients of convolutions' weights that are results, and nothing else, be
    `Factored` where that pays.
    """
    for gradient in graph.output_node().all_input_nodes:
        if gradient.target is operator.getitem and len(gradient.users) == 1:
            backward, index = gradient.args
            if backward.target is convolution_backward and index == 1:
                backward.update_kwarg("factored", True)


def in_chunks(gradient: _WrittenOut, chunk_size: int) -> ClientGradient:
    """The same gradient of a mean loss from at most `chunk_size` images at a time: less
    memory for up to half as much computation again.

    Exact, because the gradient of a mean is the mean of the gradients, as long as
    images do not meet in the network (BatchNorm in eval mode). Each chunk is computed a
    second time when its derivative is wanted.
    """

    def chunked(inputs: Tensor, labels: Tensor, factored: bool = False) -> tuple[Tensor, ...]:
        total = None
        for some, theirs in zip(inputs.split(chunk_size), labels.split(chunk_size), strict=True):
            part = checkpoint(
                gradient.record(some, theirs),
                some,
                theirs,
                *gradient.constants,
                use_reentrant=False,
            )
            part = [len(some) / len(inputs) * tensor for tensor in part]
            total = [a + b for a, b in zip(total, part, strict=True)] if total else part
        return tuple(total)

    return chunked
