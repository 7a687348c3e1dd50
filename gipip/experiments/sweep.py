"""Runs executed: one, or many side by side, so that an interrupted sweep goes on where it was."""

import contextlib
import json
import multiprocessing
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from pathlib import Path

import pandas
import torch
from tqdm.std import tqdm

from gipip.errors import OutOfTime, StoreError, SweepError
from gipip.evaluation.metrics import evaluate
from gipip.experiments.results import Results
from gipip.experiments.scenario import Run
from gipip.experiments.store import Result, ResultStore, read_result
from gipip.experiments.version import code_version
from gipip.files import DATA, canonical_json
from gipip.progress import announce, progress, quiet, require_time, time_limit

_INHERITED = {  # by workers: one thread each, and memory that an attack asks for again and again
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
}


def execute(run: Run, store: ResultStore | None = None, *, deadline: float | None = None) -> Result:
    """The result of a run: loaded if the store has it, else computed and stored.

    On the GPU if there is one; on a CPU with one thread, so that a run gives the same images alone
    and in a sweep. With a store, an attack that was paused or killed goes on where it was. Raises
    OutOfTime when it is not finished at the `deadline`, in seconds since the epoch (default:
    GIPIP_DEADLINE in the environment, else none); DLG cannot pause and runs to its end.
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
    metrics = evaluate(reconstruction, truth, model=model).to_dict(orient="list")
    costs = reconstruction.restart_costs
    details = {
        "assumptions": reconstruction.assumptions,
        "returned": reconstruction.returned,
        "restart_costs": [cost if cost < float("inf") else None for cost in costs],
        "notes": reconstruction.notes,
        "seconds": reconstruction.seconds,
        "engine": reconstruction.engine,
        "made": provenance(),
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
    """One run at a time in a process: the number of threads and the generator that models are drawn
    from are global.
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
        "code": code_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def shipped_results(runs: Iterable[Run]) -> Results:
    """Those of the runs whose results ship with gipip (`data/results`), because they take hours.

    An earlier version of the code computed them; nothing is computed here.
    """
    found = []
    for run in runs:
        path = DATA / "results" / f"{run.key(code='')}.safetensors"
        if path.exists():
            found.append(read_result(path, run))
    return Results(found)


def sweep(
    runs: Iterable[Run],
    *,
    store: Path | str | ResultStore,
    executor: Executor | None = None,
    workers: int | None = None,
) -> Results:
    """Execute runs side by side; those whose results are in the store are only loaded.

    `executor`: where they are computed, any of `concurrent.futures`' interface, such as dask's
    `Client.get_executor()`; its workers must see the same store folder. By default processes on
    this machine, `workers` of them (two, or the number of cores if that is less), each with one
    thread. Each result is stored as soon as it is there. A script must call this under `if __name__
    == "__main__":`, as workers import it.

    A scenario that cannot be built (an unknown model, a batch that cannot be drawn) is refused
    before anything is computed. A run that fails, or whose worker dies again and again, does not
    stop the others; at the end SweepError lists the failures. When the time that GIPIP_DEADLINE
    sets is over (seconds since the epoch) no further runs begin, those under way pause, and
    OutOfTime says how many are left; the same call goes on from there.
    """
    runs = list(runs)
    store = store if isinstance(store, ResultStore) else ResultStore(store)
    stored = {run.key(): store.load(run) for run in progress(runs, description="reading results")}
    missing = list({run.key(): run for run in runs if stored[run.key()] is None}.values())
    missing.sort(key=_work_of, reverse=True)  # so that no worker idles at the end
    failures: dict[Run, BaseException] = {}
    if missing and time.time() < time_limit():
        announce(f"attacks: {len(missing)} to compute")
        if executor:
            failures = _execute_with(executor, missing, store)
        else:
            failures = _execute_here(missing, store, workers or min(2, os.cpu_count() or 1))
    if failures:
        listing = "\n".join(f"- {run.arm} on {run.scenario}: {e!r}" for run, e in failures.items())
        kept = f"the other results are stored in {store.folder}"
        raise SweepError(f"{len(failures)} of {len(runs)} runs failed; {kept}:\n{listing}")
    return Results(_all_of(runs, store))


def _work_of(run: Run) -> int:
    return run.attack.iterations * run.attack.restarts * run.scenario.batch_size


def _all_of(runs: list[Run], store: ResultStore) -> list[Result]:
    found = [(run, store.load(run)) for run in runs]
    left = {run.key() for run, result in found if result is None}
    if left and time.time() >= time_limit():
        whole = len({run.key() for run in runs})
        done = f"{whole - len(left)} of {whole} runs are finished, {len(left)} are left"
        raise OutOfTime(f"The time is over: {done}.")
    if left:
        advice = "The workers must see this folder, under the same path."
        raise StoreError(f"{len(left)} results are not in {store.folder}. {advice}")
    return [result for _, result in found if result is not None]


def _execute_with(
    executor: Executor, runs: list[Run], store: ResultStore
) -> dict[Run, BaseException]:
    """Run everything on workers that somebody else looks after; gives what failed."""
    failures: dict[Run, BaseException] = {}
    futures = {executor.submit(_work, run, store, time_limit()): run for run in runs}
    finished = as_completed(futures)
    try:
        for future in progress(finished, total=len(runs), description="attacks", unit="run"):
            if error := future.exception():
                failures[futures[future]] = error
    finally:  # after Ctrl-C, what has not begun must not begin
        for future in futures:
            future.cancel()
    return failures


def _execute_here(runs: list[Run], store: ResultStore, workers: int) -> dict[Run, BaseException]:
    """On processes of this machine, of which one may die: runs that were under way then are tried
    once more, each on a process of its own, so that it costs only the run that killed it.
    """
    waiting, failures = deque(runs), dict[Run, BaseException]()
    with progress(total=len(runs), description="attacks", unit="run") as bar:
        while waiting:
            for run in _until_one_dies(waiting, store, min(workers, len(runs)), failures, bar):
                if _until_one_dies(deque([run]), store, 1, failures, bar):
                    died = "its process died, twice: it may need more memory than there is"
                    failures[run] = ChildProcessError(died)
                    bar.update()
    return failures


def _until_one_dies(
    waiting: deque[Run],
    store: ResultStore,
    workers: int,
    failures: dict[Run, BaseException],
    bar: tqdm,
) -> list[Run]:
    """Take and execute runs until none waits, or a process dies: then those under way."""
    under_way: dict[Future, Run] = {}
    with _pool(workers) as pool, contextlib.suppress(BrokenProcessPool):
        while waiting or under_way:
            while waiting and len(under_way) < workers:
                under_way[pool.submit(_work, waiting[0], store, time_limit())] = waiting[0]
                waiting.popleft()
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                if error:
                    failures[under_way[future]] = error
                del under_way[future]
                bar.update()
    return list(under_way.values())


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Processes with one thread each, that are gone in the end. No port is opened."""
    before, others = dict(os.environ), set(multiprocessing.active_children())
    os.environ.update(_INHERITED)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        yield pool
        pool.shutdown()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        os.environ.clear()
        os.environ.update(before)


def _work(run: Run, store: ResultStore, deadline: float) -> None:
    with (
        contextlib.suppress(OutOfTime),
        quiet(),
    ):  # the sweep sees what is missing, and shows progress
        require_time(deadline)
        execute(run, store, deadline=deadline)
