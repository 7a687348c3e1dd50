"""The features attack: take the batch apart, decode each image, refine by gradient matching."""

from jaxtyping import Int
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, field_serializer
from torch import Tensor

from gipip.attacks.features import recovered
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.loop import Course, Observer, Terms, Variables
from gipip.attacks.view import View
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel
from gipip.priors.autoencoder import AnomalyScore
from gipip.priors.decoder import FeatureDecoder


class FeatureInversion(InvertingGradients):
    """cost(x) = 1 − cos(∇θL(x, y), g*) + λ_TV·TV(x) + λ_AS·AS(x) + λ_D·mean (x − x_D)², from x_D.

    x_D are the decoded features of each image, which the last layer's gradient gives away (see
    `gipip.recover_features`); with `iterations=0` they are the result. `prior`: the decoder of this
    very client model. `pull_weight`: λ_D. `score`: an anomaly score, of weight `as_weight` (λ_AS).
    """

    name = "features"

    prior: FeatureDecoder
    score: AnomalyScore | None = None
    iterations: NonNegativeInt = 100
    tv_weight: NonNegativeFloat = 1e-2
    as_weight: NonNegativeFloat = 3.0
    pull_weight: NonNegativeFloat = 0.01
    learning_rate: PositiveFloat = 0.1

    @field_serializer("score")
    def _score_by_fingerprint(self, score: AnomalyScore | None) -> str:
        return score.fingerprint if score else ""

    def require(self, update: SharedUpdate) -> None:
        super().require(update)
        self.prior.check_model(update.model_fingerprint, update.mode)
        if self.score:
            self.score.check(update.image_shape)

    def known_labels(self, model: ClientModel, update: SharedUpdate) -> Int[Tensor, "batch"] | None:
        """The labels shared; else `attempt` finds them with the features."""
        return update.labels

    def attempt(self, view: View, restart: int, observers: list[Observer]) -> Course:
        found = recovered(view.model, view.update)
        features, errors = found.features.to(view.target[0]), found.errors.to(view.target[0])
        decoded = view.place(self.prior)(features, errors)
        view.labels = found.labels.to(view.target[0].device)
        view.start = {"images": view.model.normalize(decoded)}
        return super().attempt(view, restart, observers)

    def variables(self, view: View) -> Variables:
        return view.start

    def terms(self, view: View, variables: Variables) -> Terms:
        x = self.candidate(view, variables)
        pull = (x - view.start["images"]).square().mean()
        terms = super().terms(view, variables) | {"pull": self.pull_weight * pull}
        if self.score:
            score = view.place(self.score)(view.images(x)).mean()
            terms["anomaly score"] = self.as_weight * score
        return terms
