"""What crosses the wire: a client computes an update on its private batch and shares it."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.swa_utils import update_bn

from gipip.data.datasets import LabeledImages
from gipip.errors import LabelError, ModelError, UpdateError
from gipip.federation.models import ClientModel, check_client_model, model_fingerprint, trainable
from gipip.files import canonical_json, fingerprint, read_tensors, write_tensors
from gipip.progress import progress, require_time


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
    inputs: Float[Tensor, "batch 3 height width"],
    labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    fedavg: FedAvg | None = None,
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    """What a client computes, and an attacker simulates: the gradient of the mean
    cross-entropy with respect to `parameters`.

    `inputs` are normalised, `labels` class indices or distributions over classes. With
    `fedavg` the mean gradient on the way of the local steps: (θ before − θ after) /
    (learning rate × steps). With `create_graph` it can be differentiated with respect
    to the inputs.
    """
    if fedavg is None:
        loss = nn.functional.cross_entropy(
            functional_call(network, dict(parameters), (inputs,)), labels
        )
        return torch.autograd.grad(loss, tuple(parameters.values()), create_graph=create_graph)
    current = dict(parameters)
    for step in range(fedavg.steps):
        rows = fedavg.rows(step, len(inputs))
        loss = nn.functional.cross_entropy(
            functional_call(network, current, (inputs[rows],)), labels[rows]
        )
        gradients = torch.autograd.grad(loss, tuple(current.values()), create_graph=create_graph)
        moved = zip(current.items(), gradients, strict=True)
        current = {
            name: parameter - fedavg.learning_rate * gradient
            for (name, parameter), gradient in moved
        }
        if not create_graph:
            current = {
                name: parameter.detach().requires_grad_() for name, parameter in current.items()
            }
    scale = fedavg.learning_rate * fedavg.steps
    return tuple(
        (before - after) / scale
        for before, after in zip(parameters.values(), current.values(), strict=True)
    )


Statistics = tuple[
    tuple[Float[Tensor, "_"], Float[Tensor, "_"]], ...
]  # each layer has a number of channels of its own


@contextlib.contextmanager
def batch_statistics(network: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects mean and variance per channel of what enters each BatchNorm layer, in
    the order of the forward pass run inside.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def collect(_, inputs: tuple[Tensor]) -> None:
        found.append((inputs[0].mean(dim=(0, 2, 3)), inputs[0].var(dim=(0, 2, 3), correction=0)))

    handles = [
        module.register_forward_pre_hook(collect)
        for module in network.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


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
    image_shape: tuple[int, int, int]
    labels: Int[Tensor, "batch"] | None
    mode: Literal["eval", "train"]
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
        shapes = [parameter.shape for parameter in parameters.values()]
        if tuple(parameters) != self.parameter_names or shapes != [
            gradient.shape for gradient in self.gradients
        ]:
            raise UpdateError(
                f"The update's {len(self.gradients)} gradients do not fit the model's {len(shapes)} parameters: it is from another "
                "architecture. Pass the model that the client trained."
            )
        if model_fingerprint(model) != self.model_fingerprint:
            raise UpdateError(
                "The update is from a model with other weights. Pass the very model that the server sent to the client."
            )
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
        statistics: Literal["shared", "withheld"] = "withheld",
        fedavg: FedAvg | None = None,
        defenses: Sequence = (),
    ) -> SharedUpdate:
        """The update of `batch`: FedSGD's one gradient of the mean cross-entropy, or
        with `fedavg` what local training changes.

        `labels`: "given" also shares the labels, which is what most attacks in the
        literature assume; "withheld" leaves the attacker to infer them. `statistics`:
        "shared" gives away the private batch's BatchNorm statistics. `defenses` (see
        `gipip.defenses`) are applied in their order. Raises LabelError for a label
        outside the model's classes, ModelError when the model cannot take the images.
        """
        model = copy.deepcopy(
            self.model
        ).eval()  # a copy: train mode would move the running statistics
        device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
        images, targets = batch.images.to(device, dtype), batch.labels.to(device)
        _check_labels(targets, _classes(model, images))
        model.train(mode == "train")
        with torch.no_grad(), batch_statistics(model) as found:
            if statistics == "shared":
                model(images)
        gradients = local_update(
            model.network, trainable(model.network), model.normalize(images), targets, fedavg
        )
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


def train_federated(
    model: ClientModel,
    images: LabeledImages,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 0.05,
    defenses: Sequence = (),
    seed: int = 0,
    store: Path | str | None = None,
) -> ClientModel:
    """A copy of `model` trained by FedSGD on what clients share under `defenses`, in
    eval mode: what a defence leaves of its use.

    Each step a client with `batch_size` random images shares its update and the server
    takes a step of SGD with momentum 0.9, its rate falling to zero along a cosine.
    BatchNorm is in eval mode while clients compute, as DP-SGD needs it; its running
    statistics are set anew from 200 of the images every 20 steps, and from all of them
    in the end. So that this does not diverge, the server scales every update down to a
    norm of at most 1. With a `store` (a folder) a finished training of the same model
    and settings on the same images is loaded instead of repeated.
    """
    settings = {
        "steps": steps,
        "batch size": batch_size,
        "learning rate": learning_rate,
        "seed": seed,
    }
    settings |= {
        "model": model_fingerprint(model),
        "data": images.fingerprint,
        "defenses": [defense.model_dump() for defense in defenses],
    }
    path = (
        Path(store) / "clients" / f"{fingerprint({}, canonical_json(settings))[:24]}.safetensors"
        if store
        else None
    )
    model = copy.deepcopy(model).to(
        memory_format=torch.channels_last
    )  # convnet16 takes a fifth less time on a CPU
    if path and path.exists():
        model.load_state_dict(read_tensors(path)[0])
        return model.eval()
    require_time()
    parameters = tuple(trainable(model).values())
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for step in progress(range(steps), description="training", unit="step"):
        if step % 20 == 0:
            _set_statistics(model, images[torch.randperm(len(images), generator=generator)[:200]])
        update = Client(model).share(
            images[torch.randint(len(images), (batch_size,), generator=generator)],
            defenses=defenses,
        )
        for parameter, gradient in zip(parameters, update.gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    _set_statistics(model, images)
    if path:
        write_tensors(path, model.state_dict(), settings)
    return model


def _set_statistics(model: ClientModel, images: LabeledImages) -> None:
    update_bn([images[rows].images for rows in torch.arange(len(images)).split(200)], model)
    model.eval()


@torch.no_grad()
def _classes(model: ClientModel, images: Float[Tensor, "batch 3 height width"]) -> int:
    """How many classes the model knows, found with the first image."""
    try:
        return model(images[:1]).shape[1]
    except RuntimeError as error:
        raise ModelError(
            f"The model cannot take a batch of shape {tuple(images.shape)} ({error}). Build it for images of this size: "
            f"build_model(…, image_size={images.shape[-1]})."
        ) from error


def _check_labels(labels: Int[Tensor, "batch"], classes: int) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise LabelError(
            f"Label {int(wrong[0])} is out of range: the model has {classes} classes, so labels go from 0 to {classes - 1}. "
            "Build the model with num_classes of your data."
        )
