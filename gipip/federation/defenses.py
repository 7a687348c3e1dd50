"""What a client does to its update before it shares it. Several defences are applied in
order; their labels are shared with the update.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy
import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from gipip.data.datasets import LabeledImages
from gipip.errors import DefenseError
from gipip.federation.client import SharedUpdate, local_update
from gipip.federation.models import (
    ClientModel,
    in_mode,
    last_linear,
    mixes_images,
    prepared,
    trainable,
)
from gipip.files import fingerprint

Private = tuple[ClientModel | None, LabeledImages | None]
"""What only the client has, and may have kept: the model and the batch of its update."""


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
        gradients = tuple(self.defend(update, (model, batch)))
        return replace(update, gradients=gradients, defenses=(*update.defenses, str(self)))

    @abstractmethod
    def defend(self, update: SharedUpdate, private: Private) -> Iterable[Tensor]:
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

    def defend(self, update: SharedUpdate, private: Private) -> Iterable[Tensor]:
        return _with_noise(update.gradients, self.std, self.seed)

    def __str__(self) -> str:
        return f"noise {self.std:g}"


class Sparsification(Defense):
    """Sets each tensor's entries of smallest magnitude to 0: those below the `sparsity`
    quantile of its magnitudes.

    As in the code of Soteria and GI-PIP: of n different magnitudes,
    ⌈sparsity · (n − 1)⌉ go, so the largest always stays.
    """

    kind: Literal["sparsification"] = "sparsification"
    sparsity: float = Field(ge=0, lt=1)

    def defend(self, update: SharedUpdate, private: Private) -> Iterable[Tensor]:
        for gradient in update.gradients:
            magnitude = gradient.abs().double()  # torch.quantile takes 16 million at most
            threshold = numpy.quantile(magnitude.cpu().numpy(), self.sparsity)
            yield gradient.masked_fill(magnitude < threshold, 0)

    def __str__(self) -> str:
        return f"sparsity {self.sparsity:g}"


class Clipping(Defense):
    """Scales the gradients down to an L2 norm of at most `max_norm`, taken over all
    tensors together.
    """

    kind: Literal["clipping"] = "clipping"
    max_norm: float = Field(gt=0)

    def defend(self, update: SharedUpdate, private: Private) -> Iterable[Tensor]:
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

    def defend(self, update: SharedUpdate, private: Private) -> Iterable[Tensor]:
        model, batch = _recall(update, private)
        inputs = prepared(model, batch)[0].requires_grad_()
        layer, features = last_linear(model.network, inputs)
        classifier = f"network.{layer}.weight"
        if classifier not in update.parameter_names:
            raise DefenseError(f"{classifier} is frozen. Let it train, or leave out {self}.")
        leakage = _leakage(features, inputs)
        mask = torch.ones_like(leakage)
        mask[leakage.topk(round(self.pruned * len(leakage))).indices] = 0
        for name, gradient in zip(update.parameter_names, update.gradients, strict=True):
            yield gradient * mask if name == classifier else gradient

    def __str__(self) -> str:
        return f"Soteria {100 * self.pruned:g} %"


class DPSGD(Defense):
    """Differentially private SGD (Abadi et al. 2016, algorithm 1): each image's
    gradient is clipped to an L2 norm of `max_norm`; their sum gets noise from N(0,
    (`noise_multiplier` · `max_norm`)²) on every entry and is divided by the batch size.

    It computes the gradients anew, image by image, and so comes first, and neither
    after local training nor with BatchNorm in train mode. The noise follows from `seed`
    and the gradients, for repeatable experiments: to protect anybody, draw it from a
    secret source.

    `epsilon` holds for a training in which every batch is drawn by Poisson sampling
    (each image by itself, with the same probability), the sum is divided by the
    expected batch size, and nothing else of the images gets out: no labels, no size of
    a batch, no BatchNorm statistics, neither shared nor in the model.
    `gipip.train_federated` is such a training; a batch of fixed size that a client
    shares with its labels is not.
    """

    kind: Literal["dpsgd"] = "dpsgd"
    max_norm: float = Field(gt=0)
    noise_multiplier: float = Field(ge=0)
    seed: int = 0

    def defend(self, update: SharedUpdate, private: Private) -> Iterable[Tensor]:
        if update.defenses:
            raise DefenseError(f"{self} would undo {', '.join(update.defenses)}. Apply it first.")
        if update.fedavg:
            raise DefenseError(f"{self} clips single images' gradients. Share without fedavg.")
        model, batch = _recall(update, private)
        return self.noisy_mean(model, batch, len(batch), self.seed)

    def noisy_mean(
        self, model: ClientModel, batch: LabeledImages, size: int, seed: int
    ) -> Iterable[Tensor]:
        """(Σ of the clipped gradients of the batch's images + noise) / `size`. The
        batch may have any size, also 0; the noise follows from `seed` and the
        gradients.

        Raises DefenseError for a model in which images meet.
        """
        if mixes_images(model):
            raise DefenseError(
                f"{self} needs each single image's gradient, but BatchNorm mixes the images. Use "
                "mode='eval' and running statistics, or a model such as 'convnet16-groupnorm'."
            )
        parameters, smoothing = trainable(model.network), model.label_smoothing
        total = [torch.zeros_like(parameter) for parameter in parameters.values()]
        for row in range(len(batch)):
            image = prepared(model, batch[[row]])
            gradients = local_update(model.network, parameters, *image, label_smoothing=smoothing)
            clipped = _clipped(gradients, self.max_norm)
            total = [so_far + gradient for so_far, gradient in zip(total, clipped, strict=True)]
        mean = [gradient / size for gradient in total]
        return _with_noise(mean, self.noise_multiplier * self.max_norm / size, seed)

    def epsilon(self, *, steps: int, sample_rate: float, delta: float = 1e-5) -> float:
        """ε of the (ε, δ)-differential privacy of `steps` updates, of batches that hold
        each of the client's images with the probability `sample_rate` in (0, 1];
        infinite without noise. Neighbouring data sets differ by one image more or less.

        An upper bound, by Opacus's Rényi accountant. It speaks of the gradients: what
        is shared beside them is not covered.
        """
        if not (1 <= steps < math.inf and 0 < sample_rate <= 1 and 0 < delta < 1):
            raise DefenseError(
                f"There is no ε for {steps=}, {sample_rate=}, {delta=}. Expected steps ≥ 1, "
                "sample_rate in (0, 1] and delta in (0, 1)."
            )
        if self.noise_multiplier == 0:
            return math.inf
        try:
            from opacus.accountants import RDPAccountant  # takes seconds, and few need it
        except ImportError as error:
            raise DefenseError('ε needs Opacus: pip install "gipip[dp]".') from error
        accountant = RDPAccountant()
        accountant.history = [(self.noise_multiplier, sample_rate, steps)]
        return float(accountant.get_epsilon(delta))

    def __str__(self) -> str:
        return f"DP-SGD C={self.max_norm:g} σ={self.noise_multiplier:g}"


AnyDefense = Annotated[
    GaussianNoise | Sparsification | Clipping | Soteria | DPSGD, Field(discriminator="kind")
]
"""For fields of other pydantic models: any defence, told apart by `kind`, to JSON and back."""


def _recall(update: SharedUpdate, private: Private) -> tuple[ClientModel, LabeledImages]:
    """A copy of the model in the update's mode, and the batch: those that the client
    computed the update with. DefenseError when they are missing or others.
    """
    model, batch = private
    if model is None or batch is None or len(batch) != update.batch_size:
        raise DefenseError(
            "Pass the model and batch that the update is of: defense(update, model=…, batch=…)."
        )
    update.check(model)
    return in_mode(model, update.mode), batch


def _with_noise(gradients: Sequence[Tensor], std: float, seed: int) -> Iterator[Tensor]:
    """The gradients plus noise from N(0, std²), drawn in float32 on the CPU, from a
    generator of their own.
    """
    numbered = {str(index): gradient for index, gradient in enumerate(gradients)}
    digest = fingerprint(numbered, f"noise:{seed}")
    generator = torch.Generator().manual_seed(int(digest[:16], 16))
    for gradient in gradients:
        yield gradient + std * torch.randn(gradient.shape, generator=generator).to(gradient)


def _clipped(gradients: Sequence[Tensor], max_norm: float) -> Iterator[Tensor]:
    scale = (max_norm / nn.utils.get_total_norm(gradients)).clamp(max=1)
    return (gradient * scale for gradient in gradients)


def _leakage(
    features: Float[Tensor, "batch features"], inputs: Tensor
) -> Float[Tensor, "features"]:
    """Σ over the images of |rᵢ| / ‖∂rᵢ/∂x‖₂ for each of the features r of the inputs x."""
    norms = []
    for chosen in torch.eye(features.shape[1]).to(features).split(16):  # at once, for memory
        directions = chosen.unsqueeze(1).expand(-1, *features.shape)
        (slopes,) = torch.autograd.grad(
            features, inputs, directions, retain_graph=True, is_grads_batched=True
        )
        norms.append(slopes.flatten(2).norm(dim=2))
    magnitude = features.detach().abs().T
    return torch.where(magnitude > 0, magnitude / torch.cat(norms), 0).sum(dim=1)
