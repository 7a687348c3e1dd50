"""Scenario × attack → Result, kept in a store, so that nothing is computed twice and an
interrupted sweep goes on where it was.
"""

import contextlib
import functools
import itertools
import json
import platform
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import dask
import distributed
import pandas
import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch import Tensor

from gipip.attacks import Attack
from gipip.attacks.checkpoints import Checkpoint
from gipip.data.datasets import Dataset, LabeledImages, load_dataset
from gipip.errors import DamagedFileError, DataError, OutOfTime, StoreError, SweepError
from gipip.evaluation.metrics import evaluate
from gipip.evaluation.statistics import Interval, bootstrap_interval, paired_difference, verdict
from gipip.experiments.cluster import as_finished, can_run, connected_workers, open_cluster
from gipip.experiments.forecast import expected_time
from gipip.federation.client import Client, FedAvg, SharedUpdate
from gipip.federation.defenses import AnyDefense
from gipip.federation.models import ClientModel, build_model, load_model, model_fingerprint
from gipip.files import DATA, canonical_json, fingerprint, read_tensors, set_aside, write_tensors
from gipip.progress import announce, progress, quiet, require_time, time_limit


class Scenario(BaseModel):
    """One private batch of one client: what is attacked.

    `pool`: "private" for what is reported, "tuning" for choosing weights. `classes`:
    only images of these (none given: of all). `seed`: which batch of the pool.
    `model_seed`: the weights of an untrained client; `epochs`: above 0 the trained one
    that ships. `mode`: BatchNorm in eval or train mode. `labels`, `statistics`: shared
    with the update, or withheld. `fedavg`: local training before sharing. `defenses`:
    what the client does to its update, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = "cifar10"
    pool: Literal["private", "tuning"] = "private"
    classes: tuple[int, ...] = ()
    model: str = "convnet"
    model_seed: int = 0
    epochs: NonNegativeInt = 0
    batch_size: PositiveInt = 1
    seed: int = 0
    distinct_labels: bool = True
    mode: Literal["eval", "train"] = "eval"
    labels: Literal["given", "withheld"] = "given"
    statistics: Literal["shared", "withheld"] = "withheld"
    fedavg: FedAvg | None = None
    defenses: tuple[AnyDefense, ...] = ()

    def batch(self) -> LabeledImages:
        """The private (or tuning) images."""
        draw = getattr(_dataset(self.dataset, self.classes), self.pool)
        return draw(
            batch_size=self.batch_size, seed=self.seed, distinct_labels=self.distinct_labels
        )

    def client_model(self) -> ClientModel:
        """The client's model, the same for the same seed or number of epochs."""
        if self.epochs:
            return load_model(self.model, self.dataset, self.epochs)
        data = _dataset(self.dataset)
        return build_model(
            self.model,
            data.num_classes,
            image_size=data.image_size,
            mean=data.mean,
            std=data.std,
            seed=self.model_seed,
        )

    def update(self, model: ClientModel) -> SharedUpdate:
        """What the client shares."""
        options = {"mode": self.mode, "labels": self.labels, "statistics": self.statistics}
        return Client(model).share(
            self.batch(), **options, fedavg=self.fedavg, defenses=self.defenses
        )

    @property
    def condition(self) -> str:
        """What attack weights are tuned for, as a key of data/tuned.json: data set,
        model, batch size, defences, local steps.

        Not in it: which images and labels, the seeds, BatchNorm's mode, and the local
        steps' mini-batches and learning rate.
        """
        parts = [
            self.dataset.split("-")[0],
            f"{self.model}@{self.epochs}" if self.epochs else self.model,
            f"B={self.batch_size}",
        ]
        parts += [f"FedAvg {self.fedavg.steps}"] if self.fedavg else []
        return "/".join([*parts, *map(str, self.defenses)])


@functools.cache
def _dataset(name: str, classes: tuple[int, ...] = ()) -> Dataset:
    data = load_dataset(name)
    return data.restricted(classes) if classes else data


@dataclass(frozen=True)
class Run:
    """One attack on one scenario. `arm` names the attack in tables and figures; it is
    no part of the result's key.
    """

    arm: str
    scenario: Scenario
    attack: Attack

    def config(self) -> dict:
        """Everything the result depends on, as JSON."""
        attack = {"name": type(self.attack).__name__, **self.attack.model_dump(mode="json")}
        return {"scenario": self.scenario.model_dump(mode="json"), "attack": attack}

    def key(self) -> str:
        """Hash of the configuration and of the fingerprints of private images, client
        weights and prior (which the attack names).
        """
        model, batch = _fingerprints(self.scenario)
        return fingerprint({}, canonical_json(self.config() | {"model": model, "batch": batch}))[
            :32
        ]


@functools.cache
def _fingerprints(scenario: Scenario) -> tuple[str, str]:
    about = scenario.model_dump(include={"dataset", "model", "model_seed", "epochs"})
    return _weights_fingerprint(**about), scenario.batch().fingerprint


@functools.cache
def _weights_fingerprint(**about) -> str:
    return model_fingerprint(Scenario(**about).client_model())


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
        """The metrics with arm, scenario, batch and the attack's assumptions in further
        columns.
        """
        scenario = self.run.scenario
        columns = scenario.model_dump(
            exclude={"labels", "statistics", "fedavg", "defenses"}
        )  # the assumptions tell of these
        columns["batch"] = "-".join(
            str(columns[name])
            for name in ("pool", "classes", "distinct_labels", "batch_size", "seed")
        )
        details = {
            "iterations": self.run.attack.iterations,
            "seconds": self.details["seconds"],
            "returned": self.details["returned"],
        }
        details["machine"] = self.details["made"]["machine"]
        rows = self.metrics.assign(arm=self.run.arm, **details, **self.details["assumptions"])
        return rows.assign(**{name: [value] * len(rows) for name, value in columns.items()})


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
            raise StoreError(
                f"The result store {self.folder} cannot be written ({error}). Give a folder you may write to."
            ) from error

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.key()}.safetensors"

    def checkpoint(self, run: Run, deadline: float = float("inf")) -> Checkpoint:
        """Where the run is kept while it is unfinished."""
        return Checkpoint(self.folder / "unfinished" / run.key(), deadline)

    def load(self, run: Run) -> Result | None:
        """The stored result of a run, or None if there is none that can be trusted."""
        path = self.path(run)
        try:
            return _read(path, run)
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            warnings.warn(
                f"{error} It is set aside as {set_aside(path).name} and the run is computed again.",
                stacklevel=2,
            )
            return None

    def save(self, result: Result) -> None:
        tensors = {"images": result.images, "truth": result.truth, "labels": result.labels}
        tensors |= {f"history/{name}": value for name, value in result.history.items()}
        metrics = result.metrics.to_dict(orient="list")
        with self._writing():
            write_tensors(
                self.path(result.run),
                tensors,
                result.details | {"metrics": metrics, "config": result.run.config()},
            )


def _read(path: Path, run: Run) -> Result:
    """The result of `run` in the file `path`; DamagedFileError if it holds anything else."""
    tensors, details = read_tensors(path)
    if details.pop("config", None) != run.config():
        raise DamagedFileError(f"{path} holds the result of another run.")
    history = {
        name.removeprefix("history/"): value
        for name, value in sorted(tensors.items())
        if name.startswith("history/")
    }
    metrics = pandas.DataFrame(details.pop("metrics"))
    return Result(
        run, tensors["images"], tensors["truth"], tensors["labels"], history, metrics, details
    )


def execute(run: Run, store: ResultStore | None = None, *, deadline: float | None = None) -> Result:
    """The result of a run: loaded if the store has it, else computed and stored.

    On the GPU if there is one; on a CPU with one thread, so that a run gives the same
    images alone and in a sweep. With a store, an attack that was paused or killed goes
    on where it was. Raises OutOfTime when it is not finished at the `deadline`, in
    seconds since the epoch (default: GIPIP_DEADLINE in the environment, else none); DLG
    cannot pause and runs to its end.
    """
    if store and (result := store.load(run)):
        return result
    deadline = time_limit() if deadline is None else deadline
    require_time(deadline)
    checkpoint = store.checkpoint(run, deadline) if store else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with _alone_on_one_thread():
        model = run.scenario.client_model().to(device)
        truth = run.scenario.batch()
        reconstruction = run.attack(model, run.scenario.update(model), checkpoint=checkpoint)
        if reconstruction.interrupted:  # half a result must not be stored as a whole one
            raise KeyboardInterrupt
        metrics = evaluate(reconstruction, truth, model=model).to_dict(orient="list")
    details = {
        "assumptions": reconstruction.assumptions,
        "returned": reconstruction.returned,
        "restart_costs": [
            cost if cost < float("inf") else None for cost in reconstruction.restart_costs
        ],
        "notes": reconstruction.notes,
        "seconds": reconstruction.seconds,
        "engine": reconstruction.engine,
        "made": provenance(),
    }
    metrics, details = json.loads(
        canonical_json([metrics, details])
    )  # these and the history as they come back from the store
    history = dict(sorted(reconstruction.history.items()))
    images, labels = (
        reconstruction.images[metrics["matched"]],
        reconstruction.labels[metrics["matched"]],
    )
    result = Result(run, images, truth.images, labels, history, pandas.DataFrame(metrics), details)
    if store:
        store.save(result)
        checkpoint.remove()
    return result


_executing = threading.Lock()


@contextlib.contextmanager
def _alone_on_one_thread() -> Iterator[None]:
    """One run at a time in a process: the number of threads and the generator that
    models are drawn from are global.
    """
    with _executing:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def provenance() -> dict:
    """The machine that computes here, the versions that matter, and the date."""
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, one thread"
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"machine": machine, "versions": versions, "date": datetime.now(UTC).date().isoformat()}


class Results(Sequence):
    """The results of a sweep, in the order of its runs."""

    def __init__(self, results: Iterable[Result]):
        self._results = list(results)

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, index):
        return Results(self._results[index]) if isinstance(index, slice) else self._results[index]

    def select(self, **wanted) -> "Results":
        """The results whose arm or scenario fields have the given values, e.g.
        `select(arm="GIPIP", batch_size=4)`.
        """
        return Results(
            result
            for result in self
            if all(
                (result.run.arm if name == "arm" else getattr(result.run.scenario, name)) == value
                for name, value in wanted.items()
            )
        )

    @property
    def images(self) -> Float[Tensor, "batch 3 height width"]:
        """All reconstructions, in [0, 1]."""
        return torch.cat([result.images for result in self])

    @property
    def truth(self) -> Float[Tensor, "batch 3 height width"]:
        """The private images, in the same order."""
        return torch.cat([result.truth for result in self])

    def frame(self) -> pandas.DataFrame:
        """One row an image: arm, scenario, metrics and assumptions. Raises DataError
        when there are no results.
        """
        if not self:
            raise DataError(
                "There are no results to make a table of. Look at what was selected, or at the list of runs."
            )
        return pandas.concat([result.frame() for result in self], ignore_index=True)

    def table(self, metrics: Sequence[str] = ("psnr", "ssim", "lpips")) -> pandas.DataFrame:
        """A row for each model and its epochs, batch size, arm and assumptions: means
        with 95 % bootstrap intervals over batches.
        """
        assumptions = [
            "iterations",
            "labels",
            "BatchNorm",
            "local training",
            "defence",
            "auxiliary data",
            "machine",
        ]
        rows = []
        keys = ["model", "epochs", "batch_size", "arm", *assumptions]
        for (model, epochs, batch_size, arm, *about), part in self.frame().groupby(
            keys, sort=False
        ):
            intervals = {
                name: f"{bootstrap_interval(part[name], groups=part['batch']):.3f}"
                for name in metrics
            }
            about = dict(zip(assumptions, about, strict=True))
            model = f"{model}@{epochs}" if epochs else model
            rows.append(
                {
                    "model": model,
                    "batch size": batch_size,
                    "attack": arm,
                    "images": len(part),
                    **intervals,
                    **about,
                }
            )
        return pandas.DataFrame(rows)

    def difference(self, a: Mapping, b: Mapping, metric: str = "psnr") -> Interval:
        """Mean of a − b in `metric` over the private images that both attacked, with
        its 95 % bootstrap interval over batches.

        `a` and `b` select results as `select` does, such as {"arm": "GIPIP", "epochs":
        40}. Raises DataError when they share no image, or one of them attacked an image
        twice.
        """
        image = ["model_seed", "batch", "image"]
        parts = [self.select(**wanted) for wanted in (a, b)]
        if not all(parts):
            raise DataError(f"There is nothing to compare: no results of {a} or of {b}.")
        frames = [results.frame()[[*image, metric]] for results in parts]
        if any(frame.duplicated(image).any() for frame in frames):
            raise DataError(
                f"{a} or {b} has several results for one image: name a scenario's field too, e.g. mode='eval'."
            )
        pairs = frames[0].merge(frames[1], on=image, suffixes=("", "_baseline"))
        if pairs.empty:
            raise DataError(f"{a} and {b} share no image. Give both the same batches.")
        return paired_difference(pairs[metric], pairs[f"{metric}_baseline"], groups=pairs["batch"])

    def effect(self, arm: str, baseline: str, metric: str = "psnr", **where) -> Interval:
        """The `difference` of two arms on the scenarios that `where` selects."""
        return self.difference({"arm": arm, **where}, {"arm": baseline, **where}, metric)

    def effects(
        self, questions: Mapping[str, tuple[str, str]], metrics: Sequence[str] = ("psnr", "ssim")
    ) -> pandas.DataFrame:
        """A row for each model, batch size, question and metric: the `effect` of one
        arm over another, and the verdict that it is above 0.

        `questions`: {name: (arm, baseline)}.
        """
        scenarios = dict.fromkeys(
            (result.run.scenario.model, result.run.scenario.batch_size) for result in self
        )
        rows = []
        for (model, size), (question, arms), metric in itertools.product(
            scenarios, questions.items(), metrics
        ):
            effect = self.effect(*arms, metric, model=model, batch_size=size)
            comparison = f"{model}, B = {size}, {question}"
            images = effect.count * size
            rows.append(
                {
                    "comparison": comparison,
                    "metric": metric,
                    "images": images,
                    "effect": effect,
                    "verdict": verdict(effect),
                }
            )
        return pandas.DataFrame(rows)


def shipped_results(runs: Iterable[Run]) -> Results:
    """Those of the runs whose results ship with gipip (`data/results`), because they
    take hours: nothing is computed.
    """
    paths = {run: DATA / "results" / f"{run.key()}.safetensors" for run in runs}
    return Results(_read(path, run) for run, path in paths.items() if path.exists())


def sweep(
    runs: Iterable[Run],
    *,
    store: Path | str | ResultStore,
    workers: int | None = None,
    scheduler: str | None = None,
    resources: Mapping[str, float] | None = None,
) -> Results:
    """Execute runs side by side; those whose results are in the store are only loaded.

    `workers`: processes on this machine, each with one thread (default: two, or the
    number of cores if that is less). `scheduler`: the address of a running
    dask.distributed scheduler whose workers to use instead (default:
    DASK_SCHEDULER_ADDRESS in the environment); they must see the same store folder and
    work best with one thread each. `resources`: what a run needs of its worker, e.g.
    {"GPU": 1} for workers started with `--resources "GPU=1"`. Each result is stored as
    soon as it is there. A script must call this under `if __name__ == "__main__":`, as
    workers import it.

    A scenario that cannot be built (an unknown model, a batch that cannot be drawn) is
    refused before anything is computed. The run of a worker that is lost goes to
    another; SweepError when for five minutes there is none. A run that fails does not
    stop the others; at the end SweepError lists the failures. When the time that
    GIPIP_DEADLINE sets is over (seconds since the epoch) no further runs begin, those
    under way pause, and OutOfTime says how many are left; the same call goes on from
    there.
    """
    scheduler = scheduler or dask.config.get("scheduler-address", None)
    resources = {name: float(amount) for name, amount in (resources or {}).items()}
    if resources and not scheduler:
        raise SweepError(
            f"Workers on this machine offer no resources such as {resources}. Give the address of a cluster's scheduler."
        )
    runs = list(runs)
    store = store if isinstance(store, ResultStore) else ResultStore(store)
    results = {run.key(): store.load(run) for run in progress(runs, description="reading results")}
    missing = list({run.key(): run for run in runs if results[run.key()] is None}.values())
    missing.sort(
        key=lambda run: run.attack.iterations * run.scenario.batch_size, reverse=True
    )  # so no worker idles at the end
    failures = []
    if missing and time.time() < time_limit():
        with open_cluster(workers, scheduler, len(missing)) as client:
            announce(_forecast(client, missing, store, resources))
            failures = _execute_all(client, missing, store, resources)
    if failures:
        listing = "\n".join(f"- {run.arm} on {run.scenario}: {error!r}" for run, error in failures)
        raise SweepError(
            f"{len(failures)} of {len(runs)} runs failed; the other results are stored in {store.folder}:\n{listing}"
        )
    found = [store.load(run) for run in runs]
    if None in found:
        left = len({run.key() for run, result in zip(runs, found, strict=True) if result is None})
        if time.time() >= time_limit():
            raise OutOfTime(
                f"The time is over: {len(results) - left} of {len(results)} runs are finished, {left} are left."
            )
        raise StoreError(
            f"{left} results are not in {store.folder}. The workers must see this folder, under the same path."
        )
    return Results(found)


def _execute_all(
    client: distributed.Client, runs: list[Run], store: ResultStore, resources: dict[str, float]
) -> list[tuple[Run, BaseException]]:
    """Run everything on the cluster; gives the runs that failed and their errors."""
    limit = time_limit()
    futures = {
        client.submit(
            _work, run, store, limit, key=f"{run.arm}-{uuid.uuid4().hex}", resources=resources
        ): run
        for run in runs
    }
    failures = []
    for future in progress(
        as_finished(client, futures, resources),
        total=len(futures),
        description="attacks",
        unit="run",
    ):
        if future.status == "error":
            failures.append((futures[future], future.exception()))
        elif future.status == "cancelled":
            failures.append(
                (
                    futures[future],
                    ConnectionError("it was cancelled: the scheduler cannot be reached any more"),
                )
            )
        future.release()  # "lost": its worker died after it had finished and stored the result
    return failures


def _work(run: Run, store: ResultStore, deadline: float) -> None:
    with contextlib.suppress(
        OutOfTime
    ):  # no error, which a worker would log with its traceback; the sweep sees what is missing
        require_time(
            deadline
        )  # execute() would first look whether the run is stored, which takes a moment for each
        with quiet():  # the sweep shows its own progress
            execute(run, store, deadline=deadline)


def _forecast(
    client: distributed.Client, runs: Sequence[Run], store: ResultStore, resources: dict[str, float]
) -> str:
    """A line on how long the runs will take; kinds of runs of which nothing is known
    are timed on the cluster.
    """
    by_key = {run.key(): run for run in runs}

    def measure(keys: list[str]) -> dict[str, float]:
        if not can_run(client, resources):
            return {}
        limit = (
            time.time() + (time_limit() - time.time()) / 10
        )  # or runs that are timed anew each time would never begin
        futures = {
            key: client.submit(_seconds_a_step, by_key[key], limit, pure=False, resources=resources)
            for key in keys
        }
        measured = {
            key: future.result() for key, future in futures.items() if future.exception() is None
        }
        return {key: seconds for key, seconds in measured.items() if seconds}

    configs, workers = (
        {key: run.config() for key, run in by_key.items()},
        sum(worker["nthreads"] for worker in connected_workers(client)),
    )
    return expected_time(configs, store.folder, provenance()["machine"], workers, measure)


def _seconds_a_step(run: Run, limit: float) -> float | None:
    """Measured on iterations 5 to 12, as the first four make the engine's recordings,
    or on less until `limit`; None if that was over.
    """
    times = []

    def look(iteration: int, images: Tensor, cost: float) -> None:
        times.append(time.perf_counter())
        if iteration == 12 or time.time() >= limit:
            raise StopIteration

    if time.time() >= limit:
        return None
    with quiet(), _alone_on_one_thread():
        model = run.scenario.client_model().to("cuda" if torch.cuda.is_available() else "cpu")
        run.attack(model, run.scenario.update(model), watch=look, watch_every=4)
    return (times[-1] - times[0]) / (4 * (len(times) - 1)) if len(times) > 1 else None
