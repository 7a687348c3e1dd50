"""What crosses the wire: a client computes an update on its private batch and shares it."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gipip.data import LabeledImages
from gipip.errors import LabelError, ModelError, UpdateError
from gipip.models import ClientModel, check_client_model, model_fingerprint, trainable


@dataclass(frozen=True, eq=False)
class SharedUpdate:
    """Everything a server, and so an attacker, sees of a client's private batch.

    `gradients`: ∂ mean cross-entropy / ∂θ, one tensor a trainable parameter, in the order of `model.named_parameters()`.
    `labels`: the batch's labels when the client shares them, else None.
    `mode`: whether BatchNorm used running ("eval") or batch ("train") statistics.
    `model_fingerprint`: of the weights that the server had sent and the gradient belongs to.
    """

    gradients: tuple[Tensor, ...]
    parameter_names: tuple[str, ...]
    batch_size: int
    image_shape: tuple[int, int, int]
    labels: Int[Tensor, "batch"] | None
    mode: Literal["eval", "train"]
    model_fingerprint: str

    def check(self, model: nn.Module) -> None:
        """Raise UpdateError unless the update is finite and belongs to `model`, and ModelError unless the model can be attacked."""
        check_client_model(model)
        parameters = trainable(model)
        shapes = [parameter.shape for parameter in parameters.values()]
        if tuple(parameters) != self.parameter_names or shapes != [gradient.shape for gradient in self.gradients]:
            raise UpdateError(
                f"The update's {len(self.gradients)} gradients do not fit the model's {len(shapes)} parameters: it is from another "
                "architecture. Pass the model that the client trained."
            )
        if model_fingerprint(model) != self.model_fingerprint:
            raise UpdateError("The update is from a model with other weights. Pass the very model that the server sent to the client.")
        for name, gradient in zip(self.parameter_names, self.gradients, strict=True):
            if not torch.isfinite(gradient).all():
                raise UpdateError(
                    f"The gradient of {name} holds NaN or infinite values; an attack needs finite ones. Look at the client's images, "
                    "loss and defence."
                )


class Client:
    """A client of federated learning: holds a model and shares updates on private batches."""

    def __init__(self, model: ClientModel):
        check_client_model(model)
        self.model = model

    def share(
        self,
        batch: LabeledImages,
        *,
        mode: Literal["eval", "train"] = "eval",
        labels: Literal["given", "withheld"] = "given",
    ) -> SharedUpdate:
        """The FedSGD update of `batch`: one gradient of the mean cross-entropy.

        `labels`: "given" also shares the labels, which is what most attacks in the literature assume; "withheld" leaves the attacker to
        infer them. Raises LabelError for a label outside the model's classes, ModelError when the model cannot take the images.
        """
        model = copy.deepcopy(self.model).train(mode == "train")  # a copy: train mode would move the running statistics
        device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        images, targets = batch.images.to(device, dtype), batch.labels.to(device)
        logits = _logits(model, images)
        _check_labels(targets, logits)
        parameters = trainable(model)
        gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, targets), tuple(parameters.values()))
        return SharedUpdate(
            gradients=tuple(gradient.detach() for gradient in gradients),
            parameter_names=tuple(parameters),
            batch_size=len(images),
            image_shape=tuple(images.shape[1:]),
            labels=targets if labels == "given" else None,
            mode=mode,
            model_fingerprint=model_fingerprint(self.model),
        )


def _logits(model: ClientModel, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes"]:
    try:
        return model(images)
    except RuntimeError as error:
        raise ModelError(
            f"The model cannot take a batch of shape {tuple(images.shape)} ({error}). Build it for images of this size: "
            f"build_model(…, image_size={images.shape[-1]})."
        ) from error


def _check_labels(labels: Int[Tensor, "batch"], logits: Float[Tensor, "batch classes"]) -> None:
    classes = logits.shape[1]
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise LabelError(
            f"Label {int(wrong[0])} is out of range: the model has {classes} classes, so labels go from 0 to {classes - 1}. "
            "Build the model with num_classes of your data."
        )
