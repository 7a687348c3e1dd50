"""What all priors share: their files and fingerprints, and the course of their training.

A new prior is one module: a `Network`, a `Prior` that holds it, a `Training` of it, and
a function with `validated` settings that calls `trained`.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar

import torch
from jaxtyping import Float
from pydantic import ConfigDict, Field, validate_call
from torch import Tensor, nn

from gipip.data.datasets import LabeledImages
from gipip.errors import DamagedFileError, DataError, GipipError, UpdateError
from gipip.files import canonical_json, fingerprint, read_kept, read_tensors, shipped, write_tensors
from gipip.progress import progress, require_time

Images = Float[Tensor, "batch 3 height width"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
LearningRate = Annotated[float, Field(gt=0, le=1e30)]  # more does not fit into a float32

validated = validate_call(config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
"""Of a function: its arguments are checked against their annotations, as an attack's
settings are; pydantic's ValidationError names a wrong one.
"""


class Network(nn.Module, ABC):
    """What a prior is trained to be. `arguments`: those that build it again."""

    arguments: dict[str, int]

    @abstractmethod
    def misfit(self, image_shape: Sequence[int]) -> str:
        """Why it is not for images of this shape, (3, height, width); empty if it is."""


class Prior(nn.Module):
    """A network trained on auxiliary images, which attacks use and never train.

    `provenance` says how it was trained (data, settings, history) and travels with the
    weights. A subclass gives the network's name in files and as an attribute, its
    class, and the names of `constants` beside the weights.
    """

    kind: ClassVar[str]
    network_class: ClassVar[type[Network]]
    constants: ClassVar[tuple[str, ...]] = ()

    def __init__(self, network: Network, provenance: dict | None = None):
        super().__init__()
        self.add_module(self.kind, network.eval().requires_grad_(False))
        self.provenance = provenance or {}

    @property
    def network(self) -> Network:
        return self.get_submodule(self.kind)  # type: ignore[return-value]

    def check(self, image_shape: Sequence[int]) -> None:
        """Raise UpdateError unless it is for an update of images of shape (3, height,
        width).
        """
        if reason := self.network.misfit(image_shape):
            raise UpdateError(f"The prior does not fit the update: {reason}")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights and the constants."""
        return fingerprint(self.state_dict(), "".join(map(repr, self._constants().values())))

    def _constants(self) -> dict[str, float | str]:
        return {name: vars(self)[name] for name in self.constants}

    def save(self, path: Path | str) -> Path:
        """Write weights, constants and provenance to one safetensors file."""
        metadata = {self.kind: self.network.arguments, "provenance": self.provenance}
        return write_tensors(path, self.network.state_dict(), metadata | self._constants())

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote; DamagedFileError when it is corrupt or holds something else."""
        tensors, metadata = read_tensors(path)
        try:
            if cls.kind not in metadata:
                raise DataError("another file of gipip")
            network = cls.network_class(**metadata[cls.kind])
            network.load_state_dict(tensors)
            return cls(network, **{name: metadata[name] for name in ("provenance", *cls.constants)})
        except (KeyError, TypeError, ValueError, RuntimeError, DataError) as error:
            reason = f"{path} holds no {cls.kind} ({error})."
            raise DamagedFileError(f"{reason} {cls._advice()}") from error

    @classmethod
    def shipped(cls, name: str) -> Self:
        """The one of that name that ships with gipip; DataError, with the names, if
        none does.
        """
        return cls.load(shipped(cls.kind, name, cls._advice()))

    @classmethod
    def _advice(cls) -> str:
        return f"Train one: gipip.train_{cls.kind}(auxiliary), or gipip train {cls.kind}."


P = TypeVar("P", bound=Prior)


class Training(ABC, Generic[P]):
    """A prior's training, which ends with the network's weights of the lowest
    `measure`.

    A subclass defines `advance` and `judge`, and says which `prior` comes of it and
    after how many steps it judges. `patience`: judgements without a better one before
    it stops early. Raises DataError for images that the network is not for, or fewer
    than two.
    """

    prior: type[P]
    measure: ClassVar[str]
    every: ClassVar[int]

    def __init__(self, network: Network, auxiliary: LabeledImages, patience: float = math.inf):
        reason = network.misfit(auxiliary.pixels.shape[1:])
        if reason or len(auxiliary) < 2:
            reason = reason or "give at least 2 images, better 1,000."
            raise DataError(f"These {len(auxiliary)} images cannot be trained on: {reason}")
        self.network, self.patience = network, patience
        self.history: dict[str, list] = {"step": [], self.measure: []}
        self.steps, self.waited, self.interrupted = 0, 0, False
        self._best = copy.deepcopy(network.state_dict())

    @property
    def device(self) -> str:
        """The GPU, if there is one."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @abstractmethod
    def advance(self) -> None:
        """Take one step."""

    @abstractmethod
    def judge(self) -> dict[str, float]:
        """The `measure` of the network as it is, and what else the history shall hold."""

    def finish(self) -> P:
        """The prior, of the weights as they are."""
        return self.prior(self.network.cpu())

    def run(self, steps: int) -> P:
        """The prior after `steps` steps. Ctrl-C after the first ends it with the best
        weights so far.

        Raises GipipError when the measure is not finite.
        """
        try:
            for _ in progress(range(steps), description=self.prior.kind, unit="step"):
                self.advance()
                self.steps += 1
                if self.steps % self.every == 0 or self.steps == steps:
                    self._note(self.judge())
                if self.waited >= self.patience:
                    break
        except KeyboardInterrupt:
            if not self.steps:
                raise
            self.interrupted = True
            if self.steps not in self.history["step"]:
                self._note(self.judge())
        self.network.load_state_dict(self._best)
        return self.finish()

    def _note(self, found: dict[str, float]) -> None:
        if not math.isfinite(found[self.measure]):
            after = f"diverged: not finite after {self.steps} steps"
            raise GipipError(
                f"The {self.prior.kind}'s training {after}. Use a smaller learning_rate."
            )
        self.waited += 1
        if found[self.measure] < min(self.history[self.measure], default=math.inf):
            self._best, self.waited = copy.deepcopy(self.network.state_dict()), 0
        for name, value in {"step": self.steps, **found}.items():
            self.history.setdefault(name, []).append(value)


def trained(
    training: type[Training[P]],
    auxiliary: LabeledImages,
    store: Path | str | None,
    *,
    given: Sequence[Any] = (),
    **settings: Any,
) -> P:
    """The prior of a training of these settings on these images, with its provenance.
    Inside, torch's global generator, from which first weights come, starts at the seed.

    With a `store` (a folder) a finished one is loaded instead of trained again.
    `given`: what the training needs besides, and the settings identify.
    """
    about = {"data": auxiliary.fingerprint, "images": len(auxiliary), "settings": settings}
    name = fingerprint({}, canonical_json(about))[:24]
    path = Path(store) / "priors" / f"{name}.safetensors" if store else None
    if path and (kept := read_kept(path, training.prior.load)):
        return kept
    require_time()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings["seed"])  # and not a GPU's, which is not used
        course = training(auxiliary, settings, *given)  # type: ignore[arg-type]  # as subclasses do
        prior = course.run(settings["steps"])
    prior.provenance = about | {"history": course.history}
    if course.interrupted:
        prior.provenance["interrupted"] = True
    elif path:
        prior.save(path)
    return prior
