"""Deep Leakage from Gradients (Zhu et al., NeurIPS 2019): match gradient and labels."""

from typing import Self

import torch
from jaxtyping import Int
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from gipip.attacks.base import Attack
from gipip.attacks.loop import Terms, Variables
from gipip.attacks.objectives import squared_distance
from gipip.attacks.view import View
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel


class DLG(Attack):
    """cost(x, y) = Σ (∇θL(x, softmax(y)) − g*)², by L-BFGS over images and soft labels, no box.

    One iteration is one L-BFGS step of at most `inner_iterations` line-free updates.
    Works on smooth networks (sigmoid); on ReLU networks with BatchNorm it is known to
    fail.
    """

    name = "dlg"
    replayable = False  # L-BFGS decides on the values it sees
    pausable = False  # nor is its state tensors: under a deadline it runs to its end

    learning_rate: PositiveFloat = 1.0
    inner_iterations: PositiveInt = 20

    def known_labels(self, model: ClientModel, update: SharedUpdate) -> None:
        """None: labels are optimised, whether the client shares them or not."""

    def variables(self, view: View) -> Variables:
        return super().variables(view) | {"labels": view.randn(view.shape[0], view.classes)}

    def optimizer(self, variables: Variables):
        tensors = list(variables.values())
        rate, steps = self.learning_rate, self.inner_iterations
        return torch.optim.LBFGS(tensors, lr=rate, max_iter=steps), None

    def terms(self, view: View, variables: Variables) -> Terms:
        labels = variables["labels"].softmax(dim=1)
        gradients = view.gradients(variables["images"], labels)
        return {"gradient matching": squared_distance(gradients, view.target)}

    def labels(self, view: View, variables: Variables) -> Int[Tensor, "batch"]:
        return variables["labels"].argmax(dim=1)

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        return super().assumptions(update) | {"labels": "optimised with the images"}

    @classmethod
    def tuned(cls, condition: str, *, arm: str = "", **changes) -> Self:
        """The defaults, with `changes`: it has no weights to tune."""
        return cls(**changes)

    @classmethod
    def as_released(cls, **changes) -> Self:
        """The original code's settings; `changes` override single ones."""
        return cls(**changes)
