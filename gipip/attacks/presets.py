"""Published and tuned hyperparameters, kept apart: what the public code does, and what
gipip found on tuning images.
"""

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
    """Settings of `attack` ("GIPIP", or its baseline "InvertingGradients") in GI-PIP's
    public code.

    Raises DataError or BatchSizeError for a data set or batch size that the code has no
    weights for.
    """
    if dataset not in _RELEASED_WEIGHTS:
        known = ", ".join(_RELEASED_WEIGHTS)
        raise DataError(
            f"GI-PIP's code holds weights for {known}, not for {dataset!r}. Give the weights by keyword."
        )
    tv_weight, as_weight = _at_batch_size(
        _RELEASED_WEIGHTS[dataset], batch_size, "GI-PIP's code holds weights"
    )
    common = {"iterations": _RELEASED_ITERATIONS[dataset], **_RELEASED_OPTIMIZER}
    if attack == "InvertingGradients":
        return common | {"tv_weight": _RELEASED_BASELINE_TV[dataset], "signed": True}
    return common | {
        "tv_weight": tv_weight,
        "as_weight": as_weight,
        "signed": False,
        "score_per": "batch",
    }


def tuned(attack: str, condition: str) -> dict:
    """Weights of `attack` found by `gipip tune` on tuning images for `condition`, such
    as "cifar10/convnet/B=4", from `data/tuned.json`.

    `Scenario.condition` gives the key. Raises DataError when none are shipped.
    """
    table = json.loads((DATA / "tuned.json").read_text())["settings"]
    if attack not in table.get(condition, {}):
        near = ", ".join(
            sorted(
                key
                for key in table
                if key.split("/")[0] == condition.split("/")[0] and attack in table[key]
            )
        )
        raise DataError(
            f"No tuned weights of {attack} are shipped for {condition!r}. Shipped: {near or 'none'}. "
            "Run `gipip tune`, or give the weights by keyword."
        )
    return table[condition][attack]


def _at_batch_size(table: dict, batch_size: int, what: str):
    if batch_size not in table:
        sizes = ", ".join(map(str, table))
        raise BatchSizeError(
            f"{what} for batch sizes {sizes}, not for {batch_size}. Take one of these or give the weights by keyword."
        )
    return table[batch_size]
