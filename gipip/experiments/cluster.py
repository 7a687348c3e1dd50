"""Where a sweep's runs are computed: workers of this machine, or a running
dask.distributed cluster.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator

import dask
import distributed

from gipip.errors import SweepError

# An attack asks for the same memory thousands of times. By default dask makes each
# worker hand it back to the system in between: with that an iteration takes 1.6 times
# (ConvNet, B = 8) to 2.1 times (ResNet18, B = 1) as long.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": 2**32, "MALLOC_MMAP_THRESHOLD_": 2**25}


# On an overloaded machine a worker's event loop can stand still for more than half a
# minute, while it imports torch for its first run. Meanwhile the runs that are sent to
# it (0.2 MB each with an autoencoder) fill its socket; after 30 seconds the kernel
# calls the connection dead, and the worker ends itself for good: "Scheduler was unaware
# of this worker; shutting down". And a killed worker is given up if its successor is
# not there after 15 seconds. Here, on one machine, the end of a process is noticed at
# once without any timeout.
_BE_PATIENT = {
    "distributed.comm.timeouts.tcp": "10 minutes",
    "distributed.deploy.lost-worker-timeout": "10 minutes",
}


@contextlib.contextmanager
def open_cluster(
    workers: int | None, scheduler: str | None, runs: int
) -> Iterator[distributed.Client]:
    """A client of the scheduler at that address, or of as many new workers on this
    machine, by default two, as `runs` can use.
    """
    if scheduler:
        with _connected(scheduler) as client:
            yield client
        return
    workers = min(workers or min(2, os.cpu_count() or 1), runs)
    settings = _BE_PATIENT | {
        f"distributed.nanny.pre-spawn-environ.{name}": size for name, size in _KEEP_MEMORY.items()
    }
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def _connected(scheduler: str) -> distributed.Client:
    try:
        return distributed.Client(scheduler)
    except (OSError, ValueError) as error:
        advice = "Start one with `dask scheduler` and give the address that it prints, such as tcp://host:8786."
        raise SweepError(
            f"There is no dask scheduler at {scheduler!r} ({error}). {advice}"
        ) from error


PATIENCE = 300  # seconds without a worker after which a sweep fails, rather than wait for ever


def as_finished(
    client: distributed.Client, futures: Iterable, resources: dict[str, float]
) -> Iterator[distributed.Future]:
    """The futures as they finish. Raises SweepError when no worker that can run them is
    connected for too long.
    """
    if not can_run(client, resources):
        warnings.warn(f"{_no_worker(client, resources)} Waiting for one.", stacklevel=2)
    finished = distributed.as_completed(futures)
    seen = looked = time.monotonic()
    while not finished.is_empty():
        yield from finished.next_batch(block=False)
        time.sleep(0.1)
        if (now := time.monotonic()) - looked > PATIENCE / 20:
            looked = now
            if can_run(client, resources):
                seen = now
            elif now - seen > PATIENCE:
                left = f"Gave up after {PATIENCE} seconds; runs not done: {finished.count()}. The other results are stored."
                raise SweepError(f"{_no_worker(client, resources)} {left}")


def connected_workers(client: distributed.Client) -> list[dict]:
    """What the scheduler knows of each worker, such as its `nthreads` and `resources`."""
    return list(client.sync(client.scheduler.identity)["workers"].values())


def can_run(client: distributed.Client, resources: dict[str, float]) -> bool:
    """Whether a worker is connected that has all these resources."""
    return any(
        all(worker["resources"].get(name, 0) >= amount for name, amount in resources.items())
        for worker in connected_workers(client)
    )


def _no_worker(client: distributed.Client, resources: dict[str, float]) -> str:
    tag = " ".join(f"{name}={amount:g}" for name, amount in resources.items())
    offering, option = (f" that offers {tag}", f' --resources "{tag}"') if tag else ("", "")
    address, connected = client.scheduler.address, len(connected_workers(client))
    return (
        f"No worker{offering} is connected to the scheduler {address} ({connected} workers are). "
        f"Start one with `dask worker {address} --nthreads 1{option}`."
    )
