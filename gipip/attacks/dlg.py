"""Deep Leakage from Gradients (Zhu et al., NeurIPS 2019): match the gradient itself,
labels optimised along.
"""

import torch
from jaxtyping import Int
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gipip.attacks.base import Attack, View
from gipip.attacks.objectives import squared_distance
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel


class DLG(Attack):
    """cost(x, y) = Σ (∇θL(x, softmax(y)) − g*)², minimised with L-BFGS over images and
    soft labels, without a box.

    One iteration is one L-BFGS step of at most `inner_iterations` line-free updates.
    Works on smooth networks (sigmoid); on ReLU networks with BatchNorm it is known to
    fail.
    """

    replayable = False  # L-BFGS decides on the values it sees
    pausable = False  # nor is its state a dict of tensors: under a deadline it runs to its end
    stackable = False

    learning_rate: PositiveFloat = 1.0
    inner_iterations: PositiveInt = 20

    def known_labels(self, model: ClientModel, update: SharedUpdate) -> None:
        """None: labels are optimised, whether the client shares them or not."""

    def variables(self, view: View) -> dict[str, Tensor]:
        return super().variables(view) | {"labels": view.randn(view.shape[0], view.classes)}

    def optimizer(self, variables):
        return torch.optim.LBFGS(
            list(variables.values()), lr=self.learning_rate, max_iter=self.inner_iterations
        ), None

    def terms(self, view: View, variables: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = variables["labels"].softmax(dim=1)
        gradients = view.gradients(variables["images"], labels)
        return {"gradient matching": squared_distance(gradients, view.target)}

    def labels(self, view: View, variables: dict[str, Tensor]) -> Int[Tensor, "batch"]:
        return variables["labels"].argmax(dim=1)

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        return super().assumptions(update) | {"labels": "optimised with the images"}

    @classmethod
    def as_released(cls, **changes) -> "DLG":
        """The original code's settings: 300 steps of L-BFGS with learning rate 1;
        `changes` override single settings.
        """
        return cls(**{"iterations": 300} | changes)
