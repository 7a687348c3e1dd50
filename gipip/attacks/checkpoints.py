"""Attacks that pause when their time is over, or die, and go on another time: on a CPU
with the very bits of one that never stopped.
"""

import dataclasses
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gipip.errors import DamagedFileError, OutOfTime
from gipip.files import read_tensors, set_aside, write_tensors

_EVERY = 180  # seconds between two writes: what a machine that is killed loses


@dataclass(eq=False)
class Checkpoint:
    """Where an attempt is kept while it is under way (`path`.safetensors), and when it
    must pause.

    `deadline`: seconds since the epoch. `earlier`: the seconds that each attempt which
    went on here had taken before; the parts of an attack share the list. An attempt
    that has ended is kept like any other, so it is not repeated while the attack's
    others are under way.
    """

    path: Path
    deadline: float = float("inf")
    earlier: list[float] = field(default_factory=list)

    def part(self, number: int) -> "Checkpoint":
        """That of an attack's attempt, or of one of an attempt's stages."""
        return dataclasses.replace(self, path=self.path.with_name(f"{self.path.name}-{number}"))

    @property
    def file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.safetensors")

    def remove(self) -> None:
        """Delete what is kept, of all parts; damaged files that were set aside stay."""
        for path in self.path.parent.glob(f"{self.path.name}*.safetensors"):
            path.unlink()

    def restore(
        self,
        lanes,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
    ) -> None:
        """Put freshly started `_Lanes` with their optimiser and learning-rate schedule
        where the attempt was, if it is kept.

        To be called before the first step, as a CUDA graph holds on to the tensors. A
        damaged file is reported and set aside; then the attempt begins anew.
        """
        self._lanes, self._optimizer, self._schedule = lanes, optimizer, schedule
        self.earlier.append(0.0)
        self._written, self._started = time.time(), time.perf_counter()
        try:
            tensors, about = read_tensors(self.file)
            if not _shapes(_state(lanes)).items() <= _shapes(tensors).items():
                raise DamagedFileError(f"{self.file} holds the state of another attack.")
        except FileNotFoundError:
            return
        except DamagedFileError as error:
            warnings.warn(
                f"{error} It is set aside as {set_aside(self.file).name} and the attempt begins anew.",
                stacklevel=2,
            )
            return
        with torch.no_grad():
            for name, tensor in _state(lanes).items():
                tensor.copy_(tensors[name])
        for view, state in zip(lanes.views, tensors["generators"], strict=True):
            view.generator.set_state(state.clone())  # a row of a tensor it does not take
        terms = [
            tensors[f"history/{name}"].to(lanes.best_costs.device).unbind()
            for name in about["terms"]
        ]
        lanes.history += [
            dict(zip(about["terms"], values, strict=True)) for values in zip(*terms, strict=True)
        ]
        _restore_optimizer(optimizer, tensors, about["learning rates"])
        if schedule:
            schedule.load_state_dict(about["schedule"])
        self.earlier[-1] = about["seconds"]
        self._started -= about["seconds"]

    def visit(self) -> None:
        """To be called before every step: keeps the state every few minutes. Raises
        OutOfTime, having kept it, at the deadline.
        """
        now = time.time()
        if now >= min(self.deadline, self._written + _EVERY):
            self.keep()
        if now >= self.deadline:
            raise OutOfTime(
                f"The time is over: the attack paused after {len(self._lanes.history)} iterations of this attempt."
            )

    def keep(self) -> None:
        """Write the state, if a step has been taken: tensors, and as numbers what is
        known of the learning rate.
        """
        lanes = self._lanes
        if not lanes.history:
            return
        tensors = _state(lanes) | {
            "generators": torch.stack([view.generator.get_state() for view in lanes.views])
        }
        for name in lanes.history[0]:
            tensors[f"history/{name}"] = torch.stack([terms[name] for terms in lanes.history])
        for index, own in self._optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer/{index}/{name}": value
                for name, value in own.items()
                if isinstance(value, Tensor)
            }
        schedule = self._schedule.state_dict() if self._schedule else {}
        about = {
            "terms": list(lanes.history[0]),
            "learning rates": [float(group["lr"]) for group in self._optimizer.param_groups],
            "schedule": {
                name: value for name, value in schedule.items() if isinstance(value, int | float)
            },
            "steps": len(lanes.history) * len(lanes.views),
            "seconds": time.perf_counter() - self._started,
        }
        write_tensors(self.file, tensors, about)
        self._written = time.time()


def _state(lanes) -> dict[str, Tensor]:
    """The tensors of `_Lanes` that steps change in place."""
    groups = {"variables": lanes.variables, "best": lanes.best, "costs": {"best": lanes.best_costs}}
    return {
        f"{group}/{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rates: list[float]
) -> None:
    state, groups = {}, optimizer.state_dict()["param_groups"]
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            state.setdefault(int(index), {})[name] = value
    for group, rate in zip(
        groups, rates, strict=True
    ):  # a captured step reads its rate from a tensor
        group["lr"] = (
            torch.full_like(group["lr"], rate) if isinstance(group["lr"], Tensor) else rate
        )
    optimizer.load_state_dict({"state": state, "param_groups": groups})
