"""What an attack sees, and what it gives."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gipip.attacks.engines import ClientGradient, client_gradient
from gipip.attacks.loop import Variables
from gipip.attacks.objectives import Gradients
from gipip.federation.client import SharedUpdate, check_labels
from gipip.federation.models import ClientModel, Images, class_logits, in_mode, last_linear

Prior = TypeVar("Prior", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack recovered, and how.

    `images`: float32 in [0, 1], shape (batch, 3, height, width), on the CPU. `labels`:
    given, inferred or optimised ones, as `assumptions` says. `history`: for each
    weighted term of the cost its value before every iteration and after the last, shape
    (iterations + 1,); the cost is their sum. `restart_costs`: the attacker-visible cost
    of each restart's result; the lowest is returned. `returned`: which iterate the
    images are. `engine`: how the gradient was computed. `interrupted`: whether the user
    stopped it before its last iteration. `notes`: what went wrong on the way
    (non-finite costs, interruption).
    """

    images: Images
    labels: Int[Tensor, "batch"]
    history: dict[str, Float[Tensor, "evaluations"]]
    cost: float
    restart_costs: tuple[float, ...]
    returned: str
    assumptions: dict[str, str]
    seconds: float
    engine: str = "eager"
    interrupted: bool = False
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class View:
    """All that an attack works with.

    `gradients(images, labels)`: what a client with these normalised images and labels
    (class indices or distributions) would share, differentiable. `target`: what the
    client did share, g*. `labels`: None if the attack optimises them. `start`: what an
    earlier stage found, for the next. `apart`: the layer whose gradient an earlier
    stage took apart, so that it is matched no more.
    """

    model: ClientModel
    update: SharedUpdate
    gradients: ClientGradient
    target: Gradients
    labels: Int[Tensor, "batch"] | None
    generator: torch.Generator = field(default_factory=torch.Generator)
    placed: dict[nn.Module, nn.Module] = field(default_factory=dict)
    start: Variables = field(default_factory=dict)
    apart: str = ""

    @classmethod
    def of(cls, model: ClientModel, update: SharedUpdate, engine: str = "auto", **options) -> Self:
        """That of `update`, with the labels that came with it.

        `engine`, `options`: of `client_gradient`. Raises LabelError or EngineError.
        """
        model = in_mode(model, update.mode)
        gradients = client_gradient(model, update, engine, **options)
        target = gradients.laid_out(update.gradients)
        view = cls(model, update, gradients, target, update.labels)
        if update.labels is not None:
            check_labels(update.labels, view.classes)
        return view

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the candidate images."""
        return (self.update.batch_size, *self.update.image_shape)

    @property
    def fixed_labels(self) -> Int[Tensor, "batch"]:
        """The labels, of an attack that does not optimise them."""
        assert self.labels is not None, "this attack optimises labels"
        return self.labels

    @cached_property
    def classes(self) -> int:
        """How many the model knows."""
        with torch.no_grad():
            logits = self.model(torch.zeros(self.shape).to(self.target[0]))
        return class_logits(logits).shape[1]

    @cached_property
    def last_linear(self) -> str:
        """Name of the linear layer whose output the logits are."""
        return last_linear(self.model, torch.zeros(self.shape).to(self.target[0]))[0]

    def left(self, gradients: Gradients) -> Gradients:
        """What an attack matches of a gradient: all but the layer `apart`, if there are others."""
        if not self.apart:
            return gradients
        named = zip(self.update.parameter_names, gradients, strict=True)
        rest = [each for name, each in named if name.rpartition(".")[0] != self.apart]
        return Gradients(rest or gradients)

    @cached_property
    def matched(self) -> Gradients:
        """What is left of g*."""
        return self.left(self.target)

    def place(self, prior: Prior) -> Prior:
        """A copy of a prior on the attack's device and in its precision, made once."""
        if prior not in self.placed:
            self.placed[prior] = copy.deepcopy(prior).to(self.target[0])
        return self.placed[prior]  # type: ignore[return-value]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers from the attack's own generator, the same on every device."""
        return torch.randn(*shape, generator=self.generator).to(self.target[0])

    def images(self, normalized: Tensor) -> Images:
        """The candidate in image space, clamped to [0, 1]."""
        return self.model.normalize.inverse(normalized).clamp(0, 1)
