"""Inverting Gradients (Geiping et al., NeurIPS 2020): match the gradient's direction, with TV."""

from typing import Literal, Self

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gipip.attacks.base import Attack
from gipip.attacks.loop import Terms, Variables
from gipip.attacks.objectives import Gradients, cosine_distance, total_variation
from gipip.attacks.presets import released
from gipip.attacks.view import View
from gipip.federation.client import SharedUpdate
from gipip.federation.models import Images

_STEP_DIVISORS = (2.667, 1.6, 1.142)  # of the iterations: 8/3, 8/5 and 8/7 as the references round


class InvertingGradients(Attack):
    """cost(x) = 1 − cos(∇θL(x, y), g*) + λ_TV·TV(x), by Adam in the box that [0, 1] becomes.

    `tv_weight`: λ_TV. `signed`: Adam receives the sign of the gradient. `schedule`:
    "cosine" falls to zero, "steps" multiplies the learning rate by 0.1 at 3/8, 5/8 and
    7/8 of the iterations, rounded as in the reference implementations. `masked`: match
    only the entries that are not zero in g*, the answer to a client that shares a
    sparsified gradient.
    """

    name = "ig"

    tv_weight: NonNegativeFloat = 3e-3
    learning_rate: PositiveFloat = 0.3
    schedule: Literal["cosine", "steps"] = "cosine"
    signed: bool = True
    masked: bool = False

    def optimizer(self, variables: Variables):
        tensors = list(variables.values())
        gpu = tensors[0].is_cuda  # where a captured step reads its learning rate from GPU memory
        rate = torch.tensor(self.learning_rate, device=tensors[0].device)
        adam = torch.optim.Adam(
            tensors, lr=rate if gpu else self.learning_rate, capturable=gpu, fused=not gpu
        )
        if self.schedule == "cosine":
            return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.iterations)
        milestones = [int(self.iterations // divisor) for divisor in _STEP_DIVISORS]
        return adam, torch.optim.lr_scheduler.MultiStepLR(adam, milestones, gamma=0.1)

    def terms(self, view: View, variables: Variables) -> Terms:
        x = self.candidate(view, variables)
        return {
            "gradient matching": self.distance(view, x),
            "total variation": self.tv_weight * total_variation(x),
        }

    def distance(self, view: View, images: Images) -> Float[Tensor, ""]:
        """1 − cos(g, g*) of normalised images; with `masked` where g* is not zero."""
        gradients = view.left(view.gradients(images, view.fixed_labels))
        if self.masked:
            pairs = zip(gradients, view.matched, strict=True)
            gradients = Gradients(gradient * (shared != 0) for gradient, shared in pairs)
        return cosine_distance(gradients, view.matched)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.signed else gradient

    def project(self, view: View, variables: Variables) -> None:
        lower, upper = view.model.normalize.box
        x = variables["images"]
        x.copy_(x.clamp(lower, upper))

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        about = super().assumptions(update)
        if self.masked:
            about["defence"] += "; only non-zero entries matched"
        return about

    @classmethod
    def as_released(cls, dataset: str, batch_size: int, **changes) -> Self:
        """As GI-PIP's release runs it; `changes` override single settings."""
        return cls(**released(cls.__name__, dataset, batch_size) | changes)
