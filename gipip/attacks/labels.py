"""Labels read off an update: what an attacker does when the client does not share them."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gipip.errors import LabelError
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel, class_logits, in_mode, last_linear

_PROBES = 64


@torch.no_grad()
def infer_labels(model: ClientModel, update: SharedUpdate) -> Int[Tensor, "batch"]:
    """The batch's labels (sorted, repeats allowed) from the gradient of the linear layer
    that gives the logits.

    One image: the bias gradient is p − y, whose only negative entry is the true class's
    (iDLG, Zhao et al. 2020). Without a bias, the rows of the weight gradient,
    (p_c − y_c)·features, tell as much where the features are ≥ 0. Several images: the bias
    gradient is b_c = mean(p_c) − n_c/B, so n_c = B·(mean(p_c) − b_c); the attacker does
    not know the mean prediction and takes the model's on uniform noise instead (as in
    Geng et al. 2021), with BatchNorm in the update's mode. On untrained networks with
    BatchNorm, whose predictions hardly depend on the image, the counts were exact for
    every batch of up to 8 measured; on the sigmoid LeNet, whose initial weights are
    large, for three in four batches of 4 and one in three of 8. Training degrades the
    estimate.

    Raises ModelError for a model whose logits do not come from a linear layer,
    LabelError where that layer shares no gradient to infer them from.
    """
    model = in_mode(model, update.mode)
    noise = torch.rand(_PROBES, *update.image_shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(model.parameters()))
    layer, _ = last_linear(model, noise[:4])
    gradients = logit_gradients(update, layer)
    bias, weight = gradients.get("bias"), gradients.get("weight")
    if update.batch_size == 1 and bias is not None:
        return bias.argmin().view(1)
    if update.batch_size == 1 and weight is not None:
        return weight.sum(dim=1).argmin().view(1)
    if bias is None:
        raise LabelError(
            f"Labels are inferred from the gradient of {layer}, and the update holds none that "
            "tells them (several images need its bias). Use Client.share(batch, labels='given')."
        )
    prediction = class_logits(model(noise)).softmax(dim=1).mean(dim=0)
    share = model.label_smoothing
    counts = (prediction - bias - share / len(bias)) / (1 - share)
    return _round_to_total(update.batch_size * counts, update.batch_size)


def logit_gradients(update: SharedUpdate, layer: str) -> dict[str, Tensor]:
    """What the update holds of "weight" and "bias" of the layer that gives the logits,
    a row for each class: (−g, g) where there is one logit for two.
    """
    shared = dict(zip(update.parameter_names, update.gradients, strict=True))
    held = {kind: shared.get(f"{layer}.{kind}") for kind in ("weight", "bias")}
    return {
        kind: gradient if len(gradient) > 1 else torch.cat([-gradient, gradient])
        for kind, gradient in held.items()
        if gradient is not None
    }


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
