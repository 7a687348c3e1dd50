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

_quiet = contextvars.ContextVar("quiet", default=False)
_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed} passed, {remaining} left"


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


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress is shown inside, in this thread only: for loops within another one's progress."""
    token = _quiet.set(True)
    try:
        yield
    finally:
        _quiet.reset(token)


def progress(iterable: Iterable | None = None, *, description: str = "", **options) -> tqdm.tqdm:
    """A tqdm bar around `iterable`, or one to `update()` (a context manager), on
    stderr; headless: lines, ten seconds apart. `options`: tqdm's, such as `total` and
    `unit`.
    """
    options |= {"desc": description, "disable": _quiet.get()}
    if not headless():
        return tqdm.auto.tqdm(iterable, **options)
    options = {"delay": 1e-9} | options  # so that there is no line at the start
    options |= {"file": _Lines(), "bar_format": _LINE, "mininterval": 10, "miniters": 1}
    return tqdm.tqdm(iterable, **options)


class _Lines:
    """What tqdm writes to move the cursor becomes a line on stderr, or nothing."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
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
