"""Runs executed: one, or many side by side, so that an interrupted sweep goes on where it was."""

import contextlib
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, as_completed
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pandas
import torch
from loky.process_executor import TerminatedWorkerError

from gipip.errors import OutOfTime, StoreError, SweepError
from gipip.evaluation.metrics import evaluate
from gipip.experiments.pool import Processes
from gipip.experiments.results import Results
from gipip.experiments.scenario import Run
from gipip.experiments.shipped import ShippedResults
from gipip.experiments.store import Result, ResultStore
from gipip.experiments.version import code_version
from gipip.files import canonical_json
from gipip.progress import progress, quiet, require_time, time_limit


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
    with _alone_on_one_thread():
        result = _computed(run, store, deadline)
    if store:
        store.save(result)
        store.checkpoint(run).remove()
    return result


def _computed(run: Run, store: ResultStore | None, deadline: float) -> Result:
    checkpoint = store.checkpoint(run, deadline) if store else None
    model = run.scenario.client_model().to("cuda" if torch.cuda.is_available() else "cpu")
    truth = run.scenario.batch()
    reconstruction = run.attack(model, run.scenario.update(model), checkpoint=checkpoint)
    if reconstruction.interrupted:  # half a result must not be stored as a whole one
        raise KeyboardInterrupt
    table = evaluate(reconstruction, truth, model=model, pool=run.scenario.candidates())
    metrics = table.to_dict(orient="list")
    details = {
        "assumptions": reconstruction.assumptions,
        "returned": reconstruction.returned,
        "notes": reconstruction.notes,
        "seconds": reconstruction.seconds,
        "engine": reconstruction.engine,
        "made": provenance() | {"code": code_version(type(run.attack))},
    }
    metrics, details = json.loads(canonical_json([metrics, details]))  # as they come from the store
    matched = metrics["matched"]
    return Result(
        run,
        reconstruction.images[matched],
        truth.images,
        reconstruction.labels[matched],
        dict(sorted(reconstruction.history.items())),
        pandas.DataFrame(metrics),
        details,
    )


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
    cpu = f"{platform.machine()} CPU, one thread"
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": datetime.now(UTC).date().isoformat(),
    }


def sweep(
    runs: Iterable[Run],
    *,
    store: Path | str | ResultStore,
    executor: Executor | None = None,
    workers: int | None = None,
    shipped: ShippedResults | None = None,
) -> Results:
    """Execute runs side by side; those whose results are `shipped` or in the store are only loaded.

    `executor`: where they are computed, any of `concurrent.futures`' interface, such as
    dask's `Client.get_executor()`; its workers must see the same store folder. By
    default processes on this machine, `workers` of them (two, or the number of cores if
    that is less), each with one thread; one that dies is replaced, and its run tried
    again. Each result is stored as soon as it is there.

    A scenario that cannot be built (an unknown model, a batch that cannot be drawn) is
    refused before anything is computed. A run that fails does not stop the others; at
    the end SweepError lists the failures. When the time that GIPIP_DEADLINE sets is
    over (seconds since the epoch) no further runs begin, those under way pause, and
    OutOfTime says how many are left; the same call goes on from there.
    """
    runs = list(runs)
    if not all(isinstance(run, Run) for run in runs) or (workers is not None and workers < 1):
        raise SweepError("A sweep takes gipip.Run objects and a positive number of workers.")
    store = store if isinstance(store, ResultStore) else ResultStore(store)
    load = partial(_load, store=store, shipped=shipped)
    found = [load(run) for run in progress(runs, description="reading results")]
    left = {run.key(): run for run, result in zip(runs, found, strict=True) if result is None}
    failures = []
    if left and time.time() < time_limit():
        print(f"attacks: {len(left)} to compute", file=sys.stderr)
        longest_first = sorted(
            left.values(), key=_work_of, reverse=True
        )  # no worker idles at the end
        with Processes(workers or min(2, os.cpu_count() or 1)) as here:
            failures = _failures(longest_first, store, executor or here)
    if failures:
        kept = f"the other results are stored in {store.folder}"
        listing = "\n".join(failures)
        raise SweepError(f"{len(failures)} of {len(runs)} runs failed; {kept}:\n{listing}")
    return Results(_all_of(runs, store, load))


def _failures(runs: list[Run], store: ResultStore, executor: Executor) -> list[str]:
    """Execute the runs; gives a line for each that failed."""
    work = partial(_work, store=store, deadline=time_limit())
    lines = []
    with contextlib.closing(_errors(executor, work, runs)) as errors:
        for run, error in progress(errors, total=len(runs), description="attacks", unit="run"):
            if error:
                lines.append(f"- {run.arm} on {run.scenario}: {error}")
    return lines


def _errors(
    executor: Executor, work: Callable[[Run], str], runs: list[Run]
) -> Generator[tuple[Run, str], None, None]:
    """Each run with its error, or "", as they finish. One whose process died is tried
    once more in the end, alone, as memory may be scarce.
    """
    futures, died = {executor.submit(work, run): run for run in runs}, []
    try:
        for future in as_completed(futures):
            error = _error(future)
            if error.startswith(TerminatedWorkerError.__name__):
                died.append(futures[future])
            else:
                yield futures[future], error
        for run in died:
            yield run, _error(executor.submit(work, run))
    finally:  # after Ctrl-C, what has not begun must not begin
        for future in futures:
            future.cancel()


def _work_of(run: Run) -> int:
    return run.attack.iterations * run.attack.restarts * run.scenario.batch_size


def _load(run: Run, store: ResultStore, shipped: ShippedResults | None) -> Result | None:
    return (shipped.load(run) if shipped else None) or store.load(run)


def _all_of(
    runs: list[Run], store: ResultStore, load: Callable[[Run], Result | None]
) -> list[Result]:
    found = [(run, load(run)) for run in runs]
    left = {run.key() for run, result in found if result is None}
    if left and time.time() >= time_limit():
        whole = len({run.key() for run in runs})
        done = f"{whole - len(left)} of {whole} runs are finished, {len(left)} are left"
        raise OutOfTime(f"The time is over: {done}.")
    if left:
        advice = "Workers must see this folder, under the same path, and have the same gipip."
        raise StoreError(f"{len(left)} results are not in {store.folder}. {advice}")
    return [result for _, result in found if result is not None]


def _work(run: Run, store: ResultStore, deadline: float) -> str:
    """In a worker; gives the error, as text, because not every exception can be pickled."""
    try:
        require_time(deadline)
        with quiet():  # the sweep shows its own progress
            execute(run, store, deadline=deadline)
    except OutOfTime:
        return ""  # no failure: the sweep sees what is missing
    except Exception as error:
        return repr(error)
    return ""


def _error(future: Future) -> str:
    try:
        return future.result()
    except Exception as error:  # of the executor: a worker died, the run was cancelled
        return repr(error)
