"""What an attack is: a few small steps around the one optimisation loop (loop.py).

An attack sees the model, the shared update and its prior; nothing else. Subclasses say
what is optimised (`variables`), with which optimiser, which `terms` make up the cost,
and what holds after each step (`project`).
"""

import time
import warnings
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal, Self

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_serializer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gipip.attacks.checkpoints import Checkpoint
from gipip.attacks.labels import infer_labels
from gipip.attacks.loop import Course, Observer, Terms, Variables, minimise
from gipip.attacks.observers import Progress, Watch
from gipip.attacks.presets import tuned
from gipip.attacks.view import Reconstruction, View
from gipip.federation.client import FedAvg, SharedUpdate
from gipip.federation.models import ClientModel, Images

_EXACT_ATTENTION = SDPBackend.MATH  # the only one with a second derivative
_INFERRED_LABEL = "inferred from the last layer (iDLG)"
_INFERRED_COUNTS = "counts inferred from the last layer's bias"
_RUNNING = "eval mode: running statistics, known with the model"
_OF_THE_CANDIDATES = "train mode: statistics of the candidate batch"
_FEDSGD = "none (FedSGD)"

ATTACKS: dict[str, type["Attack"]] = {}
"""All attacks by name: a class that gives itself one is found by the command line and the tests."""


class Attack(BaseModel):
    """A gradient inversion attack: `attack(model, update)` gives a Reconstruction.

    `iterations`: steps of the optimiser. `restarts`: independent starts, of which the
    one with the lowest attacker-visible cost is returned. `seed`: of the random starts.
    `returns`: the last iterate, or the one of lowest attacker-visible cost.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )

    name: ClassVar[str]
    needs_statistics: ClassVar[bool] = False  # of the private batch at its BatchNorm layers
    replayable: ClassVar[bool] = True  # every step does the same work: a GPU can replay one
    pausable: ClassVar[bool] = True  # the optimiser's state is tensors, which a file can keep

    iterations: PositiveInt = 300
    restarts: PositiveInt = 1
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    returns: Literal["last", "lowest_cost"] = "last"

    @classmethod
    def __pydantic_init_subclass__(cls, **_) -> None:
        if "name" in vars(cls):
            ATTACKS[cls.name] = cls

    @classmethod
    def tuned(cls, condition: str, *, arm: str = "", **changes) -> Self:
        """Settings tuned for a `Scenario.condition`, such as "cifar10/convnet/B=4".

        `changes` override single ones. `arm`: the name they were tuned under, by
        default the class's. Raises DataError when none ship.
        """
        return cls(**tuned(arm or cls.__name__, condition) | changes)

    @field_serializer("prior", check_fields=False)
    def _by_fingerprint(self, prior) -> str:
        return prior.fingerprint

    # The steps a subclass defines ---------------------------------------------------

    def require(self, update: SharedUpdate) -> None:
        """Raise a GipipError for an update that the attack cannot take."""
        if hasattr(self, "prior"):
            self.prior.check(update.image_shape)

    def known_labels(self, model: ClientModel, update: SharedUpdate) -> Int[Tensor, "batch"] | None:
        """The labels shared, else those inferred from the last layer; None to optimise them."""
        return infer_labels(model, update) if update.labels is None else update.labels

    def variables(self, view: View) -> Variables:
        """What is optimised: "images", normalised, from normal noise; and what a subclass adds."""
        return {"images": view.randn(*view.shape)}

    def candidate(self, view: View, variables: Variables) -> Images:
        """The normalised images that the variables stand for."""
        return variables["images"]

    @abstractmethod
    def optimizer(
        self, variables: Variables
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
        """The optimiser and its learning-rate schedule."""

    @abstractmethod
    def terms(self, view: View, variables: Variables) -> Terms:
        """The weighted terms of the cost, by name."""

    def direction(self, gradient: Tensor) -> Tensor:
        """What the optimiser receives in place of the cost's gradient."""
        return gradient

    def project(self, view: View, variables: Variables) -> None:
        """Restore constraints in place after a step; none by default."""

    def labels(self, view: View, variables: Variables) -> Int[Tensor, "batch"]:
        """The labels that belong to a result."""
        return view.fixed_labels

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        """What this attack takes for granted, as data for the tables."""
        one = update.batch_size == 1
        inferred = _INFERRED_LABEL if one else _INFERRED_COUNTS
        return {
            "labels": inferred if update.labels is None else "given",
            "BatchNorm": _RUNNING if update.mode == "eval" else _OF_THE_CANDIDATES,
            "local training": _about_steps(update.fedavg) if update.fedavg else _FEDSGD,
            "defence": ", then ".join(update.defenses) or "none",
            "auxiliary data": _about(self.prior) if hasattr(self, "prior") else "none",
        }

    # How it runs --------------------------------------------------------------------

    def __call__(
        self,
        model: ClientModel,
        update: SharedUpdate,
        *,
        engine: str = "auto",
        chunk_size: int | None = None,
        watch: Callable[[int, Tensor, float], None] | None = None,
        watch_every: int = 25,
        checkpoint: Checkpoint | None = None,
    ) -> Reconstruction:
        """Reconstruct the images behind `update`, which a client with `model` shared.

        `engine`: how the gradient is computed (see `gipip.attacks.engines`), by default
        the fastest one; they differ by rounding only. `chunk_size`: take the
        candidates' gradient from so many images at a time, for less memory.
        `watch(iteration, images, cost)` is called every `watch_every` iterations with
        the candidate in [0, 1]; it may raise StopIteration to end the attack. Ctrl-C
        ends it too; either way what there is comes back. `checkpoint`: a file from
        which an attack that did not end goes on; OutOfTime when it pauses there. Raises
        ModelError, UpdateError, LabelError, BatchSizeError or EngineError before the
        first iteration.
        """
        started = time.perf_counter()
        update.check(model)
        self.require(update)
        options = {"replayable": self.replayable, "chunk_size": chunk_size}
        view = View.of(model, update, engine, **options)
        view.labels = self.known_labels(view.model, update)
        observers: list[Observer] = [Progress(type(self).__name__)]
        if watch:
            observers.append(Watch(watch, watch_every))
        if checkpoint and self.pausable:
            observers.append(checkpoint)
        # Gradients are matched to float32's precision.
        exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with exact, sdpa_kernel(_EXACT_ATTENTION):
            courses = self.attempts(view, observers)
        seconds = time.perf_counter() - started + (checkpoint.earlier if checkpoint else 0)
        return self._reconstruction(view, courses, seconds)

    def attempts(self, view: View, observers: list[Observer]) -> list[Course]:
        """One from each start, or fewer if the user stops one."""
        courses: list[Course] = []
        for restart in range(self.restarts):
            courses.append(self.attempt(view, restart, observers))
            if courses[-1].stopped:
                break
        return courses

    def attempt(self, view: View, restart: int, observers: list[Observer]) -> Course:
        """The whole optimisation from one random start."""
        view.generator.manual_seed(self.seed + restart)
        return self.minimise(view, observers)

    def minimise(self, view: View, observers: list[Observer]) -> Course:
        """The loop on this attack's terms, from where `variables` puts it."""
        start = self.variables(view).items()
        variables = {name: value.detach().clone().requires_grad_() for name, value in start}
        optimizer, schedule = self.optimizer(variables)
        course = Course(
            self.iterations,
            variables,
            optimizer,
            schedule,
            images=partial(self._images, view, variables),
        )
        return minimise(
            partial(self.terms, view),
            course,
            direction=self.direction,
            project=partial(self.project, view),
            observers=observers,
            replayed=view.gradients.replayed,
        )

    def chosen(self, course: Course) -> tuple[Variables, float, str]:
        """The iterate to return, its attacker-visible cost, and which one it is."""
        if self.returns == "last" and course.finite:
            return course.variables, course.cost.item(), "last iterate"
        return course.best, course.best_cost.item(), "lowest attacker-visible cost"

    @torch.no_grad()
    def _images(self, view: View, variables: Variables) -> Images:
        return view.images(self.candidate(view, variables)).float().cpu()

    def _reconstruction(self, view: View, courses: list[Course], seconds: float) -> Reconstruction:
        """The best course's."""
        results = [self.chosen(course) for course in courses]
        best = min(range(len(courses)), key=lambda index: results[index][1])
        variables, cost, returned = results[best]
        notes = [note for course in courses for note in course.notes]
        if not all(course.finite for course in courses):
            advice = "A smaller learning rate or another seed may help."
            warnings.warn(f"{type(self).__name__}: {'; '.join(notes)}. {advice}", stacklevel=3)
        return Reconstruction(
            images=self._images(view, variables),
            labels=self.labels(view, variables).cpu(),
            history=courses[best].curves,
            cost=cost,
            restart_costs=tuple(result[1] for result in results),
            returned=returned,
            assumptions=self.assumptions(view.update),
            seconds=seconds,
            engine=view.gradients.name,
            interrupted=courses[-1].stopped,
            notes=(*notes, *view.gradients.notes),
        )


def _about_steps(fedavg: FedAvg) -> str:
    which = "mini-batches in a known order" if fedavg.batch_size else "each on all images"
    return f"{fedavg.steps} steps, {which}"


def _about(prior) -> str:
    return f"{prior.provenance.get('images', 'an unknown number of')} images"
