"""Attacks that pause when their time is over, or die, and go on another time: on a CPU
with the very bits of one that never stopped.
"""

import time
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from gipip.attacks.loop import Course, Observer
from gipip.errors import DamagedFileError, OutOfTime
from gipip.files import read_kept, read_tensors, write_tensors

_EVERY = 180  # seconds between two writes: what a machine that is killed loses


class Checkpoint(Observer):
    """Where an attack is kept while it is under way, and when it must pause.

    `path`: of the files, one for each of the attack's courses: `path`-1.safetensors, ….
    `deadline`: seconds since the epoch. `run`: names what is computed; the file of
    another run is not taken. `earlier`: the seconds that the courses which went on here
    had taken before. A course that has ended is kept like any other, so it is not
    repeated while the attack's others are under way.
    """

    def __init__(self, path: Path, deadline: float = float("inf"), run: str = ""):
        self.path, self.deadline, self.run = path, deadline, run
        self.courses, self.earlier = 0, 0.0

    @property
    def file(self) -> Path:
        """Of the present course."""
        return self.path.with_name(f"{self.path.name}-{self.courses}.safetensors")

    def remove(self) -> None:
        """Delete what is kept; damaged files that were set aside stay."""
        for path in self.path.parent.glob(f"{self.path.name}-*.safetensors"):
            path.unlink()

    def begin(self, course: Course) -> None:
        """Put the course where it was, if it is kept. A damaged file is reported and set aside."""
        self.courses += 1
        self.written, self.started = time.time(), time.perf_counter()
        if kept := read_kept(self.file, self._read):
            tensors, about = kept
            _restore(course, tensors, about["terms"])
            self.earlier += about["seconds"]
            self.started -= about["seconds"]

    def _read(self, file: Path) -> tuple[dict[str, Tensor], dict]:
        tensors, about = read_tensors(file)
        if about.get("run") != self.run:
            raise DamagedFileError(f"{file} holds the state of another attack.")
        return tensors, about

    def look(self, course: Course) -> None:
        """Keep the state every few minutes. Raises OutOfTime, having kept it, at the deadline."""
        now = time.time()
        if now >= min(self.deadline, self.written + _EVERY):
            self._keep(course)
        if now >= self.deadline and not course.ended:
            steps = f"{len(course.history)} of {course.iterations} iterations"
            raise OutOfTime(f"The time is over: the attack paused after {steps}.")

    def end(self, course: Course) -> None:
        if course.ended and course.history:
            self._keep(course)

    def _keep(self, course: Course) -> None:
        seconds = time.perf_counter() - self.started
        about = {"run": self.run, "terms": list(course.curves), "seconds": seconds}
        write_tensors(self.file, _state(course), about)
        self.written = time.time()


def _state(course: Course) -> dict[str, Tensor]:
    """All that a step changes, but for the learning rate, which follows from their number."""
    state = {f"variables/{name}": tensor for name, tensor in course.variables.items()}
    state |= {f"best/{name}": tensor for name, tensor in course.best.items()}
    state |= {f"history/{name}": curve for name, curve in course.curves.items()}
    for index, own in course.optimizer.state_dict()["state"].items():
        state |= {f"optimizer/{index}/{name}": tensor for name, tensor in own.items()}
    return state | {"best_cost": course.best_cost}


@torch.no_grad()
def _restore(course: Course, tensors: dict[str, Tensor], terms: list[str]) -> None:
    """Before the first step, in place, as a CUDA graph holds on to the tensors."""
    course.best_cost.copy_(tensors["best_cost"])
    for name, variable in course.variables.items():
        variable.copy_(tensors[f"variables/{name}"])
        course.best[name].copy_(tensors[f"best/{name}"])
    curves = torch.stack([tensors[f"history/{name}"] for name in terms], dim=1)
    for values in curves.to(course.best_cost.device):
        course.history.append(dict(zip(terms, values, strict=True)))
    moments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        kind, *where = key.split("/")
        if kind == "optimizer":
            index, name = where
            moments[int(index)][name] = tensor
    course.optimizer.load_state_dict(course.optimizer.state_dict() | {"state": moments})
    if course.schedule:
        with warnings.catch_warnings(action="ignore"):  # the optimiser took its steps earlier
            for _ in course.history:
                course.schedule.step()
