"""GradInversion (Yin et al., CVPR 2021): match BatchNorm statistics; seeds agree."""

import itertools

import torch
from jaxtyping import Float
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.loop import Terms, Variables
from gipip.attacks.objectives import total_variation
from gipip.attacks.view import View
from gipip.errors import UpdateError
from gipip.federation.client import SharedUpdate, batch_statistics
from gipip.federation.models import Images


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

    name = "gradinversion"
    needs_statistics = True

    seeds: PositiveInt = 2
    statistics_weight: NonNegativeFloat = 0.1
    group_weight: NonNegativeFloat = 0.01

    def require(self, update: SharedUpdate) -> None:
        super().require(update)
        if not update.statistics:
            raise UpdateError(
                "GradInversion needs the private batch's BatchNorm statistics, which this update "
                "does not hold. Use Client.share(batch, statistics='shared') with a model that has "
                "BatchNorm, or another attack."
            )

    def variables(self, view: View) -> Variables:
        return {"images": view.randn(self.seeds * view.shape[0], *view.shape[1:])}

    def candidate(self, view: View, variables: Variables) -> Images:
        """The seed's images that match the gradient best."""
        groups = variables["images"].detach().chunk(self.seeds)
        with torch.enable_grad():
            distances = torch.stack([self.distance(view, group).detach() for group in groups])
        return torch.stack(groups)[distances.argmin()]

    def terms(self, view: View, variables: Variables) -> Terms:
        x = variables["images"]
        groups = x.chunk(self.seeds)
        statistics = torch.stack([self._statistics(view, group) for group in groups])
        matching = torch.stack([self.distance(view, group) for group in groups])
        apart = torch.stack(groups) - torch.stack(groups).mean(dim=0)
        return {
            "gradient matching": matching.mean(),
            "total variation": self.tv_weight * total_variation(x),
            "BatchNorm statistics": self.statistics_weight * statistics.mean(),
            "group consistency": self.group_weight * apart.square().mean(),
        }

    def _statistics(self, view: View, images: Images) -> Float[Tensor, ""]:
        """Distance of one seed's BatchNorm statistics to the shared ones."""
        ours = itertools.chain.from_iterable(batch_statistics(view.model.network, images))
        shared = itertools.chain.from_iterable(view.update.statistics or ())
        pairs = zip(ours, shared, strict=True)
        return torch.stack([(a - b).square().mean() for a, b in pairs]).mean()

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        about = super().assumptions(update)
        about["BatchNorm"] += "; statistics of the private batch shared (an extra assumption)"
        return about
