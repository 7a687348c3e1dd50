"""Inverting Gradients (Geiping et al., NeurIPS 2020): match the gradient's direction,
with total variation.
"""

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from gipip.attacks.base import Attack, View
from gipip.attacks.objectives import cosine_distance, total_variation
from gipip.attacks.presets import released, tuned
from gipip.federation.client import SharedUpdate


class InvertingGradients(Attack):
    """cost(x) = 1 − cos(∇θL(x, y), g*) + λ_TV·TV(x), minimised with Adam inside the box
    that [0, 1] becomes.

    `tv_weight`: λ_TV. `signed`: Adam receives the sign of the gradient. `schedule`:
    "cosine" falls to zero, "steps" multiplies the learning rate by 0.1 at 3/8, 5/8 and
    7/8 of the iterations, as the reference implementations do. `masked`: match only the
    entries that are not zero in g*, the answer to a client that shares a sparsified
    gradient.
    """

    tv_weight: NonNegativeFloat = 3e-3
    learning_rate: PositiveFloat = 0.3
    schedule: Literal["cosine", "steps"] = "cosine"
    signed: bool = True
    masked: bool = False

    def optimizer(self, variables):
        tensors = list(variables.values())
        gpu = tensors[
            0
        ].is_cuda  # where a captured step must read its learning rate from GPU memory
        rate = (
            torch.tensor(self.learning_rate, device=tensors[0].device)
            if gpu
            else self.learning_rate
        )
        adam = torch.optim.Adam(tensors, lr=rate, capturable=gpu, fused=not gpu)
        if self.schedule == "cosine":
            return adam, torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.iterations)
        milestones = [self.iterations * eighths // 8 for eighths in (3, 5, 7)]
        return adam, torch.optim.lr_scheduler.MultiStepLR(adam, milestones, gamma=0.1)

    def terms(self, view: View, variables: dict[str, Tensor]) -> dict[str, Tensor]:
        x = self.candidate(view, variables)
        return {
            "gradient matching": self.distance(view, x),
            "total variation": self.tv_weight * total_variation(x),
        }

    def distance(
        self, view: View, images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """1 − cos(g, g*) of normalised images, with `masked` over the entries that are
        not zero in g*.
        """
        gradients = view.gradients(images, view.labels, factored=not self.masked)
        if self.masked:
            gradients = [
                gradient * (shared != 0)
                for gradient, shared in zip(gradients, view.target, strict=True)
            ]
        return cosine_distance(gradients, view.target, view.target_norm)

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient.sign() if self.signed else gradient

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        about = super().assumptions(update)
        return about | (
            {"defence": f"{about['defence']}; only non-zero entries matched"} if self.masked else {}
        )

    def project(self, view: View, variables: dict[str, Tensor]) -> None:
        lower, upper = view.normalize.box
        x = variables["images"]
        x.copy_(x.clamp(lower, upper))

    @classmethod
    def as_released(cls, dataset: str, batch_size: int, **changes) -> "InvertingGradients":
        """The baseline as GI-PIP's release runs it (signed Adam, lr 0.1 in steps);
        `changes` override single settings.
        """
        return cls(**released("InvertingGradients", dataset, batch_size) | changes)

    @classmethod
    def tuned(cls, condition: str, *, arm: str = "", **changes) -> "InvertingGradients":
        """Settings tuned on tuning images for a `Scenario.condition`, such as
        "cifar10/convnet/B=4"; `changes` override single ones.

        `arm`: the name they were tuned under, by default the attack's; see
        `gipip.tuning`.
        """
        return cls(**tuned(arm or cls.__name__, condition) | changes)
