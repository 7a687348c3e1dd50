"""Results that ship with gipip because they take hours: files that `data/ship_results.py` made.

results = gipip.sweep(runs, store="results", shipped=gipip.ShippedResults())
"""

from collections.abc import Iterable
from pathlib import Path

import pandas
import torch

from gipip.errors import DataError
from gipip.experiments.scenario import Run, Scenario, result_key
from gipip.experiments.store import Result
from gipip.files import DATA, read_tensors, write_tensors


class ShippedResults:
    """Those in all files of a folder, found by their runs.

    Images have 8 bits a channel, and there is no history; metrics are those of the
    images as they were computed. An earlier version of the code may have computed them:
    the column `code` of their frame says which. Raises DamagedFileError for a file that
    is not as it was written.
    """

    def __init__(self, folder: Path | str = DATA / "study"):
        self._images: dict[str, torch.Tensor] = {}
        self._about: dict[str, dict] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            images, about = read_tensors(path)
            self._images |= images
            self._about |= about

    @property
    def seconds(self) -> float:
        """That all of them together took to compute."""
        return sum(details["seconds"] for details in self._about.values())

    def load(self, run: Run) -> Result | None:
        """The result of a run, or None if it does not ship."""
        key = run.key(code="")
        if key not in self._images:
            return None
        details = dict(self._about[key])
        return Result(
            run,
            self._images[key] / 255,
            run.scenario.batch().images,
            torch.tensor(details.pop("labels")),
            {},
            pandas.DataFrame(details.pop("metrics")),
            details,
        )


def ship(results: Iterable[Path], target: Path | str) -> Path:
    """Write the results in files of a store to one file, which `ShippedResults` reads.

    Raises DataError when there are none, or when several versions of an attack's code
    computed them.
    """
    images, about = {}, {}
    versions: dict[str, str] = {}
    for path in results:
        tensors, details = read_tensors(path)
        config, code = details["config"], details["made"]["code"]
        attack = config["attack"]["name"]
        if versions.setdefault(attack, code) != code:
            advice = "Compute all of them with one version, in a store of its own."
            raise DataError(f"{path} holds a result of {attack} by other code. {advice}")
        key = result_key(config, Scenario(**config["scenario"]), code="")
        images[key] = (tensors["images"] * 255).round().to(torch.uint8)
        about[key] = details | {"labels": tensors["labels"].tolist()}
    if not images:
        raise DataError("There are no such results. Look at the store and what is wanted of it.")
    return write_tensors(target, images, about)
