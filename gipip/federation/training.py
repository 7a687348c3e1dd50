"""Federated training: what a server learns from what clients share under their defences."""

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from gipip.data.datasets import LabeledImages
from gipip.errors import UpdateError
from gipip.federation.client import Client, SharedUpdate, check_parts
from gipip.federation.defenses import DPSGD, Defense
from gipip.federation.models import ClientModel, model_fingerprint, trainable
from gipip.files import canonical_json, fingerprint, read_kept, read_tensors, write_tensors
from gipip.progress import progress, require_time

Defenses = Sequence[Defense]


def train_federated(
    model: ClientModel,
    images: LabeledImages,
    *,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 0.05,
    defenses: Defenses = (),
    seed: int = 0,
    store: Path | str | None = None,
) -> ClientModel:
    """A copy of `model` trained by FedSGD on what clients share under `defenses`, in
    eval mode: what a defence leaves of its use.

    Each step a client with `batch_size` random images shares its update and the server
    takes a step of SGD with momentum 0.9, its rate falling to zero along a cosine.
    BatchNorm is in eval mode while clients compute; its running statistics are set anew
    from 200 of the images every 20 steps, and from all of them in the end. So that this
    does not diverge, the server scales every update down to a norm of at most 1. With a
    `store` (a folder) a finished training of the same model and settings on the same
    images is loaded instead of repeated.

    Where DPSGD is the first defence, its ε for `steps` at a sample rate of `batch_size`
    / images holds for the trained model, as long as `model` tells nothing of the images
    and `seed`, from which the noise follows, stays secret. For that each image is in a
    batch by itself, with the probability of the sample rate (Poisson sampling); the sum
    is divided by `batch_size`, however many were drawn; the defences that come after do
    not see the images; and running statistics stay as they are in `model`. Take a model
    without: "convnet16-groupnorm".

    Raises UpdateError for settings that train nothing.
    """
    if min(steps, batch_size) < 1 or not 0 < learning_rate < math.inf or abs(seed) >= 2**63:
        raise UpdateError(
            "Expected steps and batch_size ≥ 1, a positive learning_rate and a seed below 2⁶³."
        )
    check_parts(model, images, defenses)
    private = len(defenses) > 0 and isinstance(defenses[0], DPSGD)
    numbers = {"steps": steps, "size": batch_size, "rate": learning_rate, "seed": seed}
    given = {"model": model_fingerprint(model), "data": images.fingerprint}
    policy = {"defenses": [defense.model_dump() for defense in defenses], "Poisson": private}
    settings = {**numbers, **given, **policy}
    name = fingerprint({}, canonical_json(settings))[:24]
    path = Path(store) / "clients" / f"{name}.safetensors" if store else None
    model = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # a fifth faster
    if path and (kept := read_kept(path, read_tensors)):
        model.load_state_dict(kept[0])
        return model
    require_time()
    updates = _private_updates if private else _updates
    shared = updates(model, images, defenses, batch_size, torch.Generator().manual_seed(seed))
    parameters = tuple(trainable(model).values())
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), description="training", unit="step"):
        for parameter, gradient in zip(parameters, next(shared).gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    if not private:
        _set_statistics(model, images)
    if path:
        write_tensors(path, model.state_dict(), settings)
    return model


def _updates(
    model: ClientModel, images: LabeledImages, defenses: Defenses, size: int, draw: torch.Generator
) -> Iterator[SharedUpdate]:
    """What the model's clients share, step by step, of batches drawn with replacement."""
    for step in itertools.count():
        if step % 20 == 0:
            _set_statistics(model, images[torch.randperm(len(images), generator=draw)[:200]])
        batch = images[torch.randint(len(images), (size,), generator=draw)]
        yield Client(model).share(batch, defenses=defenses)


def _private_updates(
    model: ClientModel, images: LabeledImages, defenses: Defenses, size: int, draw: torch.Generator
) -> Iterator[SharedUpdate]:
    """The same under DPSGD, of Poisson batches of the expected size. Only the noisy
    gradients depend on the images, and no two steps have the same noise.
    """
    dpsgd, *others = defenses
    assert isinstance(dpsgd, DPSGD)
    names, shape = tuple(trainable(model)), tuple(images.pixels.shape[1:])
    while True:
        batch = images[torch.rand(len(images), generator=draw) < size / len(images)]
        seed = int(torch.randint(2**62, (), generator=draw))
        gradients = tuple(dpsgd.noisy_mean(model, batch, size, seed))
        state = model_fingerprint(model)
        update = SharedUpdate(gradients, names, size, shape, None, "eval", state)
        for defense in others:
            update = defense(update)
        yield update


def _set_statistics(model: ClientModel, images: LabeledImages) -> None:
    update_bn([images[rows].images for rows in torch.arange(len(images)).split(200)], model)
    model.eval()


@torch.no_grad()
def accuracy(model: ClientModel, images: LabeledImages) -> float:
    """Share of the images that the model, in eval mode, puts in their class; in [0, 1]."""
    model = copy.deepcopy(model).cpu().eval()
    parts = torch.arange(len(images)).split(250)
    predicted = torch.cat([model(images[rows].images).argmax(dim=1) for rows in parts])
    return (predicted == images.labels).double().mean().item()
