"""Gradients and weights of other code, in the order of a model's parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from gipip.data.datasets import described
from gipip.errors import UpdateError
from gipip.federation.models import ClientModel, Mode, trainable

Given = Mapping[str, Any] | Sequence[Any]
"""Tensors or numpy arrays, by name or in order."""


def gradients_of(model: ClientModel, given: Given | None) -> tuple[Tensor, ...]:
    """One a trainable parameter, zero where the loss does not reach it; `given` may be
    None for what `loss.backward()` left in the model.
    """
    parameters = trainable(model)
    if given is None:
        given = [parameter.grad for parameter in parameters.values()]
        if all(gradient is None for gradient in given):
            raise UpdateError(
                "The model holds no gradients. Call loss.backward() on it first, or pass them."
            )
    if not isinstance(given, Mapping):
        given = _in_order(given, [list(parameters)], "model.parameters() that are trained")
    found = _by_full_name(model, given)
    _require_names(found, parameters)
    missing = {name: torch.zeros_like(value) for name, value in parameters.items()}
    return tuple(
        missing[name] if found[name] is None else _tensor(name, found[name]).to(value.device)
        for name, value in parameters.items()
    )


def mean_local_gradient(
    model: ClientModel, before: Given, after: Given, scale: float
) -> tuple[tuple[Tensor, ...], Mode | None]:
    """(before − after) / `scale` of each trainable parameter, and in which mode the
    client trained: "train" when the running statistics moved, None when they are not
    given.

    Raises UpdateError unless both are the model's by name, shape and type, and the model
    holds `before`.
    """
    old, new = (_weights_of(model, given) for given in (before, after))
    _require_names(new, old)
    held = model.state_dict()
    for name, value in old.items():
        if not torch.equal(held[name], value):
            raise UpdateError(
                f"The model's {name} is not what `before` holds. Give the model the weights that "
                "the server sent: network.load_state_dict(…)."
            )
    parameters = trainable(model)
    _require_names(old, parameters)
    gradients = tuple((old[name] - new[name]) / scale for name in parameters)
    running = [name for name in old if name.endswith(("running_mean", "running_var"))]
    moved = any(not torch.equal(old[name], new[name]) for name in running)
    return gradients, ("train" if moved else "eval") if running else None


def _weights_of(model: ClientModel, given: Given) -> dict[str, Tensor]:
    """By their names in model.state_dict(), on the model's device."""
    held = model.state_dict()
    if not isinstance(given, Mapping):
        network = [f"network.{name}" for name in model.network.state_dict()]
        parameters = [name for name, _ in model.named_parameters()]
        orders = [network, parameters, list(trainable(model)), list(held)]
        given = _in_order(given, orders, "network.state_dict(), with or without its buffers")
    found = {name: _tensor(name, value) for name, value in _by_full_name(model, given).items()}
    for name, value in found.items():
        if described(value) != described(held[name]):
            raise UpdateError(
                f"{name} is {described(value)} where the model has {described(held[name])}. Pass "
                "the model that the client trained."
            )
    return {name: value.to(held[name].device) for name, value in found.items()}


def _in_order(given: Sequence[Any], orders: list[list[str]], expected: str) -> dict[str, Any]:
    """The names of that order which has as many."""
    if not isinstance(given, Sequence):
        raise UpdateError(f"Expected a list or a dict of tensors; got {described(given)}.")
    names = next((order for order in orders if len(order) == len(given)), None)
    if names is None:
        counts = " or ".join(map(str, sorted({len(order) for order in orders})))
        raise UpdateError(
            f"{len(given)} tensors were given; the model has {counts}. Expected a list in the "
            f"order of {expected}, or a dict by name."
        )
    return dict(zip(names, given, strict=True))


def _by_full_name(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """With the names that the ClientModel has, which are the network's after "network."."""
    held = model.state_dict()
    found = {name if name in held else f"network.{name}": given[name] for name in given}
    if unknown := sorted(found.keys() - held.keys()):
        raise UpdateError(
            f"The model has nothing of the name {unknown[0].removeprefix('network.')!r}. Expected "
            f"names of network.state_dict(), such as {list(held)[-1].removeprefix('network.')!r}."
        )
    return found


def _require_names(found: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    if missing := [name for name in needed if name not in found]:
        raise UpdateError(f"{missing[0]} is missing. Expected all that the client trains.")


def _tensor(name: str, value: Any) -> Tensor:
    """A copy, which stays when training goes on."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, numpy.ndarray | numpy.generic) and value.dtype.kind in "fiub":
        return torch.tensor(value)
    raise UpdateError(f"{name} is {described(value)}; expected a tensor or a numpy array.")
