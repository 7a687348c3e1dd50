"""Attacks that pause when their time is over, or die, and go on another time: on a CPU with the
very bits of one that never stopped.
"""

import time
import warnings
from pathlib import Path

import torch
from torch import Tensor

from gipip.attacks.loop import Course, Observer
from gipip.errors import DamagedFileError, OutOfTime
from gipip.files import read_tensors, set_aside, write_tensors

_EVERY = 180  # seconds between two writes: what a machine that is killed loses


class Checkpoint(Observer):
    """Where an attack is kept while it is under way, and when it must pause.

    `path`: of the files, one for each of the attack's courses: `path`-1.safetensors, …. `deadline`:
    seconds since the epoch. `run`: names what is computed; the file of another run is not taken.
    `earlier`: the seconds that the courses which went on here had taken before. A course that has
    ended is kept like any other, so it is not repeated while the attack's others are under way.
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
        try:
            tensors, about = read_tensors(self.file)
            self._require_own(course, tensors, about)
        except FileNotFoundError:
            return
        except DamagedFileError as error:
            aside = set_aside(self.file).name
            warnings.warn(
                f"{error} It is set aside as {aside}, the attack begins anew.", stacklevel=2
            )
            return
        _restore(course, tensors, about)
        self.earlier += about["seconds"]
        self.started -= about["seconds"]

    def _require_own(self, course: Course, tensors: dict[str, Tensor], about: dict) -> None:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        own = {name: tensor.shape for name, tensor in _state(course).items()}
        if about.get("run") != self.run or not own.items() <= shapes.items():
            raise DamagedFileError(f"{self.file} holds the state of another attack.")

    def look(self, course: Course) -> None:
        """Keep the state every few minutes. Raises OutOfTime, having kept it, at the deadline."""
        now = time.time()
        if now >= min(self.deadline, self.written + _EVERY):
            self._keep(course)
        if now >= self.deadline and not course.ended:
            steps = f"{len(course.history)} of {course.iterations} iterations"
            raise OutOfTime(f"The time is over: the attack paused after {steps}.")

    def end(self, course: Course) -> None:
        if course.ended:
            self._keep(course)

    def _keep(self, course: Course) -> None:
        tensors = _state(course)
        for name in course.history[0]:
            tensors[f"history/{name}"] = torch.stack([terms[name] for terms in course.history])
        for index, own in course.optimizer.state_dict()["state"].items():
            for name, value in own.items():
                tensors[f"optimizer/{index}/{name}"] = value
        about = {
            "run": self.run,
            "terms": list(course.history[0]),
            "rates": [float(group["lr"]) for group in course.optimizer.param_groups],
            "schedule": _numbers(course),
            "seconds": time.perf_counter() - self.started,
        }
        write_tensors(self.file, tensors, about)
        self.written = time.time()


def _state(course: Course) -> dict[str, Tensor]:
    """The tensors that steps change in place."""
    state = {f"variables/{name}": tensor for name, tensor in course.variables.items()}
    state |= {f"best/{name}": tensor for name, tensor in course.best.items()}
    return state | {"best_cost": course.best_cost}


def _numbers(course: Course) -> dict[str, float]:
    """What is known of the learning rate."""
    state = course.schedule.state_dict() if course.schedule else {}
    return {name: value for name, value in state.items() if isinstance(value, int | float)}


@torch.no_grad()
def _restore(course: Course, tensors: dict[str, Tensor], about: dict) -> None:
    """Before the first step, in place, as a CUDA graph holds on to the tensors."""
    for name, tensor in _state(course).items():
        tensor.copy_(tensors[name])
    columns = [tensors[f"history/{name}"].to(course.best_cost.device) for name in about["terms"]]
    for values in zip(*columns, strict=True):
        course.history.append(dict(zip(about["terms"], values, strict=True)))
    groups = course.optimizer.state_dict()["param_groups"]
    for group, rate in zip(groups, about["rates"], strict=True):
        captured = isinstance(group["lr"], Tensor)  # a captured step reads its rate from a tensor
        group["lr"] = torch.full_like(group["lr"], rate) if captured else rate
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    course.optimizer.load_state_dict({"state": state, "param_groups": groups})
    if course.schedule:
        course.schedule.load_state_dict(about["schedule"])
