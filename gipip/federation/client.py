"""What crosses the wire: a client computes an update on its private batch and shares it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from gipip.data.datasets import LabeledImages, described
from gipip.errors import BatchSizeError, DataError, DefenseError, LabelError, UpdateError
from gipip.federation.elsewhere import Given, gradients_of, mean_local_gradient
from gipip.federation.models import (
    ClientModel,
    Images,
    Mode,
    check_client_model,
    class_logits,
    count_classes,
    entering,
    in_mode,
    model_fingerprint,
    prepared,
    trainable,
)
from gipip.files import read_tensors, write_tensors


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
    label_smoothing: float = 0.0,
) -> tuple[Tensor, ...]:
    """What a client computes, and an attacker simulates: the gradient of the mean
    cross-entropy, with `label_smoothing`, with respect to `parameters`.

    `inputs` are normalised, `labels` class indices or distributions over classes. With
    `fedavg` the mean gradient on the way of the local steps: (θ before − θ after) /
    (learning rate × steps). The gradient of a parameter that the network does not use
    is zero. With `create_graph` the update can be differentiated with respect to the
    inputs.
    """

    def gradient(weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        logits = class_logits(functional_call(network, weights, (inputs,)))
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
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

    @classmethod
    def from_gradients(
        cls,
        model: ClientModel,
        gradients: Given | None = None,
        *,
        batch_size: int,
        image_shape: Sequence[int],
        labels: Int[Tensor, "batch"] | Sequence[int] | None = None,
        mode: Mode | None = None,
        fedavg: FedAvg | None = None,
        defenses: Sequence[str] = (),
    ) -> Self:
        """The update of a client whose gradients other code computed.

        `gradients`: of the mean cross-entropy of `batch_size` images, as tensors or
        numpy arrays; a list in the order of the parameters that are trained, or a dict
        by their names, in `model` or in its network; None for what `loss.backward()`
        left in the model. None in place of a tensor is zero. `image_shape`: channels,
        height and width. `labels`: when the client shares them. `mode`: by default the
        network's own. `model` holds the weights that the server had sent. `defenses`:
        in words, for the table of assumptions. Raises UpdateError, ModelError or
        LabelError for what does not fit.
        """
        check_client_model(model)
        if labels is not None:
            labels = torch.as_tensor(labels, device=next(model.parameters()).device)
        update = cls(
            gradients=gradients_of(model, gradients),
            parameter_names=tuple(trainable(model)),
            batch_size=batch_size,
            image_shape=tuple(image_shape),
            labels=labels,
            mode=mode or ("train" if model.network.training else "eval"),
            model_fingerprint=model_fingerprint(model),
            fedavg=fedavg,
            defenses=tuple(defenses),
        )
        update.check(model)
        _check_batch(model, update)
        return update

    @classmethod
    def from_weights(
        cls,
        model: ClientModel,
        before: Given,
        after: Given,
        *,
        steps: int,
        learning_rate: float,
        mini_batch: int | None = None,
        **about: Any,
    ) -> Self:
        """The update of a client that trained: `before` are the weights that the server
        had sent, which `model` holds, and `after` what came back.

        Both are dicts by name, such as network.state_dict(), or lists of tensors or
        numpy arrays in the order of network.state_dict(), with or without the buffers.
        The client took `steps` of SGD with `learning_rate`. `mini_batch`: how many of
        its images each step took, in order and from the beginning again. Leave it out
        when the order is not known: the attack then takes every step on all images,
        which is the same to first order in the learning rate. `about`: batch_size (all
        the client's images), image_shape, labels, mode and defenses, as of
        `from_gradients`; the mode is by default "train" if the running statistics
        moved.
        """
        check_client_model(model)
        fedavg = FedAvg(steps=steps, learning_rate=learning_rate, batch_size=mini_batch)
        gradients, mode = mean_local_gradient(model, before, after, learning_rate * steps)
        return cls.from_gradients(model, gradients, fedavg=fedavg, **{"mode": mode, **about})

    def save(self, path: Path | str) -> Path:
        """Write it as one safetensors file."""
        pairs = zip(self.parameter_names, self.gradients, strict=True)
        tensors = {f"gradients/{name}": gradient for name, gradient in pairs}
        flat = itertools.chain.from_iterable(self.statistics or ())
        tensors |= {f"statistics/{place:04}": value for place, value in enumerate(flat)}
        if self.labels is not None:
            tensors["labels"] = self.labels
        about = {name: getattr(self, name) for name in _ABOUT}
        return write_tensors(path, tensors, about | {"fedavg": self.fedavg and dict(self.fedavg)})

    @classmethod
    def load(cls, path: Path | str, model: ClientModel | None = None) -> Self:
        """What `save` wrote; with `model` on its device, and UpdateError unless it is
        from that very model, which every attack asks again.
        """
        tensors, about = read_tensors(path)
        if not {*_ABOUT, "fedavg"} <= about.keys():
            raise UpdateError(f"{path} holds no update. Write one: update.save(file).")
        if model is not None:
            device = next(model.parameters()).device
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        fedavg = about.pop("fedavg")
        told: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in about.items()}
        flat = [tensors[name] for name in sorted(tensors) if name.startswith("statistics/")]
        update = cls(
            gradients=tuple(tensors[f"gradients/{name}"] for name in told["parameter_names"]),
            labels=tensors.get("labels"),
            fedavg=fedavg and FedAvg(**fedavg),
            statistics=tuple(zip(flat[::2], flat[1::2], strict=True)) or None,
            **told,
        )
        if model is not None:
            update.check(model)
        return update

    def check(self, model: nn.Module) -> None:
        """Raise UpdateError unless the update is finite and belongs to `model`, and
        ModelError unless the model can be attacked.
        """
        check_client_model(model)
        needed = [(name, described(value)) for name, value in trainable(model).items()]
        held = itertools.zip_longest(self.parameter_names, map(described, self.gradients))
        for found, expected in itertools.zip_longest(held, needed):
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
        if not any(gradient.any() for gradient in self.gradients):
            raise UpdateError("The update is zero everywhere: it says nothing of any image.")
        if self.labels is not None and len(self.labels) != self.batch_size:
            raise BatchSizeError(
                f"The update is of {self.batch_size} images but {len(self.labels)} labels came "
                "with it. Expected one label an image."
            )
        if model_fingerprint(model) != self.model_fingerprint:
            raise UpdateError(
                "The update is from other weights. Pass the very model that the server sent."
            )


_ABOUT = ("parameter_names", "batch_size", "image_shape", "mode", "model_fingerprint", "defenses")


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
        if labels not in ("given", "withheld"):
            raise UpdateError(f"Unknown {labels=}. Expected 'given' or 'withheld'.")
        if statistics not in ("shared", "withheld"):
            raise UpdateError(f"Unknown {statistics=}. Expected 'shared' or 'withheld'.")
        model = in_mode(self.model, mode)
        check_parts(model, batch, defenses, fedavg)
        inputs, targets = prepared(model, batch)
        with torch.no_grad():
            found = batch_statistics(model.network, inputs) if statistics == "shared" else None
        gradients = local_update(
            model.network,
            trainable(model.network),
            inputs,
            targets,
            fedavg,
            label_smoothing=model.label_smoothing,
        )
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
    """Raise the error that fits unless a client with `model` can share an update on
    `batch` under a list of `defenses`, after the local training `fedavg`, if any.
    """
    if not isinstance(batch, LabeledImages) or not len(batch):
        raise DataError(f"Expected a batch of gipip.LabeledImages; got {described(batch)}.")
    if not isinstance(defenses, Sequence) or not all(map(_is_defense, defenses)):
        raise DefenseError(f"Expected a list, such as defenses=[defence]; got {defenses!r}.")
    if not isinstance(fedavg, FedAvg | None):
        raise UpdateError(f"Expected gipip.FedAvg(steps=…) as fedavg; got {fedavg!r}.")
    check_labels(batch.labels, count_classes(model, batch[:2]))


def _check_batch(model: ClientModel, update: SharedUpdate) -> None:
    """Raise the error that fits unless the update is of images that the model takes,
    each with a label if any.
    """
    shape = (update.batch_size, *update.image_shape)
    if len(shape) != 4 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UpdateError(
            f"batch_size={shape[0]!r}, image_shape={shape[1:]!r}: expected a whole number above 0, "
            "and three: channels, height and width, such as (3, 32, 32)."
        )
    some = torch.zeros(min(2, shape[0]), *shape[1:])
    batch = LabeledImages(some, torch.zeros(len(some), dtype=torch.int64))
    classes = count_classes(in_mode(model, update.mode), batch)
    if update.labels is not None:
        check_labels(update.labels, classes)


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
