"""Progress of long loops: a live bar for a person who watches, plain lines for a log;
and the time by which they must stop.
"""

import contextlib
import contextvars
import os
import sys
import time
from collections.abc import Iterable, Iterator

import tqdm.auto

from gipip.errors import OutOfTime


def headless() -> bool:
    """Whether nobody watches live: as GIPIP_HEADLESS in the environment says ("0": no),
    else if there is no live notebook and no terminal.

    Set it for papermill, which runs a real kernel in which a live bar would freeze.
    """
    setting = os.environ.get("GIPIP_HEADLESS", "")
    return setting != "0" if setting else not (_in_notebook() or sys.stderr.isatty())


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return shell is not None and "IPKernelApp" in shell.config


_quiet = contextvars.ContextVar("quiet", default=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress is shown inside, in this thread only: for loops that run inside
    another one's progress.
    """
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def progress(
    iterable: Iterable | None = None,
    *,
    total: int | None = None,
    description: str = "",
    unit: str = "it",
) -> tqdm.std.tqdm:
    """A tqdm bar around `iterable`, or one to `update()` (a context manager), on
    stderr; headless: lines, ten seconds apart.
    """
    if _quiet.get():
        return tqdm.std.tqdm(iterable, total=total, disable=True)
    if headless():  # the delay suppresses tqdm's line at the start
        label = description and f"{description}: "
        return _Lines(
            iterable,
            desc=label,
            total=total,
            unit=unit,
            mininterval=10,
            miniters=1,
            delay=1e-9,
            leave=False,
        )
    return tqdm.auto.tqdm(iterable, desc=description, total=total, unit=unit)


def announce(line: str) -> None:
    """One line on stderr, where progress is shown: outputs on stdout must not differ
    from machine to machine.
    """
    if not _quiet.get():
        print(line, file=sys.stderr, flush=True)


def time_limit() -> float:
    """When long work must stop, in seconds since the epoch: GIPIP_DEADLINE in the
    environment, else never.
    """
    return float(os.environ.get("GIPIP_DEADLINE") or "inf")


def require_time(limit: float | None = None) -> None:
    """Raise OutOfTime if the limit, by default the environment's, is over: to be called
    before long work begins.
    """
    if time.time() >= (time_limit() if limit is None else limit):
        raise OutOfTime("The time is over.")


class _Lines(tqdm.std.tqdm):
    monitor_interval = 0  # no monitor thread

    def refresh(self, *args, **kwargs):
        if time.time() - self.last_print_t >= self.mininterval:
            self.last_print_t = time.time()
            super().refresh(*args, **kwargs)

    def display(self, msg=None, pos=None):
        if msg is None:
            line = "{desc}{n_fmt}/{total_fmt} {unit}, {elapsed} passed, {remaining} left{postfix}"
            print(
                self.format_meter(**self.format_dict | {"bar_format": line}),
                file=self.fp,
                flush=True,
            )

    def close(self):
        if not self.disable:
            self.display()
        super().close()
