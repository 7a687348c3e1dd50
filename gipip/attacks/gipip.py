"""GI-PIP (Sun et al., ICASSP 2024): Inverting Gradients with the anomaly score of an
autoencoder as a further term.
"""

from typing import Literal

from pydantic import NonNegativeFloat, field_serializer
from torch import Tensor

from gipip.attacks.base import View
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.presets import RELEASED_OFFSETS, released
from gipip.federation.client import SharedUpdate
from gipip.priors import AnomalyScore


class GIPIP(InvertingGradients):
    """cost(x) = 1 − cos(∇θL(x, y), g*) + λ_TV·TV(x) + λ_AS·AS(x) (Sun et al. 2024).

    `prior`: the attacker's anomaly score. `as_weight`: λ_AS. `score_per`: "image"
    scores each image and takes the mean; "batch" scores the mean error of the whole
    batch, as the reference does.
    """

    prior: AnomalyScore
    as_weight: NonNegativeFloat = 0.2
    score_per: Literal["image", "batch"] = "image"

    @field_serializer("prior")
    def _prior_by_fingerprint(self, prior: AnomalyScore) -> str:
        return prior.fingerprint

    def terms(self, view: View, variables: dict[str, Tensor]) -> dict[str, Tensor]:
        score = view.place(self.prior)(
            view.images(self.candidate(view, variables)), per=self.score_per
        ).mean()
        return super().terms(view, variables) | {"anomaly score": self.as_weight * score}

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        return super().assumptions(update) | {
            "auxiliary data": f"{self.prior.provenance.get('images', 'an unknown number of')} images"
        }

    @classmethod
    def as_released(
        cls, dataset: str, batch_size: int, *, prior: AnomalyScore, **changes
    ) -> "GIPIP":
        """Weights, offset c, optimiser and iterations of the public code; `changes`
        override single settings.
        """
        settings = released("GIPIP", dataset, batch_size) | changes
        return cls(prior=prior.with_offset(RELEASED_OFFSETS[dataset]), **settings)

    @classmethod
    def tuned(cls, condition: str, *, prior: AnomalyScore, arm: str = "", **changes) -> "GIPIP":
        """As for Inverting Gradients. The default arm was tuned with c = 0, which it
        sets; any other takes the prior as it is.
        """
        return super().tuned(
            condition, arm=arm, prior=prior if arm else prior.with_offset(0), **changes
        )
