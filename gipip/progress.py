"""Progress of long loops: a live bar for a person who watches, plain lines for a log; and the time
by which they must stop.
"""

import contextlib
import contextvars
import os
import sys
import time
from collections.abc import Iterable, Iterator

import tqdm.auto

from gipip.errors import OutOfTime

_quiet = contextvars.ContextVar("quiet", default=False)


def headless() -> bool:
    """Whether nobody watches live: as GIPIP_HEADLESS in the environment says ("0": no), else if
    there is no live notebook and no terminal.

    Set it for papermill, which runs a real kernel in which a live bar would freeze.
    """
    setting = os.environ.get("GIPIP_HEADLESS", "")
    return setting != "0" if setting else not (_in_notebook() or sys.stderr.isatty())


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress is shown inside, in this thread only: for loops within another one's progress."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def progress(iterable: Iterable | None = None, *, description: str = "", **options) -> tqdm.tqdm:
    """A tqdm bar around `iterable`, or one to `update()` (a context manager), on stderr; headless:
    lines, ten seconds apart. `options`: tqdm's, such as `total` and `unit`.
    """
    bar = _Lines if _quiet.get() or headless() else tqdm.auto.tqdm
    return bar(iterable, desc=description, disable=_quiet.get(), **options)


class _Lines(tqdm.tqdm):
    """A bar as plain lines, which never moves the cursor."""

    monitor_interval = 0  # no monitor thread

    def __init__(self, *iterable, **options):
        line = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} passed, {remaining} left{postfix}"
        options |= {"bar_format": line, "leave": False}
        # the delay suppresses tqdm's line at the start
        super().__init__(*iterable, mininterval=10, miniters=1, delay=1e-9, **options)

    def refresh(self, *args, **kwargs):
        if not self.disable and time.time() - self.last_print_t >= self.mininterval:
            self.last_print_t = time.time()
            super().refresh(*args, **kwargs)

    def display(self, msg=None, pos=None):
        if msg is None:  # else it is the empty one, by which a bar clears itself
            print(self, file=self.fp, flush=True)

    def close(self):
        if not self.disable:
            self.display()
        super().close()


def announce(line: str) -> None:
    """One line on stderr, where progress is shown: outputs on stdout must not differ from machine
    to machine.
    """
    if not _quiet.get():
        print(line, file=sys.stderr, flush=True)


def time_limit() -> float:
    """When long work must stop, in seconds since the epoch: GIPIP_DEADLINE in the environment,
    else never.
    """
    return float(os.environ.get("GIPIP_DEADLINE") or "inf")


def require_time(limit: float | None = None) -> None:
    """Raise OutOfTime if the limit, by default the environment's, is over: to be called before
    long work begins.
    """
    if time.time() >= (time_limit() if limit is None else limit):
        raise OutOfTime("The time is over.")
