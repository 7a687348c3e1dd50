"""The client's gradient written out once, as a plain function of the images.

Autograd's double backward spends 8 forward passes' worth of multiplications an
iteration. A recording of the gradient is differentiated like any other function: the
weights are constants there, so 7 are left, and fewer for a cost that asks only for
products with the gradient, which late layers then need not form (products.py).
"""

import io
import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from gipip.attacks.engines.derivatives import INSTEAD, convolution_backward
from gipip.attacks.engines.eager import ClientGradient
from gipip.attacks.engines.products import PartlyFactored
from gipip.attacks.objectives import Gradients
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel

_aten = torch.ops.aten
_RECORDINGS: dict[Hashable, GraphModule] = {}
_NO_DERIVATIVE = {_aten.native_group_norm_backward.default, _aten.mish_backward.default}
_KEPT = 16  # recordings, each a list of operations without weights
_TOLERANCE = 1e-2  # of the gradient's norm: rounding moves it by far less, another function by more


class Traced(ClientGradient):
    """Records what `local_update` does at the first call, and checks it against the reference.

    What cannot be recorded is left to the reference, and `notes` says so.
    """

    name = "traced"

    def __init__(self, model: ClientModel, update: SharedUpdate, chunk_size: int | None = None):
        super().__init__(model, update, chunk_size)
        frozen = {n: p.detach() for n, p in self.network.named_parameters() if not p.requires_grad}
        self.fixed = dict(self.network.named_buffers()) | frozen
        self.constants = [*self.laid_out(list(self.parameters.values())), *self.fixed.values()]
        self.recordings: dict[Hashable, GraphModule] = {}

    def __call__(self, images: Tensor, labels: Tensor) -> Gradients:
        if self.notes:
            return self.reference(images, labels)
        try:
            if self.chunk_size:
                return self._in_chunks(images, labels, self.chunk_size)
            return PartlyFactored(self._recording(images, labels)(images, labels, *self.constants))
        except _NotRecorded as problem:
            self.name = "eager"  # type: ignore[misc]
            self.notes = (f"computed by the engine 'eager': {problem}",)
            return self.reference(images, labels)

    def laid_out(self, gradients: Sequence[Tensor]) -> Gradients:
        """With channels last, with which convolutions of oneDNN take a fifth less time.

        Not in float64, where PyTorch's own convolutions give wrong gradients for some
        tensors with channels last and several groups (2.14).
        """
        return Gradients(
            gradient.detach().contiguous(memory_format=torch.channels_last)
            if gradient.ndim == 4 and gradient.dtype == torch.float32 and not gradient.is_cuda
            else gradient.detach()
            for gradient in gradients
        )

    def _recording(self, images: Tensor, labels: Tensor) -> GraphModule:
        """The operations for inputs of these shapes, perhaps recorded by an earlier attack."""
        kind = (images.shape, images.dtype, images.device, labels.shape, labels.dtype)
        if kind not in self.recordings:
            names = (*self.parameters, *self.fixed)
            about = (self.fedavg, self.label_smoothing, names)
            key = (kind, about, _structure(self.network))
            recording = _RECORDINGS.pop(key, None) or self._record(images, labels)
            if not self._agrees(recording, images, labels):
                raise _NotRecorded("a recording of its operations gives another gradient")
            self.recordings[kind] = _RECORDINGS[key] = recording
            if len(_RECORDINGS) > _KEPT:
                del _RECORDINGS[next(iter(_RECORDINGS))]
        return self.recordings[kind]

    def _record(self, images: Tensor, labels: Tensor, create_graph: bool = False) -> GraphModule:
        """`local_update` for any images, labels, parameters and all else that the network holds.

        Of the kernels that PyTorch takes for a first derivative, unless one of them has
        no derivative itself (such as group normalisation's): then of those it takes for
        a second.
        """

        def update(images: Tensor, labels: Tensor, *constants: Tensor) -> tuple[Tensor, ...]:
            count = len(self.parameters)
            network = _Holding(self.network, zip(self.fixed, constants[count:], strict=True))
            names = (f"network.{name}" for name in self.parameters)
            weights = (weight.detach().requires_grad_() for weight in constants[:count])
            parameters = dict(zip(names, weights, strict=True))
            return self.update_of(network, parameters, images, labels, create_graph)

        plain = [tensor.detach().contiguous() for tensor in (images, labels, *self.constants)]
        try:
            recording = make_fx(update)(*plain)
        except Exception as error:  # a network may do anything in its forward pass
            raise _NotRecorded(f"the network cannot be recorded ({error})") from error
        if any(node.target in _NO_DERIVATIVE for node in recording.graph.nodes):
            return self._record(images, labels, create_graph=True)
        return _rewritten(recording)

    @torch.no_grad()
    def _agrees(self, recording: GraphModule, images: Tensor, labels: Tensor) -> bool:
        """Whether the recording gives the reference's gradient here."""
        ours = PartlyFactored(recording(images, labels, *self.constants))
        with torch.enable_grad():
            theirs = self.reference(images.detach(), labels.detach())
        error = Gradients(a - b for a, b in zip(ours, theirs, strict=True)).norm
        return bool(error <= _TOLERANCE * theirs.norm)

    def _in_chunks(self, images: Tensor, labels: Tensor, chunk_size: int) -> Gradients:
        """The same from at most `chunk_size` images at a time: less memory for up to
        half as much computation again.

        Exact, because the gradient of a mean is the mean of the gradients, as long as
        images do not meet in the network. Each chunk is computed again when its
        derivative is wanted.
        """
        parts = []
        for some, theirs in zip(images.split(chunk_size), labels.split(chunk_size), strict=True):
            recording, share = self._recording(some, theirs), len(some) / len(images)
            part = checkpoint(
                _formed_by, recording, some, theirs, *self.constants, use_reentrant=False
            )
            parts.append([share * tensor for tensor in part])
        return Gradients(sum(tensors[1:], tensors[0]) for tensors in zip(*parts, strict=True))


def _formed_by(recording: GraphModule, *inputs: Tensor) -> tuple[Tensor, ...]:
    return PartlyFactored(recording(*inputs)).tensors


class _NotRecorded(Exception):
    """The network is left to the reference; the message says why."""


class _Holding(nn.Module):
    """A network with other buffers and frozen parameters than its own, given by name."""

    def __init__(self, network: nn.Module, fixed: Iterable[tuple[str, Tensor]]):
        super().__init__()
        self.network, self.fixed = network, dict(fixed)

    def forward(self, images: Tensor) -> Tensor:
        return functional_call(self.network, self.fixed, (images,))


def _rewritten(recorded: GraphModule) -> GraphModule:
    """The recording with the derivatives of derivatives.py, and without what nobody needs."""
    graph: Any = recorded.graph  # whose nodes' arguments may be of many kinds
    for node in graph.nodes:
        node.target = INSTEAD.get(node.target, node.target)
        if node.target is _aten.alias.default:  # what `detach` leaves: the same tensor
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for gradient in graph.output_node().all_input_nodes:
        if gradient.target is operator.getitem and len(gradient.users) == 1:
            backward, index = gradient.args
            if backward.target is convolution_backward and index == 1:  # by the weight, a result
                backward.update_kwarg("factored", True)
    graph.eliminate_dead_code()
    recorded.recompile()
    return recorded


def _structure(network: nn.Module) -> Hashable:
    """What the operations of a network depend on, its numbers apart: equal for equal recordings.

    Unique where an attribute cannot be pickled.
    """
    content = io.BytesIO()
    try:
        _WithoutNumbers(content).dump(network)
    except Exception:  # attributes may be anything
        return object()
    return content.getvalue()


class _WithoutNumbers(cloudpickle.Pickler):
    """Writes the kind of a tensor in place of its values."""

    def persistent_id(self, value: object) -> object:
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device, value.requires_grad
        return None
