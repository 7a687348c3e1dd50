"""What the trainings of all priors share."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from gipip.data.datasets import LabeledImages
from gipip.errors import DataError
from gipip.files import canonical_json, fingerprint
from gipip.progress import require_time


def told(auxiliary: LabeledImages, arguments: Mapping[str, Any]) -> dict:
    """The provenance of a training with these arguments, which are checked.

    Raises DataError for a setting that is no positive number.
    """
    settings = {n: value for n, value in arguments.items() if n not in ("auxiliary", "store")}
    for name, value in settings.items():
        _check(name, value)
    return {"data": auxiliary.fingerprint, "images": len(auxiliary), "settings": settings}


def _check(name: str, value: Any) -> None:
    if isinstance(value, bool):
        return
    if name == "seed":
        wrong = not isinstance(value, int) or not 0 <= value < 2**63
        expected = "a whole number from 0 to 2⁶³ − 1"
    elif isinstance(value, float) or name == "learning_rate":
        wrong, expected = not (math.isfinite(value) and value > 0), "a number above 0"
    else:
        wrong, expected = not isinstance(value, int) or value < 1, "a whole number above 0"
    if wrong:
        raise DataError(f"{name}={value!r} cannot be trained with: expected {expected}.")


def kept(store: Path | str | None, provenance: dict) -> Path | None:
    """Where a training of this provenance is kept in the store, if there is one.

    Raises OutOfTime when it is not there and the time is over.
    """
    name = fingerprint({}, canonical_json(provenance))[:24]
    path = Path(store) / "priors" / f"{name}.safetensors" if store else None
    if not (path and path.exists()):
        require_time()
    return path


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """First weights drawn inside follow from the seed; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed the GPUs
        yield
