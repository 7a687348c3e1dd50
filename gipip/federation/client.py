"""What crosses the wire: a client computes an update on its private batch and shares it."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    model_fingerprint,
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


Channels = Float[Tensor, "_"]  # each layer has a number of its own
Statistics = tuple[tuple[Channels, Channels], ...]


@contextlib.contextmanager
def batch_statistics(network: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects mean and variance per channel of what enters each BatchNorm layer, in
    the order of the forward pass run inside.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def collect(_layer: nn.Module, inputs: tuple[Tensor]) -> None:
        found.append((inputs[0].mean(dim=(0, 2, 3)), inputs[0].var(dim=(0, 2, 3), correction=0)))

    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(collect))
        yield found


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
        parameters = trainable(model)
        needed = zip(parameters, map(described, parameters.values()), strict=True)
        held = zip_longest(self.parameter_names, map(described, self.gradients))
        for found, expected in zip_longest(held, needed):
            if found != expected:
                raise UpdateError(
                    f"The update holds {found} where the model has {expected}: it is from another "
                    "architecture or of another type. Pass the model that the client trained."
                )
        for name, gradient in zip(self.parameter_names, self.gradients, strict=True):
            if not torch.isfinite(gradient).all():
                raise UpdateError(
                    f"The gradient of {name} holds NaN or infinite values; an attack needs finite "
                    "ones. Look at the client's images, loss and defence."
                )
        if model_fingerprint(model) != self.model_fingerprint:
            raise UpdateError(
                "The update is from a model with other weights. Pass the very model that the "
                "server sent to the client."
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
        _check_choice("mode", mode, "eval", "train")
        _check_choice("labels", labels, "given", "withheld")
        _check_choice("statistics", statistics, "shared", "withheld")
        check_parts(batch, defenses, fedavg)
        model = copy.deepcopy(self.model)  # train mode would move the running statistics
        model.train(mode == "train")
        parameter = next(model.parameters())
        images, targets = batch.images.to(parameter), batch.labels.to(parameter.device)
        _check_labels(targets, count_classes(model, images[:2]))
        with torch.no_grad(), batch_statistics(model) as found:
            if statistics == "shared":
                model(images)
        inputs = model.normalize(images)
        gradients = local_update(model.network, trainable(model.network), inputs, targets, fedavg)
        update = SharedUpdate(
            gradients=tuple(gradient.detach() for gradient in gradients),
            parameter_names=tuple(trainable(model)),
            batch_size=len(images),
            image_shape=tuple(images.shape[1:]),
            labels=targets if labels == "given" else None,
            mode=mode,
            model_fingerprint=model_fingerprint(self.model),
            fedavg=fedavg,
            statistics=tuple(found) if statistics == "shared" else None,
        )
        for defense in defenses:
            update = defense(update, model=self.model, batch=batch)
        return update


def _check_choice(option: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise UpdateError(
            f"Unknown {option}={value!r}. Expected {' or '.join(map(repr, choices))}."
        )


def check_parts(batch: object, defenses: object, fedavg: object = None) -> None:
    """Raise DataError, DefenseError or UpdateError unless a client can share an update on
    `batch` under a list of `defenses`, after the local training `fedavg`, if any.
    """
    if not isinstance(batch, LabeledImages) or not len(batch):
        raise DataError(f"Expected a batch of gipip.LabeledImages; got {described(batch)}.")
    if not isinstance(defenses, Sequence) or not all(map(_is_defense, defenses)):
        raise DefenseError(f"Expected a list, such as defenses=[defence]; got {defenses!r}.")
    if not isinstance(fedavg, FedAvg | None):
        raise UpdateError(f"Expected gipip.FedAvg(steps=…) as fedavg; got {fedavg!r}.")


def _is_defense(value: object) -> bool:
    return callable(value) and not isinstance(value, type)  # a class still lacks its settings


def _check_labels(labels: Int[Tensor, "batch"], classes: int) -> None:
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
