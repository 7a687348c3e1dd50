"""Results, and the folder in which they are kept, so that nothing is computed twice."""

import ast
import contextlib
import functools
import hashlib
import platform
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor

from gipip.attacks.checkpoints import Checkpoint
from gipip.errors import DamagedFileError, StoreError
from gipip.experiments.scenario import Run
from gipip.files import read_tensors, set_aside, write_tensors

_COMPUTING = (  # what a result depends on, as patterns of files of the package
    "attacks/**/*.py",
    "federation/*.py",
    "priors/*.py",
    "evaluation/metrics.py",
    "experiments/scenario.py",
)


@dataclass(frozen=True, eq=False)
class Result:
    """A finished run. `images` are matched one to one to `truth`; `metrics` has a row
    an image; `history` the terms of the cost. `details`: the attack's assumptions and
    notes, its seconds, the machine (`made`) and the version of what computed it (`code`).
    """

    run: Run
    images: Float[Tensor, "batch 3 height width"]
    truth: Float[Tensor, "batch 3 height width"]
    labels: Int[Tensor, "batch"]
    history: dict[str, Float[Tensor, "evaluations"]]
    metrics: pandas.DataFrame
    details: dict

    def frame(self) -> pandas.DataFrame:
        """The metrics with arm, scenario, batch and the attack's assumptions in further
        columns.
        """
        told = {"labels", "statistics", "fedavg", "defenses"}  # by the assumptions
        about = self.run.scenario.model_dump(exclude=told)
        drawn = ("pool", "classes", "distinct_labels", "batch_size", "seed")
        about["batch"] = "-".join(str(about[name]) for name in drawn)
        rows = self.metrics.assign(
            arm=self.run.arm,
            iterations=self.run.attack.iterations,
            seconds=self.details["seconds"],
            returned=self.details["returned"],
            machine=self.details["made"]["machine"],
            code=self.details["code"] or "an earlier version",
            **self.details["assumptions"],
        )
        return rows.assign(**{name: [value] * len(rows) for name, value in about.items()})


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
            raise StoreError(
                f"The result store {self.folder} cannot be written ({error}). {advice}"
            ) from error

    def path(self, run: Run) -> Path:
        """The file of a run's result."""
        return self.folder / f"{run.key()}.safetensors"

    def checkpoint(self, run: Run, deadline: float) -> Checkpoint:
        """Where the run is kept while it is unfinished; other code begins it anew."""
        key = run.key()
        path = self.folder / "unfinished" / key
        return Checkpoint(path, deadline, run=f"{key} by {code_version()}")

    def load(self, run: Run) -> Result | None:
        """The stored result of a run, or None if there is none that can be trusted: what
        other code computed (see `code_version`) is left where it is, until it is
        computed again.
        """
        path = self.path(run)
        try:
            result = read_result(path, run)
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            aside = set_aside(path).name
            warnings.warn(
                f"{error} It is set aside as {aside} and the run is computed again.", stacklevel=2
            )
            return None
        return result if result.details["code"] == code_version() else None

    def save(self, result: Result) -> None:
        """Keep the result, in place of an earlier one of its run."""
        tensors = {"images": result.images, "truth": result.truth, "labels": result.labels}
        tensors |= {f"history/{name}": value for name, value in result.history.items()}
        metrics = result.metrics.to_dict(orient="list")
        about = result.details | {"metrics": metrics, "config": result.run.config()}
        with self._writing():
            write_tensors(self.path(result.run), tensors, about)


def read_result(path: Path, run: Run) -> Result:
    """The result of `run` in the file `path`, whatever code computed it (None in
    `details["code"]`: from before that was noted). Raises DamagedFileError if the file
    holds anything else.
    """
    tensors, details = read_tensors(path)
    if details.pop("config", None) != run.config():
        raise DamagedFileError(f"{path} holds the result of another run.")
    metrics = pandas.DataFrame(details.pop("metrics"))
    named = [tensors.pop(name) for name in ("images", "truth", "labels")]
    history = {name.removeprefix("history/"): tensors[name] for name in sorted(tensors)}
    return Result(run, *named, history, metrics, {"code": None} | details)


@functools.cache
def code_version() -> str:
    """Of the code that a result depends on: 16 hex digits, which comments and
    docstrings do not change.
    """
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for pattern in _COMPUTING:
        for path in sorted(package.glob(pattern)):
            code = _WithoutDocstrings().visit(ast.parse(path.read_bytes()))
            digest.update(f"{path.relative_to(package)}\n{ast.unparse(code)}\n".encode())
    return digest.hexdigest()[:16]


class _WithoutDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


def provenance() -> dict:
    """The machine that computes here, the versions that matter, and the date."""
    machine = f"{platform.machine()} CPU, one thread"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"machine": machine, "versions": versions, "date": datetime.now(UTC).date().isoformat()}
