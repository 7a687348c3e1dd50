"""The one optimisation loop: it minimises `terms(variables)`, and knows no attack and no engine."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from gipip.errors import ModelError

Variables = dict[str, Tensor]
Terms = dict[str, Float[Tensor, ""]]
Step = Callable[[], Terms]
_CHECK_EVERY = 20  # steps between looks at the cost: each look makes a GPU wait


@dataclass(eq=False)
class Course:
    """Where an optimisation is, and how it goes on.

    `variables`: what is optimised, in place. `best`: their values of lowest cost so
    far, never of a cost that is not finite. `history`: the weighted terms of the cost
    before each step, in the end also after the last. `stopped`: whether the user ended
    it. `images` shows the variables.
    """

    iterations: int
    variables: Variables
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler | None
    images: Callable[[], Tensor]
    history: list[Terms] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        self.best = {name: value.detach().clone() for name, value in self.variables.items()}
        self.best_cost = torch.full((), torch.inf).to(next(iter(self.best.values())))

    @property
    def cost(self) -> Float[Tensor, ""]:
        """The latest cost that is known."""
        return total(self.history[-1])

    @property
    def curves(self) -> dict[str, Float[Tensor, "evaluations"]]:
        """The course of each term, on the CPU."""
        names = self.history[0]
        return {name: torch.stack([terms[name] for terms in self.history]).cpu() for name in names}

    @property
    def finite(self) -> bool:
        """Whether every cost was."""
        return bool(total(self.curves).isfinite().all())

    @property
    def notes(self) -> Iterator[str]:
        """What the user should know of how it went."""
        if self.stopped:
            steps = len(self.history) - 1
            yield f"stopped by the user after {steps} of {self.iterations} iterations"
        if not self.finite:
            step = int(total(self.curves).isfinite().long().argmin())
            returned = "the iterate of lowest cost before" if step else "the random start"
            when = f"at iteration {step} of {self.iterations}"
            yield f"the cost was not finite {when}; {returned} is returned"

    @property
    def ended(self) -> bool:
        """Whether all steps are taken, or the cost is seen to be no longer finite."""
        steps = len(self.history)
        if steps % _CHECK_EVERY == 1 and not torch.isfinite(self.cost):
            return True
        return steps >= self.iterations

    @torch.no_grad()
    def keep_if_best(self, cost: Float[Tensor, ""]) -> None:
        """Keep the variables if their cost is the lowest so far, without waiting for its value."""
        better = cost < self.best_cost
        self.best_cost.copy_(torch.where(better, cost, self.best_cost))
        for name, variable in self.variables.items():
            self.best[name].copy_(torch.where(better, variable, self.best[name]))


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """The cost, or its curve: the sum of its weighted terms."""
    return sum(terms.values())  # type: ignore[return-value]  # there is one at least


class Observer:
    """Is told how an optimisation goes. StopIteration ends it with what there is."""

    def begin(self, course: Course) -> None:
        """Before the first step; may put the course where an earlier one was."""

    def look(self, course: Course) -> None:
        """After each step."""

    def end(self, course: Course) -> None:
        """After the last step, whatever ended it."""


def minimise(
    terms: Callable[[Variables], Terms],
    course: Course,
    *,
    direction: Callable[[Tensor], Tensor],
    project: Callable[[Variables], None],
    observers: Sequence[Observer] = (),
    replayed: Callable[[Step], Step] | None = None,
) -> Course:
    """Take the steps that are left of the course, and note the cost that they lead to.

    `direction`: what the optimiser receives in place of a gradient. `project`: restores
    constraints in place after a step. `replayed`: makes the step one that does the
    same, faster.
    """

    def step() -> Terms:
        evaluations: list[Terms] = []

        def closure() -> Tensor:  # L-BFGS calls it several times a step
            evaluations.append(_evaluate(terms, course, direction))
            return total(evaluations[-1])

        course.optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            project(course.variables)
        return evaluations[0]

    take = replayed(step) if replayed else step
    for observer in observers:
        observer.begin(course)
    try:
        while not course.ended:
            course.history.append(take())
            if course.schedule:
                course.schedule.step()
            for observer in observers:
                observer.look(course)
    except (KeyboardInterrupt, StopIteration):
        course.stopped = True
    finally:
        for observer in observers:
            observer.end(course)
    course.history.append(_evaluate(terms, course, direction))
    return course


def _evaluate(
    terms: Callable[[Variables], Terms], course: Course, direction: Callable[[Tensor], Tensor]
) -> Terms:
    """The terms of the current cost; the variables receive its gradient, and the best are kept."""
    values = terms(course.variables)
    variables = list(course.variables.values())
    gradients = _derivative(total(values), variables)
    for variable, gradient in zip(variables, gradients, strict=True):
        variable.grad = direction(gradient).contiguous()
    course.keep_if_best(total(values))
    return {name: value.detach() for name, value in values.items()}


def _derivative(cost: Float[Tensor, ""], variables: list[Tensor]) -> tuple[Tensor, ...]:
    """Raises ModelError where the client's gradient has none."""
    try:
        return torch.autograd.grad(cost, variables)
    except RuntimeError as error:
        if "derivative for" not in str(error):
            raise
        raise ModelError(
            f"The network cannot be attacked: its gradient has no derivative in PyTorch ({error}). "
            "Leave the engine to 'auto', or put a layer that computes the same in its place."
        ) from error
