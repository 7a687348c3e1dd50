"""The one optimisation loop of every attack.

An attack sees the model, the shared update and its prior; nothing else. Subclasses say
what is optimised (`variables`), with which optimiser, which `terms` make up the cost,
and what holds after each step (`project`).
"""

import copy
import dataclasses
import functools
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn
from torch.func import vmap

from gipip.attacks.checkpoints import Checkpoint
from gipip.attacks.engines.replay import Replay
from gipip.attacks.engines.traced import (
    ClientGradient,
    Engine,
    choose_engine,
    client_gradient,
    in_chunks,
    laid_out,
)
from gipip.attacks.labels import infer_labels
from gipip.attacks.objectives import norm
from gipip.errors import BatchSizeError, EngineError, LabelError, UpdateError
from gipip.federation.client import SharedUpdate
from gipip.federation.models import ClientModel, trainable
from gipip.progress import progress

_CHECK_EVERY = 20  # iterations between looks at the cost: each look makes a GPU wait


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an attack recovered, and how.

    `images`: float32 in [0, 1], shape (batch, 3, height, width), on the CPU. `labels`:
    given, inferred or optimised ones, as `assumptions` says. `history`: for each
    weighted term of the cost its value before every iteration and after the last, shape
    (iterations + 1,); the cost is their sum. `restart_costs`: the attacker-visible cost
    of each restart's result; the lowest is returned. `returned`: which iterate the
    images are. `engine`: how the gradient was computed. `interrupted`: whether the user
    stopped it before its last iteration. `notes`: what went wrong on the way
    (non-finite costs, interruption).
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
    """All that an attack works with: the network that takes normalised images, the
    update's gradients, and labels if the attack knows them.

    `gradients`: the update that a client with given normalised images and labels (class
    indices or distributions) would share, differentiable. `update`: all that was
    shared; its gradients are the `target`, g*. `shape`: of the candidate images.
    `start`: what an earlier stage of an attack found, for the next one.
    """

    network: nn.Module
    gradients: ClientGradient
    engine: Engine
    normalize: nn.Module
    update: SharedUpdate
    target: tuple[Tensor, ...]
    shape: tuple[int, int, int, int]
    classes: int
    labels: Int[Tensor, "batch"] | None
    generator: torch.Generator
    placed: dict[nn.Module, nn.Module] = field(default_factory=dict)
    start: dict[str, Tensor] = field(default_factory=dict)

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
    """One restart on one update: its best iterate by attacker-visible cost, its last
    one, and the course of the terms of the cost.
    """

    view: View
    variables: dict[str, Tensor]
    best: dict[str, Tensor]
    best_cost: float
    history: dict[str, Float[Tensor, "evaluations"]]
    notes: list[str]
    stopped: bool


@dataclass(eq=False)
class _Lanes:
    """Attempts under way side by side: every tensor has a first dimension for them, and
    `views` one entry each.
    """

    views: list[View]
    variables: dict[str, Tensor]
    best: dict[str, Tensor]
    best_costs: Float[Tensor, "lanes"]
    history: list[dict[str, Float[Tensor, "lanes"]]] = field(default_factory=list)

    @classmethod
    def start(cls, views: list[View], variables: list[dict[str, Tensor]]) -> "_Lanes":
        stacked = {
            name: torch.stack([lane[name].detach() for lane in variables]).requires_grad_()
            for name in variables[0]
        }
        infinite = torch.full((len(views),), float("inf")).to(views[0].like)
        return cls(
            views,
            stacked,
            {name: variable.detach().clone() for name, variable in stacked.items()},
            infinite,
        )

    @functools.cached_property
    def targets(self) -> tuple[Tensor, ...]:
        """The shared gradients of all, stacked."""
        return tuple(
            torch.stack(gradients)
            for gradients in zip(*(view.target for view in self.views), strict=True)
        )

    @functools.cached_property
    def labels(self) -> Int[Tensor, "lanes batch"]:
        """The labels of all, stacked."""
        return torch.stack([view.labels for view in self.views])

    def lane(self, index: int) -> dict[str, Tensor]:
        """The variables of one attempt, as views of all."""
        if len(self.views) == 1:
            return {
                name: variable.squeeze(0) for name, variable in self.variables.items()
            }  # indexing costs more in the backward pass
        return {name: variable[index] for name, variable in self.variables.items()}

    @torch.no_grad()
    def keep_if_best(self, costs: Float[Tensor, "lanes"]) -> None:
        """Keep the current iterates whose cost is the lowest so far (never one that is
        not finite).
        """
        better = costs < self.best_costs
        self.best_costs.copy_(torch.where(better, costs, self.best_costs))
        for name, variable in self.variables.items():
            mask = better.view(-1, *[1] * (variable.ndim - 1))
            self.best[name].copy_(torch.where(mask, variable, self.best[name]))

    def attempts(self, note: str = "") -> list[_Attempt]:
        """What became of each; with the `note` that the user stopped them."""
        history = {
            name: torch.stack([terms[name] for terms in self.history]) for name in self.history[0]
        }
        return [
            _Attempt(
                view,
                {name: variable.detach()[index] for name, variable in self.variables.items()},
                {name: variable[index] for name, variable in self.best.items()},
                self.best_costs[index].item(),
                {name: terms[:, index] for name, terms in history.items()},
                [note] if note else [],
                bool(note),
            )
            for index, view in enumerate(self.views)
        ]


class Attack(BaseModel):
    """A gradient inversion attack: `attack(model, update)` gives a Reconstruction.

    `iterations`: steps of the optimiser. `restarts`: independent starts, of which the
    one with the lowest attacker-visible cost is returned. `seed`: of the random starts.
    `returns`: the last iterate, or the one of lowest attacker-visible cost.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False
    )

    replayable: ClassVar[bool] = (
        True  # every step does the same work, so that a GPU can replay a captured one
    )
    pausable: ClassVar[bool] = (
        True  # the optimiser's state is a dict of tensors, which a checkpoint can keep
    )
    stackable: ClassVar[bool] = (
        True  # several attempts can be optimised in one tensor, with `terms` mapped over them
    )

    iterations: PositiveInt = 300
    restarts: PositiveInt = 1
    seed: int = 0
    returns: Literal["last", "lowest_cost"] = "last"

    # The steps a subclass defines ----------------------------------------------

    def known_labels(self, model: ClientModel, update: SharedUpdate) -> Int[Tensor, "batch"] | None:
        """The labels the attack works with: the shared ones, else those inferred from
        the last layer; None if it optimises them.
        """
        return infer_labels(model, update) if update.labels is None else update.labels

    def variables(self, view: View) -> dict[str, Tensor]:
        """What is optimised: "images", normalised candidates started from standard
        normal noise, and whatever a subclass adds.
        """
        return {"images": view.randn(*view.shape)}

    def candidate(
        self, view: View, variables: dict[str, Tensor]
    ) -> Float[Tensor, "batch 3 height width"]:
        """The normalised images that the variables stand for."""
        return variables["images"]

    def optimizer(
        self, variables: dict[str, Tensor]
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler | None]:
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
        """What this attack takes for granted, as data for the tables: labels,
        BatchNorm, local training, defence, auxiliary data.
        """
        inferred = (
            "inferred from the last layer (iDLG)"
            if update.batch_size == 1
            else "counts inferred from the last layer's bias"
        )
        running, candidates = (
            "eval mode: running statistics, known with the model",
            "train mode: statistics of the candidate batch",
        )
        return {
            "labels": inferred if update.labels is None else "given",
            "BatchNorm": running if update.mode == "eval" else candidates,
            "local training": f"{update.fedavg.steps} steps, mini-batches in a known order"
            if update.fedavg
            else "none (FedSGD)",
            "defence": ", then ".join(update.defenses) or "none",
            "auxiliary data": "none",
        }

    # The loop ------------------------------------------------------------------

    def __call__(
        self,
        model: ClientModel,
        update: SharedUpdate,
        *,
        engine: str = "auto",
        chunk_size: int | None = None,
        together: int | None = None,
        watch: Callable[[int, Tensor, float], None] | None = None,
        watch_every: int = 25,
        checkpoint: Checkpoint | None = None,
    ) -> Reconstruction:
        """Reconstruct the images behind `update`, which a client with `model` shared.

        `engine`: how the gradient is computed (see `gipip.attacks.engines`), by default
        the fastest that pays; they differ by rounding only. `chunk_size`: take the
        candidates' gradient from so many images at a time, for less memory. `together`:
        see `many`. `watch(iteration, images, cost)` is called every `watch_every`
        iterations with the candidate in [0, 1]; it may raise StopIteration to end the
        attack there. Ctrl-C ends it too; either way what there is comes back.
        `checkpoint`: a file from which an attack that did not end goes on; OutOfTime
        when it pauses there. Raises ModelError, UpdateError, LabelError, BatchSizeError
        or EngineError before the first iteration.
        """
        options = {
            "engine": engine,
            "chunk_size": chunk_size,
            "together": together,
            "watch": watch,
            "watch_every": watch_every,
        }
        return self.many(model, [update], checkpoint=checkpoint, **options)[0]

    def many(
        self,
        model: ClientModel,
        updates: Sequence[SharedUpdate],
        *,
        together: int | None = None,
        engine: str = "auto",
        chunk_size: int | None = None,
        checkpoint: Checkpoint | None = None,
        **options,
    ) -> list[Reconstruction]:
        """A reconstruction for each of several updates that clients with the same model
        shared; options as for one.

        `together`: how many attempts (updates and restarts) to compute at once; by
        default 8 for a network so small that this pays on a CPU, else 1. It needs
        BatchNorm in eval mode and an engine other than "eager". `seconds` is the time
        of all, before a pause and after it. What the user stops ends all of them; those
        not begun are left out.
        """
        if not updates:
            return []
        started = time.perf_counter()
        views = self._views(model, updates, engine, chunk_size)
        if together is None:
            together = _together(views[0], chunk_size)
        elif together != 1:
            _check_together(together, views[0], chunk_size)
        with torch.backends.cudnn.flags(
            enabled=True, deterministic=True, allow_tf32=False
        ):  # gradients are matched to float32's precision
            attempts = self._search(
                views, together, checkpoint=checkpoint if self.pausable else None, **options
            )
        seconds = time.perf_counter() - started + (sum(checkpoint.earlier) if checkpoint else 0)
        of_each = [[attempt for attempt in attempts if attempt.view is view] for view in views]
        return [self._reconstruction(own, seconds) for own in of_each if own]

    def _reconstruction(self, attempts: list[_Attempt], seconds: float) -> Reconstruction:
        """The best attempt's."""
        results = [self._choose(attempt) for attempt in attempts]
        attempt, (variables, cost, returned) = min(
            zip(attempts, results, strict=True), key=lambda pair: pair[1][1]
        )
        view = attempt.view
        with torch.no_grad():
            images = view.images(self.candidate(view, variables)).float().cpu()
        return Reconstruction(
            images=images,
            labels=self.labels(view, variables).cpu(),
            history={name: terms.cpu() for name, terms in attempt.history.items()},
            cost=cost,
            restart_costs=tuple(result[1] for result in results),
            returned=returned,
            assumptions=self.assumptions(view.update),
            seconds=seconds,
            engine=view.engine,
            interrupted=attempts[-1].stopped,
            notes=tuple(
                dict.fromkeys(note for attempt in attempts for note in attempt.notes)
            ),  # a stop is noted by all that it ended
        )

    def _view(
        self,
        model: ClientModel,
        update: SharedUpdate,
        engine: str = "auto",
        chunk_size: int | None = None,
    ) -> View:
        return self._views(model, [update], engine, chunk_size)[0]

    def _views(
        self,
        model: ClientModel,
        updates: Sequence[SharedUpdate],
        engine: str,
        chunk_size: int | None,
    ) -> list[View]:
        """A view of each update; they share the network and all that is computed with it."""
        for update in updates:
            update.check(model)
        first = updates[0]
        kinds = {
            (update.batch_size, update.image_shape, update.mode, update.fedavg)
            for update in updates
        }
        if len(kinds) > 1:
            raise UpdateError(
                f"Updates attacked together must be of one batch size, image size, mode and local training, not {kinds}."
            )
        model = copy.deepcopy(model).train(
            first.mode == "train"
        )  # a copy: train mode would move the running statistics
        shape = (first.batch_size, *first.image_shape)
        with torch.no_grad():
            classes = model(torch.zeros(shape).to(first.gradients[0])).shape[1]
        engine = choose_engine(
            engine, cuda=next(model.parameters()).is_cuda, replayable=self.replayable
        )
        gradients = client_gradient(model.network, trainable(model.network), first.fedavg, engine)
        if chunk_size is not None:
            _check_chunks(chunk_size, first, engine)
            gradients = in_chunks(gradients, chunk_size)
        views = []
        for update in updates:
            if update.labels is not None:
                _check_labels(update.labels, update.batch_size, classes)
            labels = self.known_labels(model, update)
            target = laid_out(update.gradients, engine)
            views.append(
                View(
                    model.network,
                    gradients,
                    engine,
                    model.normalize,
                    update,
                    target,
                    shape,
                    classes,
                    labels,
                    torch.Generator(),
                )
            )
        return views

    def _search(
        self, views: list[View], together: int, watch=None, watch_every: int = 25, checkpoint=None
    ) -> list[_Attempt]:
        """Every restart on every update, so many at once."""
        lanes = [(view, restart) for view in views for restart in range(self.restarts)]
        size = together if self.stackable else 1
        attempts = []
        for first in range(0, len(lanes), size):
            some = lanes[first : first + size]
            upto = f"–{first + len(some)}" if len(some) > 1 else ""
            description = f"{type(self).__name__} {first + 1}{upto}/{len(lanes)}"
            attempts += self._attempt(
                some, watch, watch_every, description, checkpoint and checkpoint.part(first)
            )
            if attempts[-1].stopped:
                break
        return attempts

    def _attempt(
        self,
        lanes: Sequence[tuple[View, int]],
        watch,
        watch_every: int,
        description: str,
        checkpoint: Checkpoint | None,
    ) -> list[_Attempt]:
        """The whole optimisation from the start of each lane: a view and the number of
        a restart; or from where the checkpoint has it.
        """
        views, starts = [view for view, _ in lanes], []
        for view, restart in lanes:
            view.generator.manual_seed(self.seed + restart)
            starts.append(self.variables(view))
        state = _Lanes.start(views, starts)
        optimizer, schedule = self.optimizer(state.variables)
        if checkpoint:
            checkpoint.restore(state, optimizer, schedule)
        if len(lanes) > 1:
            self.terms(
                views[0], state.lane(0)
            )  # so that the gradient is recorded: it cannot be while mapped
        step = functools.partial(self._step, state, optimizer)
        if views[0].engine == "cudagraph":
            step = Replay(step)
        note = ""
        try:
            for iteration in progress(
                range(len(state.history), self.iterations), description=description
            ):
                if (
                    iteration % _CHECK_EVERY == 1
                    and not torch.isfinite(_costs(state.history[-1])).any()
                ):
                    break
                if checkpoint:
                    checkpoint.visit()
                state.history.append(step())
                if schedule:
                    schedule.step()
                if watch and (iteration + 1) % watch_every == 0:
                    costs = _costs(state.history[-1])
                    best = int(costs.nan_to_num(float("inf")).argmin())
                    images = views[best].images(
                        self.candidate(views[best], state.lane(best)).detach()
                    )
                    watch(iteration + 1, images.float().cpu(), costs[best].item())
        except (KeyboardInterrupt, StopIteration):
            note = f"stopped by the user after {len(state.history)} of {self.iterations} iterations"
        if checkpoint and not note:
            checkpoint.keep()
        state.history.append(self._evaluate(state))
        return state.attempts(note)

    def _terms(self, state: _Lanes) -> dict[str, Float[Tensor, "lanes"]]:
        """`terms` of every lane."""
        first = state.views[0]
        if len(state.views) == 1:
            return {name: term[None] for name, term in self.terms(first, state.lane(0)).items()}
        if all(view is first for view in state.views):
            return vmap(functools.partial(self.terms, first))(state.variables)

        def terms(
            variables: dict[str, Tensor], target: tuple[Tensor, ...], labels: Tensor
        ) -> dict[str, Tensor]:
            return self.terms(dataclasses.replace(first, target=target, labels=labels), variables)

        return vmap(terms)(state.variables, state.targets, state.labels)

    def _evaluate(self, state: _Lanes) -> dict[str, Float[Tensor, "lanes"]]:
        """The terms of the current iterates' costs; their gradients go to the
        variables, and the best iterates are kept.
        """
        terms = self._terms(state)
        costs = _costs(terms)
        variables = list(state.variables.values())
        for variable, gradients in zip(
            variables, torch.autograd.grad(costs.sum(), variables), strict=True
        ):
            variable.grad = torch.stack(
                [self.direction(gradient) for gradient in gradients]
            ).contiguous()
        state.keep_if_best(costs)
        return {name: term.detach() for name, term in terms.items()}

    def _step(
        self, state: _Lanes, optimizer: torch.optim.Optimizer
    ) -> dict[str, Float[Tensor, "lanes"]]:
        """One step of the optimiser, and the terms before it."""
        evaluations = []

        def closure() -> Tensor:  # L-BFGS calls it several times a step
            evaluations.append(self._evaluate(state))
            return _costs(evaluations[-1]).sum()

        optimizer.step(closure)
        with torch.no_grad():
            for index, view in enumerate(state.views):
                self.project(view, state.lane(index))
        return evaluations[0]

    def _choose(self, attempt: _Attempt) -> tuple[dict[str, Tensor], float, str]:
        """The iterate to return, its attacker-visible cost, and which one it is."""
        costs = _costs(attempt.history)
        if not torch.isfinite(costs).all():
            first = int((~torch.isfinite(costs)).nonzero()[0])
            returned = "the iterate of lowest cost before" if first else "the random start"
            note = f"the cost was not finite at iteration {first} of {self.iterations}; {returned} is returned"
            attempt.notes.append(note)
            warnings.warn(
                f"{type(self).__name__}: {note}. A smaller learning rate or another seed may help.",
                stacklevel=5,
            )
            return attempt.best, attempt.best_cost, "lowest attacker-visible cost"
        if self.returns == "lowest_cost":
            return attempt.best, attempt.best_cost, "lowest attacker-visible cost"
        return attempt.variables, costs[-1].item(), "last iterate"


def _together(view: View, chunk_size: int | None) -> int:
    """How many attempts at once are fastest, as benchmarks/together.py measured it on a CPU."""
    small = (
        sum(gradient.numel() for gradient in view.target) < 50_000
    )  # the LeNet; not the ConvNets
    possible = view.engine != "eager" and view.update.mode == "eval" and chunk_size is None
    return 8 if small and possible else 1


def _check_together(together: int, view: View, chunk_size: int | None) -> None:
    if (
        together < 1
        or view.engine == "eager"
        or view.update.mode == "train"
        or chunk_size is not None
    ):
        raise EngineError(
            f"{together} attempts at once cannot be computed: that needs a positive number, an engine other than 'eager' (here: "
            f"{view.engine!r}), BatchNorm in eval mode (here: {view.update.mode}) and no chunk_size. Leave out `together`."
        )


def _costs(terms: Mapping[str, Tensor]) -> Tensor:
    return sum(terms.values())


def _check_labels(labels: Int[Tensor, "batch"], batch_size: int, classes: int) -> None:
    if len(labels) != batch_size:
        raise BatchSizeError(
            f"The update is of {batch_size} images but {len(labels)} labels came with it. Expected one label an image."
        )
    if ((labels < 0) | (labels >= classes)).any():
        raise LabelError(
            f"The update's labels {labels.tolist()} are out of range: the model has {classes} classes, 0 to {classes - 1}."
        )


def _check_chunks(chunk_size: int, update: SharedUpdate, engine: Engine) -> None:
    if chunk_size < 1 or update.mode == "train" or update.fedavg or engine == "eager":
        raise EngineError(
            f"The gradient cannot be taken in chunks of {chunk_size}: that needs a positive number, BatchNorm in eval mode (here: "
            f"{update.mode}), one gradient rather than local training, and an engine other than 'eager' (here: {engine!r})."
        )
