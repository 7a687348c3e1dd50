"""GI-PIP (Sun et al., ICASSP 2024): Inverting Gradients with an anomaly score."""

from typing import Literal, Self

from pydantic import NonNegativeFloat

from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.loop import Terms, Variables
from gipip.attacks.presets import RELEASED_OFFSETS
from gipip.attacks.view import View
from gipip.priors.autoencoder import AnomalyScore


class GIPIP(InvertingGradients):
    """cost(x) = 1 − cos(∇θL(x, y), g*) + λ_TV·TV(x) + λ_AS·AS(x) (Sun et al. 2024).

    `prior`: the attacker's anomaly score. `as_weight`: λ_AS. `score_per`: "image"
    scores each image and takes the mean; "batch" scores the mean error of the whole
    batch, as the reference does.
    """

    name = "gipip"

    prior: AnomalyScore
    as_weight: NonNegativeFloat = 0.2
    score_per: Literal["image", "batch"] = "image"

    def terms(self, view: View, variables: Variables) -> Terms:
        images = view.images(self.candidate(view, variables))
        score = view.place(self.prior)(images, per=self.score_per).mean()
        return super().terms(view, variables) | {"anomaly score": self.as_weight * score}

    @classmethod
    def as_released(cls, dataset: str, batch_size: int, **changes) -> Self:
        """Weights, offset c, optimiser and iterations of the public code, with a `prior`."""
        attack = super().as_released(dataset, batch_size, **changes)
        return attack.model_copy(
            update={"prior": attack.prior.with_offset(RELEASED_OFFSETS[dataset])}
        )

    @classmethod
    def tuned(cls, condition: str, *, arm: str = "", **changes) -> Self:
        """With a `prior`, whose c it sets to 0 as in tuning, unless another `arm` is named."""
        attack = super().tuned(condition, arm=arm, **changes)
        return attack if arm else attack.model_copy(update={"prior": attack.prior.with_offset(0)})
