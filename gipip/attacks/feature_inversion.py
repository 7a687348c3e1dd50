"""The features attack: take the batch apart, decode each image, refine by gradient matching."""

from jaxtyping import Float, Int
from pydantic import NonNegativeFloat, NonNegativeInt, field_serializer
from torch import Tensor, nn

from gipip.attacks.features import recovered
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.loop import Course, Observer, Terms, Variables
from gipip.attacks.view import View
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel, Images, entering
from gipip.priors.autoencoder import AnomalyScore
from gipip.priors.decoder import FeatureDecoder

_SHORTEST = 0.01  # of the steps, relative to the learning rate


class FeatureInversion(InvertingGradients):
    """cost(x) = 1 − cos(g, g*) + λ_TV·TV(x) + λ_F·F(x) + λ_D·mean (x − x_D)² + λ_AS·AS(x).

    The last layer's gradient gives away the features h of each image
    (`gipip.recover_features`); x_D, the start, is what `prior`, the decoder of this
    very client model, makes of them; with `iterations=0` it is the result.
    F(x) = ‖h(x) − h‖², relative to the variance of features, mean over the batch. Where
    h is exact, F says all that the last layer's gradient does, image by image, and g is
    matched without that layer (unless λ_F is 0).

    The learning rate is multiplied by cos(g, g*) at the start: where the start explains
    little of the update, as with trained clients, longer steps leave what images look
    like.

    `feature_weight`: λ_F. `pull_weight`: λ_D. `score`: an anomaly score, of weight `as_weight`.
    """

    name = "features"

    prior: FeatureDecoder
    score: AnomalyScore | None = None
    iterations: NonNegativeInt = 100
    tv_weight: NonNegativeFloat = 0.06
    feature_weight: NonNegativeFloat = 0.1
    pull_weight: NonNegativeFloat = 0.01
    as_weight: NonNegativeFloat = 10.0

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
        expected = self.prior.expected(found.features, found.covariance, found.known)
        features, trust = (part.to(view.target[0]) for part in expected)
        view.labels = found.labels.to(view.target[0].device)
        told = found.status == "exact" and self.feature_weight > 0
        view.apart = view.last_linear if told else ""
        view.start = {
            "images": view.model.normalize(view.place(self.prior)(features)),
            "features": features,
            "trust": trust,
        }
        return super().attempt(view, restart, observers)

    def minimise(self, view: View, observers: list[Observer]) -> Course:
        """From the decoded images, with steps as long as these explain the update."""
        if not self.iterations:
            return super().minimise(view, observers)
        cosine = 1 - self.distance(view, view.start["images"]).item()
        rate = self.learning_rate * max(_SHORTEST, cosine)
        careful = self.model_copy(update={"learning_rate": rate})
        return super(FeatureInversion, careful).minimise(view, observers)

    def variables(self, view: View) -> Variables:
        return {"images": view.start["images"]}

    def feature_distance(self, view: View, images: Images) -> Float[Tensor, ""]:
        """F(x) of normalised images; features count as far as they are known."""
        with entering(view.model, nn.Linear) as seen:
            view.model.network(images)
        features = {name: entered for name, _, entered in seen}[view.last_linear]
        away = (features - view.start["features"]).square().sum(dim=1)
        return (view.start["trust"] * away).mean() / view.place(self.prior).decoder.variance

    def terms(self, view: View, variables: Variables) -> Terms:
        x = self.candidate(view, variables)
        pull = (x - view.start["images"]).square().mean()
        terms = super().terms(view, variables)
        terms["features"] = self.feature_weight * self.feature_distance(view, x)
        terms["pull"] = self.pull_weight * pull
        if self.score:
            score = view.place(self.score)(view.images(x)).mean()
            terms["anomaly score"] = self.as_weight * score
        return terms
