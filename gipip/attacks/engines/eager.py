"""Autograd's double backward: the reference for every other engine."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from gipip.attacks.objectives import Gradients
from gipip.federation.client import SharedUpdate, local_update
from gipip.federation.models import ClientModel, trainable


class ClientGradient:
    """Normalised images and their labels (class indices or distributions) → the update
    that a client with these would share, differentiable with respect to both.

    `notes`: what the user should know about how it is computed.
    """

    name: ClassVar[str] = "eager"
    replayed: Callable | None = None  # makes a step of the attack one that does the same, faster

    def __init__(self, model: ClientModel, update: SharedUpdate, chunk_size: int | None = None):
        self.network, self.fedavg, self.chunk_size = model.network, update.fedavg, chunk_size
        self.parameters, self.label_smoothing = trainable(model.network), model.label_smoothing
        self.notes: tuple[str, ...] = ()

    def __call__(self, images: Tensor, labels: Tensor) -> Gradients:
        return self.reference(images, labels)

    def reference(self, images: Tensor, labels: Tensor) -> Gradients:
        """The same by the double backward."""
        return Gradients(self.update_of(self.network, self.parameters, images, labels, True))

    def update_of(
        self,
        network: nn.Module,
        parameters: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        create_graph: bool,
    ) -> tuple[Tensor, ...]:
        """What the client computes with these parameters."""
        return local_update(
            network, parameters, images, labels, self.fedavg, create_graph, self.label_smoothing
        )

    def laid_out(self, gradients: Sequence[Tensor]) -> Gradients:
        """A shared update's gradients as they are compared fastest with those computed here."""
        return Gradients(gradients)
