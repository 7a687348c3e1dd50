"""Runs executed one by one, or many of them side by side: each once, and those of an
interrupted sweep from where they were.
"""

import contextlib
import dataclasses
import functools
import json
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, as_completed
from pathlib import Path

import pandas
import torch

from gipip.errors import GipipError, OutOfTime, StoreError, SweepError
from gipip.evaluation.metrics import evaluate
from gipip.experiments.pool import outcomes
from gipip.experiments.results import Results
from gipip.experiments.scenario import Run
from gipip.experiments.store import Result, ResultStore, code_version, provenance
from gipip.files import canonical_json
from gipip.progress import announce, progress, quiet, require_time, time_limit


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
        found = run.attack(model, run.scenario.update(model), checkpoint=checkpoint)
        if found.interrupted:  # half a result must not be stored as a whole one
            raise KeyboardInterrupt
        metrics = evaluate(found, truth, model=model).to_dict(orient="list")
    details = {
        "assumptions": found.assumptions,
        "returned": found.returned,
        "restart_costs": [cost if cost < float("inf") else None for cost in found.restart_costs],
        "notes": found.notes,
        "seconds": found.seconds,
        "engine": found.engine,
        "made": provenance(),
        "code": code_version(),
    }
    metrics, details = json.loads(canonical_json([metrics, details]))  # as the store gives them
    images, labels = found.images[metrics["matched"]], found.labels[metrics["matched"]]
    history = dict(sorted(found.history.items()))
    result = Result(run, images, truth.images, labels, history, pandas.DataFrame(metrics), details)
    if store and checkpoint:
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


def sweep(
    runs: Iterable[Run],
    *,
    store: Path | str | ResultStore,
    executor: Executor | None = None,
    workers: int | None = None,
) -> Results:
    """Execute runs side by side; those whose results are in the store are only loaded.

    `workers`: processes of this machine, each with one thread (default: two, or the
    number of cores if that is less). `executor`: any other that computes instead, such
    as `distributed.Client(…).get_executor()` of a dask cluster; its workers must see the
    same store folder and have the same gipip. Each result is stored as soon as it is
    there. A script must call this under `if __name__ == "__main__":`, as workers import
    it.

    A scenario that cannot be built (an unknown model, a batch that cannot be drawn) is
    refused before anything is computed. What other code computed counts as not there,
    with a warning. A process of this machine that dies is replaced, and its run is
    tried again. A run that fails does not stop the others; at the end SweepError lists
    the failures. When the time that GIPIP_DEADLINE sets is over (seconds since the
    epoch) no further runs begin, those under way pause, and OutOfTime says how many are
    left; the same call goes on from there.
    """
    runs = list(runs)
    store = store if isinstance(store, ResultStore) else ResultStore(store)
    stored = {run.key(): store.load(run) for run in progress(runs, description="reading results")}
    missing = list({run.key(): run for run in runs if stored[run.key()] is None}.values())
    _warn_of_other_code(missing, store)
    failures = []
    if missing and time.time() < time_limit():
        announce(f"attacks: {len(missing)} to compute")
        failures = _failures(missing, store, executor, workers)
    if failures:
        kept = f"the other results are stored in {store.folder}"
        listing = "\n".join(failures)
        raise SweepError(f"{len(failures)} of {len(runs)} runs failed; {kept}:\n{listing}")
    stored |= {run.key(): store.load(run) for run in missing}
    left = [result for result in stored.values() if result is None]
    if left:
        raise _incomplete(len(left), len(stored), store)
    return Results(dataclasses.replace(stored[run.key()], run=run) for run in runs)


def _warn_of_other_code(missing: list[Run], store: ResultStore) -> None:
    ignored = sum(store.path(run).exists() for run in missing)
    if ignored:
        warnings.warn(
            f"{ignored} results in {store.folder} were computed by other code than this "
            "version of gipip's. They are ignored, and computed again.",
            stacklevel=3,
        )


def _failures(
    runs: list[Run], store: ResultStore, executor: Executor | None, workers: int | None
) -> list[str]:
    """Execute the runs; gives a line for each that failed."""
    # The longest first, so that no worker idles at the end.
    runs = sorted(runs, key=lambda run: -run.attack.iterations * run.scenario.batch_size)
    # dask would take a call with equal arguments for one that it knows the outcome of.
    work = functools.partial(_work, store=store, deadline=time_limit(), sweep=uuid.uuid4().hex)
    if executor:
        finished = _submitted(executor, work, runs)
    else:
        finished = outcomes(work, runs, workers or min(2, os.cpu_count() or 1))
    lines = []
    with contextlib.closing(finished):
        for run, future in progress(finished, total=len(runs), description="attacks", unit="run"):
            if error := _error(future):
                lines.append(f"- {run.arm} on {run.scenario}: {error}")
    return lines


def _work(run: Run, store: ResultStore, deadline: float, sweep: str) -> str:
    """In a worker: stores the result; gives the error of a run that failed, as text, as
    not every exception survives the way back.
    """
    try:
        require_time(deadline)  # before execute() looks whether the run is stored
        with quiet():  # the sweep shows its own progress
            execute(run, store, deadline=deadline)
    except OutOfTime:  # no failure: the sweep sees what is missing
        return ""
    except Exception as error:
        return repr(error)
    return ""


def _submitted(
    executor: Executor, work: Callable[[Run], str], runs: list[Run]
) -> Iterator[tuple[Run, Future]]:
    """As `outcomes`, by an executor from outside."""
    futures = {executor.submit(work, run): run for run in runs}
    try:
        for future in as_completed(futures):
            yield futures[future], future
    finally:
        for future in futures:
            future.cancel()


def _error(future: Future) -> str:
    try:
        return future.result()
    except Exception as error:  # what the executor says, such as that a worker died
        return repr(error)


def _incomplete(left: int, runs: int, store: ResultStore) -> GipipError:
    if time.time() >= time_limit():
        done = f"{runs - left} of {runs} runs are finished"
        return OutOfTime(f"The time is over: {done}, {left} are left.")
    advice = "The workers must see this folder, under the same path, and have the same gipip."
    return StoreError(f"{left} results are not in {store.folder}. {advice}")
