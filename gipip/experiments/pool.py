"""Calls in processes of this machine, which may die: by a signal, or for want of memory."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

import cloudpickle
import torch

from gipip.errors import SweepError

Item = TypeVar("Item", bound=Hashable)

_INHERITED = {
    "OMP_NUM_THREADS": "1",
    # An attack asks for the same memory thousands of times. With glibc's defaults, which
    # hand it back to the system in between, an iteration takes up to twice as long.
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
}


@contextlib.contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """An executor of processes with one thread each, which all end at once when it is
    left, or when this process dies. Raises SweepError when they cannot begin.
    """
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _begin, (reader,))
    with _environment(), reader, writer, pool:
        try:
            _await_start(pool, workers)
            yield pool
        except BaseException:
            writer.close()  # ends the workers, for which the pool would wait
            raise


def _await_start(pool: ProcessPoolExecutor, workers: int) -> None:
    try:
        list(pool.map(abs, range(workers)))
    except BrokenProcessPool as error:
        advice = 'A script must call sweep() under `if __name__ == "__main__":`.'
        raise SweepError(f"The workers of this machine do not begin. {advice}") from error


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """What processes that begin here inherit, restored in the end."""
    before = {name: os.environ.get(name) for name in _INHERITED}
    os.environ.update(_INHERITED)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def _begin(parent: Connection) -> None:
    """A worker's life: Ctrl-C is the parent's business, and it ends with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    torch.set_num_threads(1)


def _end_with(parent: Connection) -> None:
    with contextlib.suppress(EOFError):
        parent.recv()
    os._exit(1)


def outcomes(
    call: Callable[[Item], object], items: Sequence[Item], workers: int
) -> Generator[tuple[Item, Future], None, None]:
    """Each item with the future of `call(item)`, as they finish.

    When a process dies, all are replaced, and what was under way begins anew. An item
    to which this happens twice is tried once more at the end, alone; if that dies too,
    its future holds BrokenProcessPool.
    """
    waiting, alone, losses = deque(items), [], Counter[Item]()
    while waiting:
        under_way: dict[Future, Item] = {}
        try:
            with process_pool(min(workers, len(waiting))) as pool:
                yield from _until_one_dies(pool, call, waiting, under_way, workers)
        except BrokenProcessPool:
            losses.update(under_way.values())
            alone += [item for item in under_way.values() if losses[item] > 1]
            waiting.extendleft(item for item in under_way.values() if losses[item] == 1)
    for item in alone:
        with process_pool(1) as pool:
            future = _submit(pool, call, item)
            wait([future])
        yield item, future


def _until_one_dies(
    pool: ProcessPoolExecutor,
    call: Callable[[Item], object],
    waiting: deque[Item],
    under_way: dict[Future, Item],
    workers: int,
) -> Iterator[tuple[Item, Future]]:
    """No more are submitted than can begin, so that it is known which were under way."""
    while waiting or under_way:
        while waiting and len(under_way) < workers:
            under_way[_submit(pool, call, waiting[0])] = waiting[0]
            waiting.popleft()
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            if isinstance(error := future.exception(), BrokenProcessPool):
                raise error
            yield under_way.pop(future), future


def _submit(pool: ProcessPoolExecutor, call: Callable[[Item], object], item: Item) -> Future:
    """Pickled here: a worker that cannot unpickle a call raises, rather than dies, and
    multiprocessing would move the tensors of a prior into shared memory.
    """
    return pool.submit(_unpickled, cloudpickle.dumps((call, item)))


def _unpickled(content: bytes) -> object:
    call, item = pickle.loads(content)
    return call(item)
