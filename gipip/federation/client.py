"""What crosses the wire: a client computes an update on its private batch and shares it."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from gipip.data.datasets import LabeledImages, described
from gipip.errors import DataError, DefenseError, LabelError, UpdateError
from gipip.federation.models import (
    ClientModel,
    Images,
    Mode,
    check_client_model,
    count_classes,
    entering,
    model_fingerprint,
    prepared,
    trainable,
)


class FedAvg(BaseModel):
    """Local training before a client shares (McMahan et al. 2017): `steps` of SGD with
    `learning_rate` on mini-batches of `batch_size` images, taken in order and from the
    beginning again when the batch is used up; by default each step takes the whole
    batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    steps: PositiveInt = 1
    batch_size: PositiveInt | None = None
    learning_rate: PositiveFloat = 1e-2

    def rows(self, step: int, images: int) -> slice:
        """Which of the client's `images` the mini-batch of a step holds."""
        size = min(self.batch_size or images, images)
        start = step % -(-images // size) * size
        return slice(start, start + size)


def local_update(
    network: nn.Module,
    parameters: Mapping[str, Tensor],
    inputs: Images,
    labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    fedavg: FedAvg | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """What a client computes, and an attacker simulates: the gradient of the mean
    cross-entropy with respect to `parameters`.

    `inputs` are normalised, `labels` class indices or distributions over classes. With
    `fedavg` the mean gradient on the way of the local steps: (θ before − θ after) /
    (learning rate × steps). The gradient of a parameter that the network does not use
    is zero. With `create_graph` the update can be differentiated with respect to the
    inputs.
    """

    def gradient(weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        loss = nn.functional.cross_entropy(functional_call(network, weights, (inputs,)), labels)
        return torch.autograd.grad(
            loss, tuple(weights.values()), create_graph=create_graph, materialize_grads=True
        )

    current = dict(parameters)
    if fedavg is None:
        return gradient(current, inputs, labels)
    for step in range(fedavg.steps):
        rows = fedavg.rows(step, len(inputs))
        slopes = gradient(current, inputs[rows], labels[rows])
        for (name, parameter), slope in zip(current.items(), slopes, strict=True):
            moved = parameter - fedavg.learning_rate * slope
            current[name] = moved if create_graph else moved.detach().requires_grad_()
    scale = fedavg.learning_rate * fedavg.steps
    return tuple((parameters[name] - current[name]) / scale for name in parameters)


Statistics = tuple[tuple[Float[Tensor, "_"], Float[Tensor, "_"]], ...]  # channels of each layer


def batch_statistics(network: nn.Module, inputs: Images) -> Statistics:
    """Mean and variance per channel of what enters each BatchNorm layer, in the order of
    the forward pass.
    """
    with entering(network, nn.BatchNorm2d) as seen:
        network(inputs)
    per_channel = (0, 2, 3)
    return tuple((x.mean(per_channel), x.var(per_channel, correction=0)) for _, _, x in seen)


@dataclass(frozen=True, eq=False)
class SharedUpdate:
    """Everything a server, and so an attacker, sees of a client's private batch.

    `gradients`: ∂ mean cross-entropy / ∂θ, one tensor a trainable parameter, in the
    order of `model.named_parameters()`; after local training the mean gradient on its
    way (see `local_update`). `labels`: the batch's labels when the client shares them,
    else None. `mode`: whether BatchNorm used running ("eval") or batch ("train")
    statistics. `model_fingerprint`: of the weights that the server had sent and the
    gradient belongs to. `fedavg`: the local training that the server asked for; None is
    FedSGD, one gradient. `statistics`: mean and variance of the private batch at each
    BatchNorm layer, when the client shares them. `defenses`: what the client did to the
    gradients, as it says publicly.
    """

    gradients: tuple[Tensor, ...]
    parameter_names: tuple[str, ...]
    batch_size: int
    image_shape: tuple[int, ...]
    labels: Int[Tensor, "batch"] | None
    mode: Mode
    model_fingerprint: str
    fedavg: FedAvg | None = None
    statistics: Statistics | None = None
    defenses: tuple[str, ...] = ()

    def check(self, model: nn.Module) -> None:
        """Raise UpdateError unless the update is finite and belongs to `model`, and
        ModelError unless the model can be attacked.
        """
        check_client_model(model)
        needed = [(name, described(value)) for name, value in trainable(model).items()]
        held = zip_longest(self.parameter_names, map(described, self.gradients))
        for found, expected in zip_longest(held, needed):
            if found != expected:
                raise UpdateError(
                    f"The update holds {found} where the model has {expected}: it is from another "
                    "architecture or of another type. Pass the model that the client trained."
                )
        for name, gradient in zip(self.parameter_names, self.gradients, strict=True):
            if not gradient.isfinite().all():
                raise UpdateError(
                    f"The gradient of {name} holds NaN or infinite values. Look at the loss."
                )
        if model_fingerprint(model) != self.model_fingerprint:
            raise UpdateError(
                "The update is from other weights. Pass the very model that the server sent."
            )


class Client:
    """A client of federated learning: holds a model and shares updates on private batches."""

    def __init__(self, model: ClientModel):
        check_client_model(model)
        self.model = model

    @torch.enable_grad()
    def share(
        self,
        batch: LabeledImages,
        *,
        mode: Mode = "eval",
        labels: Literal["given", "withheld"] = "given",
        statistics: Literal["shared", "withheld"] = "withheld",
        fedavg: FedAvg | None = None,
        defenses: Sequence[Callable[..., SharedUpdate]] = (),
    ) -> SharedUpdate:
        """The update of `batch`: FedSGD's one gradient of the mean cross-entropy, or
        with `fedavg` what local training changes.

        `labels`: "given" also shares the labels, which is what most attacks in the
        literature assume; "withheld" leaves the attacker to infer them. `statistics`:
        "shared" gives away the private batch's BatchNorm statistics. `defenses` (see
        `gipip.federation.defenses`) are applied in their order. Raises ModelError when
        the model cannot take the images, LabelError for a label outside its classes,
        DataError for a batch that is none, DefenseError for defences that are not in a
        list, UpdateError for other values of the options.
        """
        if mode not in ("eval", "train"):
            raise UpdateError(f"Unknown {mode=}. Expected 'eval' or 'train'.")
        if labels not in ("given", "withheld"):
            raise UpdateError(f"Unknown {labels=}. Expected 'given' or 'withheld'.")
        if statistics not in ("shared", "withheld"):
            raise UpdateError(f"Unknown {statistics=}. Expected 'shared' or 'withheld'.")
        model = copy.deepcopy(self.model)  # train mode would move the running statistics
        model.train(mode == "train")
        check_parts(model, batch, defenses, fedavg)
        inputs, targets = prepared(model, batch)
        with torch.no_grad():
            found = batch_statistics(model.network, inputs) if statistics == "shared" else None
        gradients = local_update(model.network, trainable(model.network), inputs, targets, fedavg)
        update = SharedUpdate(
            gradients=tuple(gradient.detach() for gradient in gradients),
            parameter_names=tuple(trainable(model)),
            batch_size=len(inputs),
            image_shape=tuple(inputs.shape[1:]),
            labels=targets if labels == "given" else None,
            mode=mode,
            model_fingerprint=model_fingerprint(self.model),
            fedavg=fedavg,
            statistics=found,
        )
        for defense in defenses:
            update = defense(update, model=self.model, batch=batch)
        return update


def check_parts(model: ClientModel, batch: object, defenses: object, fedavg: object = None) -> None:
    """Raise the error that fits unless a client with `model` can share an update on `batch`
    under a list of `defenses`, after the local training `fedavg`, if any.
    """
    if not isinstance(batch, LabeledImages) or not len(batch):
        raise DataError(f"Expected a batch of gipip.LabeledImages; got {described(batch)}.")
    if not isinstance(defenses, Sequence) or not all(map(_is_defense, defenses)):
        raise DefenseError(f"Expected a list, such as defenses=[defence]; got {defenses!r}.")
    if not isinstance(fedavg, FedAvg | None):
        raise UpdateError(f"Expected gipip.FedAvg(steps=…) as fedavg; got {fedavg!r}.")
    check_labels(batch.labels, count_classes(model, batch[:2]))


def _is_defense(value: object) -> bool:
    return callable(value) and not isinstance(value, type)  # a class still lacks its settings


def check_labels(labels: Int[Tensor, "batch"], classes: int) -> None:
    """Raise LabelError unless the labels are class indices of a model with so many classes."""
    if labels.dtype != torch.int64:
        raise LabelError(
            f"The labels are {labels.dtype}; expected int64 class indices: labels.long()."
        )
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise LabelError(
            f"Label {int(wrong[0])} is out of range: the model has {classes} classes, so labels "
            f"go from 0 to {classes - 1}. Build the model with num_classes of your data."
        )
