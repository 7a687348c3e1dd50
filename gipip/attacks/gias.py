"""GAN-based inversion, GIAS (Jeon et al., NeurIPS 2021): search a generator's latents,
then the weights of a copy of it for each image.
"""

import dataclasses

from jaxtyping import Float, Int
from pydantic import PositiveFloat, PositiveInt, field_serializer
from torch import Tensor
from torch.func import functional_call, vmap

from gipip.attacks.base import View
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.errors import UpdateError
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel
from gipip.priors import GenerativePrior


class LatentSearch(InvertingGradients):
    """min_z 1 − cos(∇θL(G(z), y), g*) + λ_TV·TV(G(z)): the images stay among those that
    the generator G can make.

    `prior`: the attacker's generator.
    """

    prior: GenerativePrior
    signed: bool = False
    learning_rate: PositiveFloat = 0.1

    @field_serializer("prior")
    def _prior_by_fingerprint(self, prior: GenerativePrior) -> str:
        return prior.fingerprint

    def known_labels(self, model: ClientModel, update: SharedUpdate) -> Int[Tensor, "batch"]:
        size, (_, height, width) = self.prior.generator.image_size, update.image_shape
        if (height, width) != (size, size):
            raise UpdateError(
                f"The generator makes {size}×{size} images, but the update is of {height}×{width}. Use a generator trained on images of "
                "the update's size: gipip.train_generator(auxiliary)."
            )
        return super().known_labels(model, update)

    def variables(self, view: View) -> dict[str, Tensor]:
        return {"latent": view.randn(view.shape[0], self.prior.generator.latent_size)}

    def candidate(
        self, view: View, variables: dict[str, Tensor]
    ) -> Float[Tensor, "batch 3 height width"]:
        return view.normalize(view.place(self.prior)(variables["latent"]))

    def project(self, view: View, variables: dict[str, Tensor]) -> None:
        """Nothing to restore: a generator's images lie in [0, 1]."""

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        return super().assumptions(update) | {
            "auxiliary data": f"{self.prior.provenance.get('images', 'an unknown number of')} images"
        }


class GIAS(LatentSearch):
    """Latent search, then parameter search: the weights of one generator copy an image
    are optimised, its latent stays (Jeon et al. 2021).

    `latent_iterations`, `latent_restarts`, `latent_learning_rate`: of the latent
    search, whose best result by attacker-visible cost is where the `iterations` of the
    parameter search start. `learning_rate`: of the parameter search.
    """

    stackable = False  # each restart has a start of its own

    latent_iterations: PositiveInt = 150
    latent_restarts: PositiveInt = 2
    latent_learning_rate: PositiveFloat = 0.1
    learning_rate: PositiveFloat = 1e-3

    def _attempt(self, lanes, watch, watch_every: int, description: str, checkpoint):
        """Both stages; only the first one's attempt if the user stopped it there."""
        [(view, restart)] = lanes
        search = self._latent_search(restart)
        attempts = search._search([view], 1, watch, watch_every, checkpoint)
        best = min(attempts, key=lambda attempt: search._choose(attempt)[1])
        if attempts[-1].stopped:
            return [dataclasses.replace(best, stopped=True, notes=attempts[-1].notes)]
        view.start = search._choose(best)[0]
        return super()._attempt(lanes, watch, watch_every, description, checkpoint)

    def _latent_search(self, restart: int) -> LatentSearch:
        """The first stage; each of this attack's restarts has seeds of its own."""
        shared = {
            name: value
            for name, value in self
            if name in ("prior", "tv_weight", "schedule", "masked", "returns")
        }
        return LatentSearch(
            **shared,
            seed=self.seed + restart * self.latent_restarts,
            iterations=self.latent_iterations,
            restarts=self.latent_restarts,
            learning_rate=self.latent_learning_rate,
        )

    def variables(self, view: View) -> dict[str, Tensor]:
        latent = view.start["latent"].detach().clone()
        weights = view.place(self.prior).generator.named_parameters()
        return {"latent": latent} | {
            name: weight.detach().expand(len(latent), *weight.shape).clone()
            for name, weight in weights
        }

    def optimizer(self, variables: dict[str, Tensor]):
        return super().optimizer(
            {name: variable for name, variable in variables.items() if name != "latent"}
        )

    def candidate(
        self, view: View, variables: dict[str, Tensor]
    ) -> Float[Tensor, "batch 3 height width"]:
        generator = view.place(self.prior).generator
        weights = {name: variable for name, variable in variables.items() if name != "latent"}
        copies = vmap(lambda own, latent: functional_call(generator, own, (latent[None],))[0])
        return view.normalize(copies(weights, variables["latent"]))
