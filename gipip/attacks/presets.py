"""Published and tuned hyperparameters, kept apart: what the public code does, and what gipip found on tuning images."""

import json

from gipip.errors import BatchSizeError, DataError
from gipip.files import DATA

RELEASED_OFFSETS = {"cifar10": 0.001, "imagenet64": 0.002}
"""The constant c of the anomaly score in GI-PIP's public code."""

_RELEASED_OPTIMIZER = {"learning_rate": 0.1, "schedule": "steps"}
_RELEASED_ITERATIONS = {"cifar10": 10_000, "imagenet64": 48_000}
_RELEASED_WEIGHTS = {  # data set → batch size → (λ_TV, λ_AS) of GI-PIP
    "cifar10": {1: (1e-6, 1e-6), 4: (1e-5, 1e-4), 8: (5e-4, 5e-4)},
    "imagenet64": {1: (1e-6, 1e-6), 4: (5e-4, 1e-4), 8: (5e-4, 5e-4)},
}
_RELEASED_BASELINE_TV = {"cifar10": 1e-6, "imagenet64": 1e-4}


def released(attack: str, dataset: str, batch_size: int) -> dict:
    """Settings of `attack` ("GIPIP", or its baseline "InvertingGradients") in GI-PIP's public code.

    Raises DataError or BatchSizeError for a data set or batch size that the code has no weights for.
    """
    if dataset not in _RELEASED_WEIGHTS:
        known = ", ".join(_RELEASED_WEIGHTS)
        raise DataError(f"GI-PIP's code holds weights for {known}, not for {dataset!r}. Give the weights by keyword.")
    tv_weight, as_weight = _at_batch_size(_RELEASED_WEIGHTS[dataset], batch_size, "GI-PIP's code holds weights")
    common = {"iterations": _RELEASED_ITERATIONS[dataset], **_RELEASED_OPTIMIZER}
    if attack == "InvertingGradients":
        return common | {"tv_weight": _RELEASED_BASELINE_TV[dataset], "signed": True}
    return common | {"tv_weight": tv_weight, "as_weight": as_weight, "signed": False, "score_per": "batch"}


def tuned(attack: str, dataset: str, model: str, batch_size: int) -> dict:
    """Weights of `attack` found by `gipip tune` on tuning images, from `data/tuned.json`."""
    table = json.loads((DATA / "tuned.json").read_text())["settings"].get(dataset, {})
    if model not in table:
        raise DataError(f"No tuned weights are shipped for {dataset!r} and {model!r}. Run `gipip tune`, or give the weights by keyword.")
    sizes = {int(size): settings for size, settings in table[model].items()}
    return _at_batch_size(sizes, batch_size, "Tuned weights are shipped")[attack]


def _at_batch_size(table: dict, batch_size: int, what: str):
    if batch_size not in table:
        sizes = ", ".join(map(str, table))
        raise BatchSizeError(f"{what} for batch sizes {sizes}, not for {batch_size}. Take one of these or give the weights by keyword.")
    return table[batch_size]
