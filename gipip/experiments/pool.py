"""Processes of this machine, which may die: by a signal, or for want of memory."""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor, wait

import torch
from loky.process_executor import ProcessPoolExecutor, ShutdownExecutorError

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # An attack asks for the same memory thousands of times. With glibc's defaults, which
    # hand it back to the system in between, an iteration takes up to twice as long.
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "LOKY_MAX_MEMORY_LEAK_SIZE": str(2**62),  # a larger model is no leak
}


_idle: list[ProcessPoolExecutor] = []
"""Processes that wait for the next call of any executor: each takes seconds to begin,
and ends by itself after a minute without one.
"""


class Processes(ThreadPoolExecutor):
    """An executor of so many processes with one thread each, begun as they are needed.

    A process that dies is replaced, and costs its own call only: the future holds
    TerminatedWorkerError. Those at work end at once when an exception leaves the
    executor, as Ctrl-C does, and all when this process dies.
    """

    def __init__(self, workers: int):
        super().__init__(workers)
        self._at_work: set[ProcessPoolExecutor] = set()

    def submit(self, call, /, *arguments, **options):
        return super().submit(self._in_process, call, *arguments, **options)

    def _in_process(self, call: Callable, *arguments, **options):
        try:
            process = _idle.pop()
        except IndexError:
            process = _another()
        self._at_work.add(process)
        future = process.submit(call, *arguments, **options)
        wait([future])
        self._at_work.remove(process)
        if not isinstance(future.exception(), BrokenExecutor | ShutdownExecutorError):
            _idle.append(process)
        return future.result()

    def __exit__(self, kind: type[BaseException] | None, *about) -> None:
        killed = kind is not None
        self.shutdown(wait=not killed, cancel_futures=killed)
        for process in list(self._at_work):
            process.shutdown(kill_workers=True)


def _another() -> ProcessPoolExecutor:
    how = {"env": _ENVIRONMENT, "timeout": 60}
    return ProcessPoolExecutor(1, **how, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    """A worker's life: Ctrl-C is the parent's business, and it ends with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=[parent], daemon=True).start()
    torch.set_num_threads(1)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
