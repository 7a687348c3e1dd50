"""GradInversion (Yin et al., CVPR 2021): match the private batch's BatchNorm statistics
too, and let several seeds agree.
"""

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from gipip.attacks.base import View
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.objectives import total_variation
from gipip.errors import UpdateError
from gipip.federation.client import SharedUpdate, batch_statistics
from gipip.federation.models import ClientModel


class GradInversion(InvertingGradients):
    """cost = gradient matching + λ_TV·TV + λ_BN·Σ_l (‖μ_l(x) − μ_l‖² + ‖σ²_l(x) −
    σ²_l‖²) + λ_group·‖x − mean over seeds of x‖².

    It needs what other attacks do without: the statistics of the private batch at every
    BatchNorm layer, which no client has to share (Huang et al., NeurIPS 2021). `seeds`:
    candidates optimised side by side, of which the one that matches the gradient best
    is returned. `statistics_weight`: λ_BN, with the sum taken as a mean over layers and
    channels. `group_weight`: λ_group, mean over pixels; the consensus is the pixel-wise
    mean, without the paper's registration. The gradient is matched by its direction, as
    in Inverting Gradients.
    """

    stackable = False  # it looks into the network's layers

    seeds: PositiveInt = 2
    statistics_weight: NonNegativeFloat = 0.1
    group_weight: NonNegativeFloat = 0.01

    def known_labels(self, model: ClientModel, update: SharedUpdate):
        if not update.statistics:
            raise UpdateError(
                "GradInversion needs the private batch's BatchNorm statistics, which this update does not hold. Use "
                "Client.share(batch, statistics='shared') with a model that has BatchNorm, or another attack."
            )
        return super().known_labels(model, update)

    def variables(self, view: View) -> dict[str, Tensor]:
        return {"images": view.randn(self.seeds * view.shape[0], *view.shape[1:])}

    def candidate(
        self, view: View, variables: dict[str, Tensor]
    ) -> Float[Tensor, "batch 3 height width"]:
        """The seed's images that match the gradient best."""
        groups = variables["images"].detach().chunk(self.seeds)
        with torch.enable_grad():
            distances = torch.stack([self.distance(view, group).detach() for group in groups])
        return torch.stack(groups)[distances.argmin()]

    def terms(self, view: View, variables: dict[str, Tensor]) -> dict[str, Tensor]:
        x = variables["images"]
        matching, statistics = zip(
            *(self._match(view, group) for group in x.chunk(self.seeds)), strict=True
        )
        groups = torch.stack(x.chunk(self.seeds))
        return {
            "gradient matching": sum(matching) / self.seeds,
            "total variation": self.tv_weight * total_variation(x),
            "BatchNorm statistics": self.statistics_weight * sum(statistics) / self.seeds,
            "group consistency": self.group_weight * (groups - groups.mean(dim=0)).square().mean(),
        }

    def _match(
        self, view: View, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Tensor, Tensor]:
        """Distance of one seed's gradients and of its BatchNorm statistics to the
        shared ones.
        """
        with batch_statistics(view.network) as found:
            view.network(images)
        pairs = zip(found, view.update.statistics, strict=True)
        layers = [
            (a - b).square().mean()
            for ours, shared in pairs
            for a, b in zip(ours, shared, strict=True)
        ]
        return self.distance(view, images), sum(layers) / len(layers)

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        about = super().assumptions(update)
        return about | {
            "BatchNorm": f"{about['BatchNorm']}; statistics of the private batch shared (an extra assumption)"
        }
