"""How much of an attack's steps each term of its cost makes."""

from collections.abc import Mapping

import pandas
import torch
from torch import Tensor

from gipip.attacks.base import Attack
from gipip.attacks.loop import Course, Observer
from gipip.attacks.view import View
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel

MATCHING = "gradient matching"


def gradient_shares(
    attack: Attack, model: ClientModel, update: SharedUpdate, *, every: int = 1
) -> pandas.DataFrame:
    """‖∇ weighted term‖ / ‖∇ gradient matching‖, by the normalised images, while the attack runs.

    Columns `iteration` (of every `every`-th, from 1), `term` (but the matching term)
    and `share`. A share of 1 pulls as hard as the gradient does; far below 1 the term
    changes next to nothing. For attacks that optimise images and nothing else. It needs
    no ground truth.
    """
    view = View.of(model, update, "traced")
    view.labels = attack.known_labels(view.model, update)
    shares = _Shares(attack, view, every)
    attack.attempt(view, 0, [shares])
    return pandas.DataFrame(shares.rows, columns=["iteration", "term", "share"])


class _Shares(Observer):
    """Notes them after each step it looks at."""

    def __init__(self, attack: Attack, view: View, every: int):
        self.attack, self.view, self.every = attack, view, every
        self.rows: list[tuple[int, str, float]] = []

    def look(self, course: Course) -> None:
        iteration = len(course.history)
        if iteration % self.every:
            return
        norms = self._norms(course.variables)
        matching = norms.pop(MATCHING)
        self.rows += [(iteration, term, norm / matching) for term, norm in norms.items()]

    def _norms(self, variables: Mapping[str, Tensor]) -> dict[str, float]:
        terms = self.attack.terms(self.view, dict(variables))
        images = variables["images"]
        gradients = {
            name: torch.autograd.grad(term, images, retain_graph=True)[0]
            for name, term in terms.items()
        }
        return {name: gradient.norm().item() for name, gradient in gradients.items()}
