"""What a client does to its update before it shares it. Several defences are applied in
order; their labels are shared with the update.
"""

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Literal

import numpy
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from gipip.data.datasets import LabeledImages
from gipip.errors import DefenseError
from gipip.federation.client import SharedUpdate, local_update
from gipip.federation.models import ClientModel, last_linear, trainable
from gipip.files import fingerprint


class Defense(BaseModel):
    """From an update to the one that is shared instead: `update = defense(update,
    model=model, batch=batch)`.

    Subclasses say what becomes of the gradients (`defend`) and how the defence is
    called in tables and figures (`__str__`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __call__(
        self,
        update: SharedUpdate,
        *,
        model: ClientModel | None = None,
        batch: LabeledImages | None = None,
    ) -> SharedUpdate:
        """The defended update, with the defence's label added to `update.defenses`;
        `update` itself stays as it was.

        `model`, `batch`: what the client computed the update with. Only Soteria and
        DPSGD need them, and raise DefenseError without.
        """
        gradients = tuple(self.defend(update, model, batch))
        return dataclasses.replace(
            update, gradients=gradients, defenses=(*update.defenses, str(self))
        )

    @abstractmethod
    def defend(
        self, update: SharedUpdate, model: ClientModel | None, batch: LabeledImages | None
    ) -> Iterable[Tensor]:
        """The gradients to share instead of the update's, in the same order and of the
        same shapes.
        """

    @abstractmethod
    def __str__(self) -> str: ...


class GaussianNoise(Defense):
    """Adds independent noise from N(0, `std`²) to every entry of the gradient.

    The noise follows from `seed` and the gradients: the same update gets the same
    noise, any other update its own.
    """

    kind: Literal["gaussian_noise"] = "gaussian_noise"
    std: float = Field(ge=0)
    seed: int = 0

    def defend(
        self, update: SharedUpdate, model: ClientModel | None, batch: LabeledImages | None
    ) -> Iterable[Tensor]:
        return _with_noise(update.gradients, self.std, self.seed)

    def __str__(self) -> str:
        return f"noise {self.std:g}"


class Sparsification(Defense):
    """Sets each tensor's entries of smallest magnitude to 0: those below the `sparsity`
    quantile of its magnitudes.

    As in the code of Soteria and GI-PIP: of n different magnitudes, ⌈sparsity · (n −
    1)⌉ go, so the largest always stays.
    """

    kind: Literal["sparsification"] = "sparsification"
    sparsity: float = Field(ge=0, lt=1)

    def defend(
        self, update: SharedUpdate, model: ClientModel | None, batch: LabeledImages | None
    ) -> Iterable[Tensor]:
        for gradient in update.gradients:
            magnitude = gradient.abs().double()
            threshold = numpy.quantile(
                magnitude.cpu().numpy(), self.sparsity
            )  # torch.quantile takes 16 million entries at most
            yield gradient.masked_fill(magnitude < threshold, 0)

    def __str__(self) -> str:
        return f"sparsity {self.sparsity:g}"


class Clipping(Defense):
    """Scales the gradients down to an L2 norm of at most `max_norm`, taken over all
    tensors together.
    """

    kind: Literal["clipping"] = "clipping"
    max_norm: float = Field(gt=0)

    def defend(
        self, update: SharedUpdate, model: ClientModel | None, batch: LabeledImages | None
    ) -> Iterable[Tensor]:
        return _clipped(update.gradients, self.max_norm)

    def __str__(self) -> str:
        return f"clip {self.max_norm:g}"


class Soteria(Defense):
    """Prunes the representation (Sun et al., CVPR 2021, "Soteria"): what of the
    features r entering the classifier tells most of x.

    The share `pruned` (rounded to whole features) with the largest |rᵢ| / ‖∂rᵢ/∂x‖₂ is
    taken out, which sets their columns of the last linear layer's weight gradient to 0;
    all other gradients stay. x is the normalised image. In a batch, each feature's
    ratios are summed over the images, and all images lose the same features. The slopes
    are those of rᵢ summed over the batch: in eval mode each image's own; in train mode
    BatchNorm mixes the images, and in the sum their slopes cancel in part.

    The authors' code, for one image, ranks by ‖∂rᵢ/∂x‖ / (rᵢ + 0.1) instead: that is
    the same order where rᵢ is far above 0.1, but it takes dead features (rᵢ = 0), which
    leak nothing, first. Here they go last.
    """

    kind: Literal["soteria"] = "soteria"
    pruned: float = Field(gt=0, lt=1)

    def defend(
        self, update: SharedUpdate, model: ClientModel | None, batch: LabeledImages | None
    ) -> Iterable[Tensor]:
        model, inputs, _ = _recall(self, update, model, batch)
        layer, classifier = last_linear(model)
        name = f"{layer}.weight"
        if name not in update.parameter_names:
            raise DefenseError(
                f"{name} is frozen, so the update holds no gradient that {self} could prune. Let the classifier train."
            )
        leakage = _leakage(model.network, classifier, inputs)
        mask = torch.ones_like(leakage)
        mask[leakage.topk(round(self.pruned * len(leakage))).indices] = 0
        for parameter, gradient in zip(update.parameter_names, update.gradients, strict=True):
            yield gradient * mask if parameter == name else gradient

    def __str__(self) -> str:
        return f"Soteria {100 * self.pruned:g} %"


class DPSGD(Defense):
    """Differentially private SGD (Abadi et al. 2016, algorithm 1): each image's
    gradient is clipped to an L2 norm of `max_norm`; their mean gets noise from N(0,
    (`noise_multiplier` · `max_norm` / batch size)²) on every entry.

    It computes the gradients anew, image by image, and so comes first, and neither
    after local training nor with BatchNorm in train mode. The noise follows from `seed`
    and the gradients, for repeatable experiments: to protect anybody, draw it from a
    secret source.
    """

    kind: Literal["dpsgd"] = "dpsgd"
    max_norm: float = Field(gt=0)
    noise_multiplier: float = Field(ge=0)
    seed: int = 0

    def defend(
        self, update: SharedUpdate, model: ClientModel | None, batch: LabeledImages | None
    ) -> Iterable[Tensor]:
        if update.defenses:
            raise DefenseError(
                f"{self} computes the gradients anew, which would undo {', '.join(update.defenses)}. Apply it first."
            )
        if update.mode == "train" or update.fedavg is not None:
            raise DefenseError(
                f"{self} needs a gradient of each single image: BatchNorm in train mode mixes the images, local training the steps. "
                "Share with mode='eval' and without fedavg."
            )
        model, inputs, labels = _recall(self, update, model, batch)
        parameters = trainable(model.network)
        total = [torch.zeros_like(gradient) for gradient in update.gradients]
        for image, label in zip(inputs.split(1), labels.split(1), strict=True):
            clipped = _clipped(local_update(model.network, parameters, image, label), self.max_norm)
            total = [so_far + gradient for so_far, gradient in zip(total, clipped, strict=True)]
        mean = [gradient / len(inputs) for gradient in total]
        return _with_noise(mean, self.noise_multiplier * self.max_norm / len(inputs), self.seed)

    def epsilon(self, *, steps: int, sample_rate: float, delta: float = 1e-5) -> float:
        """ε of the (ε, δ)-differential privacy of `steps` updates, of batches that hold
        each of the client's images with the probability `sample_rate` in (0, 1];
        infinite without noise. Neighbouring data sets differ by one image more or less.

        An upper bound, by Opacus's Rényi accountant. It speaks of the gradients: what
        is shared beside them is not covered.
        """
        if steps < 1 or not 0 < sample_rate <= 1 or not 0 < delta < 1:
            given = f"steps={steps}, sample_rate={sample_rate}, delta={delta}"
            raise DefenseError(
                f"There is no ε for {given}. Expected steps ≥ 1, sample_rate in (0, 1] and delta in (0, 1)."
            )
        if self.noise_multiplier == 0:
            return math.inf
        from opacus.accountants import RDPAccountant  # takes seconds, and few need it

        accountant = RDPAccountant()
        accountant.history = [(self.noise_multiplier, sample_rate, steps)]
        return float(accountant.get_epsilon(delta))

    def __str__(self) -> str:
        return f"DP-SGD C={self.max_norm:g} σ={self.noise_multiplier:g}"


AnyDefense = Annotated[
    GaussianNoise | Sparsification | Clipping | Soteria | DPSGD, Field(discriminator="kind")
]
"""For fields of other pydantic models: any defence, told apart by `kind`, to JSON and back."""


def _with_noise(gradients: Sequence[Tensor], std: float, seed: int) -> Iterator[Tensor]:
    """The gradients plus noise from N(0, std²), drawn in float32 on the CPU, from a
    generator of their own.
    """
    digest = fingerprint(
        {str(index): gradient for index, gradient in enumerate(gradients)}, f"noise:{seed}"
    )
    generator = torch.Generator().manual_seed(int(digest[:16], 16))
    for gradient in gradients:
        yield gradient + std * torch.randn(gradient.shape, generator=generator).to(gradient)


def _clipped(gradients: Sequence[Tensor], max_norm: float) -> Iterator[Tensor]:
    scale = (max_norm / nn.utils.get_total_norm(gradients)).clamp(max=1)
    return (gradient * scale for gradient in gradients)


def _recall(
    defense: Defense, update: SharedUpdate, model: ClientModel | None, batch: LabeledImages | None
) -> tuple[ClientModel, Float[Tensor, "batch 3 height width"], Int[Tensor, "batch"]]:
    """What the client computed the update with: a copy of its model in the update's
    mode, its normalised images and its labels.
    """
    if model is None or batch is None:
        raise DefenseError(
            f"{defense} needs what the update was computed with: defense(update, model=…, batch=…)."
        )
    if len(batch) != update.batch_size:
        raise DefenseError(
            f"{defense} got a batch of {len(batch)}, but the update is of {update.batch_size}. Pass the client's batch."
        )
    update.check(model)
    model = copy.deepcopy(model).train(update.mode == "train")
    parameter = next(model.parameters())
    return model, model.normalize(batch.images.to(parameter)), batch.labels.to(parameter.device)


def _leakage(
    network: nn.Module,
    classifier: nn.Linear,
    inputs: Float[Tensor, "batch 3 height width"],
    chunk: int = 16,
) -> Float[Tensor, "features"]:
    """Σ over the images of |rᵢ| / ‖∂rᵢ/∂x‖₂ for each feature i that enters the
    classifier; `chunk` features are differentiated at once.
    """
    entering = []
    classifier.register_forward_pre_hook(lambda _, arguments: entering.append(arguments[0]))
    inputs = inputs.detach().requires_grad_()
    network(inputs)
    (representation,) = entering
    norms = []
    for features in torch.eye(representation.shape[1]).to(representation).split(chunk):
        chosen = features.unsqueeze(1).expand(-1, *representation.shape)
        (slopes,) = torch.autograd.grad(
            representation, inputs, chosen, retain_graph=True, is_grads_batched=True
        )
        norms.append(slopes.flatten(2).norm(dim=2))
    magnitude = representation.detach().abs().T
    return torch.where(magnitude > 0, magnitude / torch.cat(norms), 0).sum(dim=1)
