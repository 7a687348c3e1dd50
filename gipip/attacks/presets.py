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
    """Settings of `attack` ("GIPIP", or its baseline "InvertingGradients") in GI-PIP's public code."""
    _look_up(_RELEASED_WEIGHTS, dataset, batch_size, "GI-PIP's code holds weights")
    common = {"iterations": _RELEASED_ITERATIONS[dataset], **_RELEASED_OPTIMIZER}
    if attack == "InvertingGradients":
        return common | {"tv_weight": _RELEASED_BASELINE_TV[dataset], "signed": True}
    tv_weight, as_weight = _RELEASED_WEIGHTS[dataset][batch_size]
    return common | {"tv_weight": tv_weight, "as_weight": as_weight, "signed": False, "score_per": "batch"}


def tuned(attack: str, dataset: str, batch_size: int) -> dict:
    """Settings of `attack` found by `gipip tune` on tuning images, from `data/tuned.json`."""
    table = json.loads((DATA / "tuned.json").read_text())["settings"]
    weights = {data: {int(size): settings for size, settings in sizes.items()} for data, sizes in table.items()}
    return _look_up(weights, dataset, batch_size, "Tuned weights are shipped")[attack]


def _look_up(table: dict, dataset: str, batch_size: int, what: str):
    if dataset not in table:
        raise DataError(f"{what} for {', '.join(table)}, not for {dataset!r}. Give the weights by keyword instead of the preset.")
    if batch_size not in table[dataset]:
        sizes = ", ".join(map(str, table[dataset]))
        raise BatchSizeError(f"{what} for batch sizes {sizes}, not for {batch_size}. Take one of these or give the weights by keyword.")
    return table[dataset][batch_size]
