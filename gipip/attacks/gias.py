"""GAN-based inversion, GIAS (Jeon et al., NeurIPS 2021): search a generator's latents,
then the weights of a copy of it for each image.
"""

from pydantic import PositiveFloat, PositiveInt
from torch.func import functional_call, vmap

from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.loop import Course, Observer, Variables
from gipip.attacks.view import View
from gipip.federation.models import Images
from gipip.priors.gan import GenerativePrior


class LatentSearch(InvertingGradients):
    """min_z 1 − cos(∇θL(G(z), y), g*) + λ_TV·TV(G(z)): among the images that G can make.

    `prior`: the attacker's generator G.
    """

    name = "latent"

    prior: GenerativePrior
    signed: bool = False
    learning_rate: PositiveFloat = 0.1

    def variables(self, view: View) -> Variables:
        return {"latent": view.randn(view.shape[0], self.prior.generator.latent_size)}

    def candidate(self, view: View, variables: Variables) -> Images:
        return view.model.normalize(view.place(self.prior)(variables["latent"]))

    def project(self, view: View, variables: Variables) -> None:
        """Nothing to restore: a generator's images lie in [0, 1]."""


class GIAS(LatentSearch):
    """Latent search, then parameter search: the weights of one generator copy an image
    are optimised, its latent stays (Jeon et al. 2021).

    `latent_iterations`, `latent_restarts`, `latent_learning_rate`: of the latent
    search, whose best result by attacker-visible cost is where the `iterations` of the
    parameter search start. `learning_rate`: of the parameter search.
    """

    name = "gias"

    latent_iterations: PositiveInt = 150
    latent_restarts: PositiveInt = 2
    latent_learning_rate: PositiveFloat = 0.1
    learning_rate: PositiveFloat = 1e-3

    def attempt(self, view: View, restart: int, observers: list[Observer]) -> Course:
        """Both stages; only the first one's best if the user stopped it there."""
        search = self._latent_search(restart)
        courses = search.attempts(view, observers)
        best = min(courses, key=lambda course: search.chosen(course)[1])
        view.start = search.chosen(best)[0]
        if courses[-1].stopped:
            best.stopped = True
            return best
        return super().attempt(view, restart, observers)

    def _latent_search(self, restart: int) -> LatentSearch:
        """The first stage; each of this attack's restarts has seeds of its own."""
        shared = {"prior", "tv_weight", "schedule", "masked", "returns"}
        return LatentSearch(
            **{name: value for name, value in self if name in shared},
            seed=self.seed + restart * self.latent_restarts,
            iterations=self.latent_iterations,
            restarts=self.latent_restarts,
            learning_rate=self.latent_learning_rate,
        )

    def variables(self, view: View) -> Variables:
        latent = view.start["latent"]
        copies = {
            name: weight.expand(len(latent), *weight.shape)
            for name, weight in view.place(self.prior).generator.named_parameters()
        }
        return {"latent": latent} | copies

    def optimizer(self, variables: Variables):
        return super().optimizer(_weights(variables))

    def candidate(self, view: View, variables: Variables) -> Images:
        generator = view.place(self.prior).generator
        copies = vmap(lambda own, latent: functional_call(generator, own, (latent[None],))[0])
        return view.model.normalize(copies(_weights(variables), variables["latent"]))


def _weights(variables: Variables) -> Variables:
    return {name: variable for name, variable in variables.items() if name != "latent"}
