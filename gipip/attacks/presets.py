"""Published and tuned hyperparameters, kept apart: what the public code does, and what
gipip found on tuning images.
"""

import json

from gipip.errors import BatchSizeError, DataError
from gipip.files import DATA

RELEASED_OFFSETS = {"cifar10": 0.001, "imagenet64": 0.002}
"""The constant c of the anomaly score in GI-PIP's public code."""

_BY_KEYWORD = "Give the weights by keyword."
_RELEASED_OPTIMIZER = {"learning_rate": 0.1, "schedule": "steps", "signed": False}
_RELEASED_ITERATIONS = {"cifar10": 10_000, "imagenet64": 48_000}
_RELEASED_WEIGHTS = {  # data set → batch size → (λ_TV, λ_AS) of GI-PIP
    "cifar10": {1: (1e-6, 1e-6), 4: (1e-5, 1e-4), 8: (5e-4, 5e-4)},
    "imagenet64": {1: (1e-6, 1e-6), 4: (5e-4, 1e-4), 8: (5e-4, 5e-4)},
}
_RELEASED_BASELINE_TV = {"cifar10": 1e-6, "imagenet64": 1e-4}


def released(attack: str, dataset: str, batch_size: int) -> dict:
    """Settings of `attack` ("GIPIP", or its baseline "InvertingGradients") in GI-PIP's public code.

    Both take plain Adam: that code has an option for the gradient's sign, and never
    reads it. Raises DataError or BatchSizeError for a data set or batch size that the
    code has no weights for.
    """
    weights = _RELEASED_WEIGHTS.get(dataset)
    if weights is None:
        known = ", ".join(_RELEASED_WEIGHTS)
        raise DataError(
            f"GI-PIP's code holds weights for {known}, not for {dataset!r}. {_BY_KEYWORD}"
        )
    if batch_size not in weights:
        sizes = ", ".join(map(str, weights))
        raise BatchSizeError(
            f"GI-PIP's code holds weights for batch sizes {sizes}, not for {batch_size}. "
            f"Take one of these, or: {_BY_KEYWORD}"
        )
    common = {"iterations": _RELEASED_ITERATIONS[dataset], **_RELEASED_OPTIMIZER}
    if attack == "InvertingGradients":
        return common | {"tv_weight": _RELEASED_BASELINE_TV[dataset]}
    tv_weight, as_weight = weights[batch_size]
    return common | {"tv_weight": tv_weight, "as_weight": as_weight, "score_per": "batch"}


def tuned(arm: str, condition: str) -> dict:
    """Settings of an arm found on tuning images for a condition, such as "cifar10/convnet/B=4".

    They ship in `data/tuned.json`; `Scenario.condition` gives the key. Raises DataError
    when there are none.
    """
    table = json.loads((DATA / "tuned.json").read_text())["settings"]
    if arm in table.get(condition, {}):
        return table[condition][arm]
    dataset = condition.split("/")[0]
    near = [key for key in sorted(table) if key.split("/")[0] == dataset and arm in table[key]]
    raise DataError(
        f"No tuned weights of {arm} are shipped for {condition!r}. "
        f"Shipped: {', '.join(near) or 'none'}. {_BY_KEYWORD}"
    )
