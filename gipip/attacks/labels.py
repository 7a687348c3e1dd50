"""Labels read off an update: what an attacker does when the client does not share them."""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gipip.errors import LabelError
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel, last_linear

_PROBES = 64


def infer_labels(model: ClientModel, update: SharedUpdate) -> Int[Tensor, "batch"]:
    """The batch's labels (sorted, repeats allowed) from the gradient of the last linear
    layer.

    One image: iDLG (Zhao et al. 2020). The row of the weight gradient for class c is
    (p_c − y_c)·features, and with features ≥ 0 only the true class's sum is negative.
    Several images: the bias gradient is b_c = mean(p_c) − n_c/B, so n_c = B·(mean(p_c)
    − b_c); the attacker does not know the mean prediction and takes the model's on
    uniform noise instead (as in Geng et al. 2021), with BatchNorm in the update's mode.
    On untrained networks with BatchNorm, whose predictions hardly depend on the image,
    the counts were exact for every batch of up to 8 measured; on the sigmoid LeNet,
    whose initial weights are large, for three in four batches of 4 and one in three of
    8. Training degrades the estimate.

    Raises ModelError for a model without linear layer, LabelError for several images
    and a last layer without bias.
    """
    name, layer = last_linear(model)
    gradient = dict(zip(update.parameter_names, update.gradients, strict=True))
    if update.batch_size == 1:
        return gradient[f"{name}.weight"].sum(dim=1).argmin().view(1)
    if layer.bias is None:
        raise LabelError(
            "Labels of a batch are inferred from the last layer's bias, and this model has none. Use Client.share(batch, labels='given')."
        )
    counts = update.batch_size * (_mean_prediction(model, update) - gradient[f"{name}.bias"])
    return _round_to_total(counts, update.batch_size)


@torch.no_grad()
def _mean_prediction(model: ClientModel, update: SharedUpdate) -> Float[Tensor, "classes"]:
    parameter = next(model.parameters())
    model = copy.deepcopy(model).train(
        update.mode == "train"
    )  # a copy: train mode would move the running statistics
    noise = torch.rand(_PROBES, *update.image_shape, generator=torch.Generator().manual_seed(0))
    return model(noise.to(parameter.device, parameter.dtype)).softmax(dim=1).mean(dim=0)


def _round_to_total(counts: Float[Tensor, "classes"], total: int) -> Int[Tensor, "total"]:
    """Labels whose class counts are the whole numbers nearest to `counts` that sum to
    `total`: one label at a time to the largest rest.
    """
    rest = counts.clone()
    labels = []
    for _ in range(total):
        label = int(rest.argmax())
        rest[label] -= 1
        labels.append(label)
    return torch.tensor(sorted(labels), device=counts.device)
