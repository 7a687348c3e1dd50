"""Results, and the folder that keeps them: none is computed twice, none trusted if damaged."""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas
from jaxtyping import Float, Int
from torch import Tensor

from gipip.attacks.checkpoints import Checkpoint
from gipip.errors import DamagedFileError, StoreError
from gipip.experiments.scenario import Run
from gipip.files import read_kept, read_tensors, write_tensors


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run. `images` are matched one to one to `truth`; `metrics` has a row
    an image; `history` the terms of the cost.
    """

    run: Run
    images: Float[Tensor, "batch 3 height width"]
    truth: Float[Tensor, "batch 3 height width"]
    labels: Int[Tensor, "batch"]
    history: dict[str, Float[Tensor, "evaluations"]]
    metrics: pandas.DataFrame
    details: dict

    def frame(self) -> pandas.DataFrame:
        """The metrics with arm, scenario, batch and the attack's assumptions beside them."""
        told = {"labels", "statistics", "fedavg", "defenses"}  # by the assumptions
        scenario = self.run.scenario.model_dump(exclude=told)
        batch = ("pool", "classes", "distinct_labels", "batch_size", "seed")
        about = {
            "arm": self.run.arm,
            "iterations": self.run.attack.iterations,
            "seconds": self.details["seconds"],
            "returned": self.details["returned"],
            "machine": self.details["made"]["machine"],
            "code": self.details["made"].get("code", "an earlier version"),
            **self.details["assumptions"],
            **scenario,
            "batch": "-".join(str(scenario[name]) for name in batch),
        }
        rows = len(self.metrics)
        return self.metrics.assign(**{name: [value] * rows for name, value in about.items()})


class ResultStore:
    """A folder of results, one safetensors file each, written whole or not at all;
    below it, in "unfinished", attacks under way.

    A damaged file is reported, set aside as `KEY.damaged-TIME` and computed again.
    Raises StoreError when the folder cannot be written.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).absolute()  # workers may have been started elsewhere
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = "Give a folder you may write to."
            raise StoreError(f"{self.folder} cannot be written ({error}). {advice}") from error

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.key()}.safetensors"

    def checkpoint(self, run: Run, deadline: float = float("inf")) -> Checkpoint:
        """Where the run is kept while it is unfinished."""
        return Checkpoint(self.folder / "unfinished" / run.key(), deadline, run=run.key())

    def load(self, run: Run) -> Result | None:
        """The stored result of a run, or None if there is none that can be trusted."""
        return read_kept(self.path(run), partial(read_result, run=run))

    def save(self, result: Result) -> None:
        """Write a result, whole or not at all."""
        tensors = {"images": result.images, "truth": result.truth, "labels": result.labels}
        tensors |= {f"history/{name}": value for name, value in result.history.items()}
        metrics = result.metrics.to_dict(orient="list")
        about = result.details | {"metrics": metrics, "config": result.run.config()}
        with self._writing():
            write_tensors(self.path(result.run), tensors, about)


def read_result(path: Path, run: Run) -> Result:
    """The result of `run` in the file `path`; DamagedFileError if it holds anything else."""
    tensors, details = read_tensors(path)
    if details.pop("config", None) != run.config():
        raise DamagedFileError(f"{path} holds the result of another run.")
    metrics = pandas.DataFrame(details.pop("metrics"))
    history = {}
    for name in sorted(tensors):
        if name.startswith("history/"):
            history[name.removeprefix("history/")] = tensors[name]
    images, truth, labels = (tensors[name] for name in ("images", "truth", "labels"))
    return Result(run, images, truth, labels, history, metrics, details)
