"""The one optimisation loop of every attack.

An attack sees the model, the shared update and its prior; nothing else. Subclasses say what is optimised (`variables`), with which
optimiser, which `terms` make up the cost, and what holds after each step (`project`).
"""

import copy
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from gipip.attacks.engines import ClientGradient, Engine, choose_engine, client_gradient, in_chunks
from gipip.attacks.labels import infer_labels
from gipip.attacks.objectives import norm
from gipip.attacks.replay import Replay
from gipip.errors import BatchSizeError, EngineError, LabelError
from gipip.federation import SharedUpdate
from gipip.models import ClientModel, trainable
from gipip.progress import progress

_CHECK_EVERY = 20  # iterations between looks at the cost: each look makes a GPU wait


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack recovered, and how.

    `images`: float32 in [0, 1], shape (batch, 3, height, width), on the CPU. `labels`: given, inferred or optimised ones, as
    `assumptions` says. `history`: for each weighted term of the cost its value before every iteration and after the last, shape
    (iterations + 1,); the cost is their sum. `restart_costs`: the attacker-visible cost of each restart's result; the lowest is returned.
    `returned`: which iterate the images are. `engine`: how the gradient was computed. `interrupted`: whether the user stopped it before its
    last iteration. `notes`: what went wrong on the way (non-finite costs, interruption).
    """

    images: Float[Tensor, "batch 3 height width"]
    labels: Int[Tensor, "batch"]
    history: dict[str, Float[Tensor, "evaluations"]]
    cost: float
    restart_costs: tuple[float, ...]
    returned: str
    assumptions: dict[str, str]
    seconds: float
    engine: str = "eager"
    interrupted: bool = False
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class View:
    """All that an attack works with: the network that takes normalised images, the update's gradients, and labels if the attack knows them.

    `gradients`: the update that a client with given normalised images and labels (class indices or distributions) would share,
    differentiable. `update`: all that was shared; its gradients are the `target`. `shape`: of the candidate images. `start`: what an
    earlier stage of an attack found, for the next one.
    """

    network: nn.Module
    gradients: ClientGradient
    engine: Engine
    normalize: nn.Module
    update: SharedUpdate
    shape: tuple[int, int, int, int]
    classes: int
    labels: Int[Tensor, "batch"] | None
    generator: torch.Generator
    placed: dict[nn.Module, nn.Module] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)

    @property
    def target(self) -> tuple[Tensor, ...]:
        """g*: the shared gradients."""
        return self.update.gradients

    @functools.cached_property
    def target_norm(self) -> Float[Tensor, ""]:
        """‖g*‖ over all parameters."""
        return norm(self.target)

    @property
    def like(self) -> Tensor:
        """A tensor on the attack's device and in its precision."""
        return next(self.network.parameters())

    def place(self, module: nn.Module) -> nn.Module:
        """A copy of a prior on the attack's device and in its precision, made once."""
        if module not in self.placed:
            self.placed[module] = copy.deepcopy(module).to(self.like)
        return self.placed[module]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers from the attack's own generator, the same on every device."""
        return torch.randn(*shape, generator=self.generator).to(self.like.device, self.like.dtype)

    def images(self, normalized: Tensor) -> Float[Tensor, "batch 3 height width"]:
        """The candidate in image space, clamped to [0, 1]."""
        return self.normalize.inverse(normalized).clamp(0, 1)


@dataclass(eq=False)
class _Attempt:
    """One restart: its best iterate by attacker-visible cost, its last one, and the course of the cost."""

    variables: dict[str, Tensor]
    best: dict[str, Tensor]
    best_cost: Tensor
    history: list[dict[str, Tensor]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: bool = False

    @torch.no_grad()
    def keep_if_best(self, cost: Tensor) -> None:
        """Keep the current iterate if its cost is the lowest so far (never if it is not finite)."""
        better = cost < self.best_cost
        self.best_cost.copy_(torch.where(better, cost, self.best_cost))
        for name, variable in self.variables.items():
            self.best[name].copy_(torch.where(better, variable, self.best[name]))

    def costs(self) -> Tensor:
        return torch.stack([sum(terms.values()) for terms in self.history])


class Attack(BaseModel):
    """A gradient inversion attack: `attack(model, update)` gives a Reconstruction.

    `iterations`: steps of the optimiser. `restarts`: independent starts, of which the one with the lowest attacker-visible cost is
    returned. `seed`: of the random starts. `returns`: the last iterate, or the one of lowest attacker-visible cost.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    replayable: ClassVar[bool] = True  # every step does the same work, so that a GPU can replay a captured one

    iterations: PositiveInt = 300
    restarts: PositiveInt = 1
    seed: int = 0
    returns: Literal["last", "lowest_cost"] = "last"

    # The steps a subclass defines ------------------------------------------------------------------------------------------------

    def known_labels(self, model: ClientModel, update: SharedUpdate) -> Int[Tensor, "batch"] | None:
        """The labels the attack works with: the shared ones, else those inferred from the last layer; None if it optimises them."""
        return infer_labels(model, update) if update.labels is None else update.labels

    def variables(self, view: View) -> dict[str, Tensor]:
        """What is optimised: "images", normalised candidates started from standard normal noise, and whatever a subclass adds."""
        return {"images": view.randn(*view.shape)}

    def candidate(self, view: View, variables: dict[str, Tensor]) -> Float[Tensor, "batch 3 height width"]:
        """The normalised images that the variables stand for."""
        return variables["images"]

    def optimizer(self, variables: dict[str, Tensor]) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
        """The optimiser and its learning-rate schedule."""
        raise TypeError(f"{type(self).__name__} does not define optimizer()")

    def terms(self, view: View, variables: dict[str, Tensor]) -> dict[str, Float[Tensor, ""]]:
        """The weighted terms of the cost, by name."""
        raise TypeError(f"{type(self).__name__} does not define terms()")

    def direction(self, gradient: Tensor) -> Tensor:
        """What the optimiser receives in place of the cost's gradient."""
        return gradient

    def project(self, view: View, variables: dict[str, Tensor]) -> None:
        """Restore constraints in place after a step; none by default."""

    def labels(self, view: View, variables: dict[str, Tensor]) -> Int[Tensor, "batch"]:
        """The labels that belong to a result."""
        return view.labels

    def assumptions(self, update: SharedUpdate) -> dict[str, str]:
        """What this attack takes for granted, as data for the tables: labels, BatchNorm, local training, defence, auxiliary data."""
        inferred = "inferred from the last layer (iDLG)" if update.batch_size == 1 else "counts inferred from the last layer's bias"
        running, candidates = "eval mode: running statistics, known with the model", "train mode: statistics of the candidate batch"
        return {
            "labels": inferred if update.labels is None else "given",
            "BatchNorm": running if update.mode == "eval" else candidates,
            "local training": f"{update.fedavg.steps} steps, mini-batches in a known order" if update.fedavg else "none (FedSGD)",
            "defence": ", then ".join(update.defenses) or "none",
            "auxiliary data": "none",
        }

    # The loop --------------------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        model: ClientModel,
        update: SharedUpdate,
        *,
        engine: str = "auto",
        chunk_size: int | None = None,
        watch: Callable[[int, Tensor, float], None] | None = None,
        watch_every: int = 25,
    ) -> Reconstruction:
        """Reconstruct the images behind `update`, which a client with `model` shared.

        `engine`: how the gradient is computed (see `gipip.attacks.engines`), by default the fastest that pays; they differ by rounding
        only. `chunk_size`: take the candidates' gradient from so many images at a time, for less memory.
        `watch(iteration, images, cost)` is called every `watch_every` iterations with the candidate in [0, 1]; it may raise StopIteration
        to end the attack there. Ctrl-C ends it too; either way what there is comes back. Raises ModelError, UpdateError, LabelError,
        BatchSizeError or EngineError before the first iteration.
        """
        started = time.perf_counter()
        view = self._view(model, update, engine, chunk_size)
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # gradients are matched to float32's precision
            attempts, results = self._search(view, watch, watch_every)
        attempt, (variables, cost, returned) = min(zip(attempts, results, strict=True), key=lambda pair: pair[1][1])
        with torch.no_grad():
            images = view.images(self.candidate(view, variables)).float().cpu()
        return Reconstruction(
            images=images,
            labels=self.labels(view, variables).cpu(),
            history={name: torch.stack([terms[name] for terms in attempt.history]).cpu() for name in attempt.history[0]},
            cost=cost,
            restart_costs=tuple(result[1] for result in results),
            returned=returned,
            assumptions=self.assumptions(update),
            seconds=time.perf_counter() - started,
            engine=view.engine,
            interrupted=attempts[-1].stopped,
            notes=tuple(note for attempt in attempts for note in attempt.notes),
        )

    def _view(self, model: ClientModel, update: SharedUpdate, engine: str = "auto", chunk_size: int | None = None) -> View:
        update.check(model)
        model = copy.deepcopy(model).train(update.mode == "train")  # a copy: train mode would move the running statistics
        shape = (update.batch_size, *update.image_shape)
        with torch.no_grad():
            classes = model(torch.zeros(shape).to(update.gradients[0])).shape[1]
        if update.labels is not None:
            _check_labels(update.labels, update.batch_size, classes)
        labels = self.known_labels(model, update)
        cuda = next(model.parameters()).is_cuda
        engine = choose_engine(engine, cuda=cuda, replayable=self.replayable)
        gradients = client_gradient(model.network, trainable(model.network), update.fedavg, engine)
        if chunk_size is not None:
            _check_chunks(chunk_size, update, engine)
            gradients = in_chunks(gradients, chunk_size)
        return View(model.network, gradients, engine, model.normalize, update, shape, classes, labels, torch.Generator())

    def _search(self, view: View, watch=None, watch_every: int = 25) -> tuple[list[_Attempt], list[tuple[dict[str, Tensor], float, str]]]:
        """Every restart, and what `_choose` returns for each."""
        attempts = []
        for restart in range(self.restarts):
            view.generator.manual_seed(self.seed + restart)
            attempts.append(self._attempt(view, watch, watch_every, f"{type(self).__name__} {restart + 1}/{self.restarts}"))
            if attempts[-1].stopped:
                break
        return attempts, [self._choose(attempt) for attempt in attempts]

    def _attempt(self, view: View, watch, watch_every: int, description: str) -> _Attempt:
        variables = {name: variable.requires_grad_() for name, variable in self.variables(view).items()}
        optimizer, schedule = self.optimizer(variables)
        infinite = torch.full((), float("inf")).to(view.like)
        attempt = _Attempt(variables, {name: variable.detach().clone() for name, variable in variables.items()}, infinite)
        step = functools.partial(self._step, view, attempt, optimizer)
        if view.engine == "cudagraph":
            step = Replay(step)
        try:
            for iteration in progress(range(self.iterations), description=description):
                attempt.history.append(step())
                if schedule:
                    schedule.step()
                if iteration % _CHECK_EVERY == 0 and not _finite(attempt):
                    break
                if watch and (iteration + 1) % watch_every == 0:
                    images = view.images(self.candidate(view, variables).detach())
                    watch(iteration + 1, images.float().cpu(), float(sum(attempt.history[-1].values())))
        except (KeyboardInterrupt, StopIteration):
            attempt.stopped = True
            attempt.notes.append(f"stopped by the user after {len(attempt.history)} of {self.iterations} iterations")
        attempt.history.append(self._evaluate(view, attempt))
        return attempt

    def _evaluate(self, view: View, attempt: _Attempt) -> dict[str, Tensor]:
        """The terms of the current iterate's cost; their gradient goes to the variables, and the iterate is kept if it is the best."""
        terms = self.terms(view, attempt.variables)
        cost = sum(terms.values())
        variables = list(attempt.variables.values())
        for variable, gradient in zip(variables, torch.autograd.grad(cost, variables), strict=True):
            variable.grad = self.direction(gradient)
        attempt.keep_if_best(cost)
        return {name: term.detach() for name, term in terms.items()}

    def _step(self, view: View, attempt: _Attempt, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """One step of the optimiser, and the terms before it."""
        evaluations = []

        def closure() -> Tensor:  # L-BFGS calls it several times a step
            evaluations.append(self._evaluate(view, attempt))
            return sum(evaluations[-1].values())

        optimizer.step(closure)
        with torch.no_grad():
            self.project(view, attempt.variables)
        return evaluations[0]

    def _choose(self, attempt: _Attempt) -> tuple[dict[str, Tensor], float, str]:
        """The iterate to return, its attacker-visible cost, and which one it is."""
        costs = attempt.costs()
        last, best = costs[-1].item(), attempt.best_cost.item()
        if not torch.isfinite(costs).all():
            first = int((~torch.isfinite(costs)).nonzero()[0])
            returned = "the iterate of lowest cost before" if first else "the random start"
            note = f"the cost was not finite at iteration {first} of {self.iterations}; {returned} is returned"
            attempt.notes.append(note)
            warnings.warn(f"{type(self).__name__}: {note}. A smaller learning rate or another seed may help.", stacklevel=3)
            return attempt.best, best, "lowest attacker-visible cost"
        if self.returns == "lowest_cost":
            return attempt.best, best, "lowest attacker-visible cost"
        return {name: variable.detach() for name, variable in attempt.variables.items()}, last, "last iterate"


def _finite(attempt: _Attempt) -> bool:
    return bool(torch.isfinite(sum(attempt.history[-1].values())))


def _check_labels(labels: Int[Tensor, "batch"], batch_size: int, classes: int) -> None:
    if len(labels) != batch_size:
        raise BatchSizeError(f"The update is of {batch_size} images but {len(labels)} labels came with it. Expected one label an image.")
    if ((labels < 0) | (labels >= classes)).any():
        raise LabelError(f"The update's labels {labels.tolist()} are out of range: the model has {classes} classes, 0 to {classes - 1}.")


def _check_chunks(chunk_size: int, update: SharedUpdate, engine: Engine) -> None:
    if chunk_size < 1 or update.mode == "train" or update.fedavg or engine == "eager":
        raise EngineError(
            f"The gradient cannot be taken in chunks of {chunk_size}: that needs a positive number, BatchNorm in eval mode (here: "
            f"{update.mode}), one gradient rather than local training, and an engine other than 'eager' (here: {engine!r})."
        )
