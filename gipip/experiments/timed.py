"""Attacks on one's own updates within a given time: planned by what an iteration takes
here, and kept piece by piece, so that the same work goes on where it was.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gipip.attacks.base import Attack
from gipip.attacks.checkpoints import Checkpoint
from gipip.attacks.feature_inversion import FeatureInversion
from gipip.attacks.features import recovered
from gipip.attacks.gipip import GIPIP
from gipip.attacks.inverting_gradients import InvertingGradients
from gipip.attacks.labels import infer_labels
from gipip.data.datasets import LabeledImages
from gipip.errors import DataError, GipipError, OutOfTime
from gipip.experiments.version import code_version
from gipip.federation.client import SharedUpdate
from gipip.federation.models import (
    ClientModel,
    Images,
    in_mode,
    last_linear,
    model_fingerprint,
    prepared,
)
from gipip.files import canonical_json, fingerprint, read_kept, read_tensors, write_tensors
from gipip.priors.autoencoder import AnomalyScore, load_prior
from gipip.priors.decoder import train_decoder
from gipip.progress import progress, quiet, require_time

_EXACT = 0.01  # relative error of an image's features
_MOST_ITERATIONS, _ENOUGH_ITERATIONS = 300, 100
_TUNED_SIZES = (1, 4, 8)  # of batches, for which weights ship
_LARGEST = 3 * 96 * 96  # numbers in an image that a decoder gives


@dataclass(frozen=True, eq=False)
class Case:
    """One update: of which condition and batch, and what the batch held, if that is known."""

    condition: str
    batch: int
    share: Callable[[], SharedUpdate]  # made when it is needed: a large model's fill the memory
    truth: LabeledImages | None

    @cached_property
    def fingerprint(self) -> str:
        update = self.share()
        tensors = dict(zip(update.parameter_names, update.gradients, strict=True))
        if update.labels is not None:
            tensors["labels"] = update.labels
        about = [update.mode, str(update.fedavg), update.batch_size, update.model_fingerprint]
        return fingerprint(tensors, canonical_json(about))


@dataclass(frozen=True, eq=False)
class Result:
    """What an attack, an *arm*, made of a case."""

    case: Case
    arm: str
    images: Images
    about: dict[str, Any]


@dataclass(eq=False)
class Work:
    """All that takes time: planned, done while there is time, kept in a folder piece by piece.

    `obstacles`: by condition and arm, why an attack gave nothing. `left`: how many the
    time was too short for.
    """

    model: ClientModel
    cases: list[Case]
    folder: Path
    minutes: float
    seeds: int
    ends: float
    auxiliary: LabeledImages

    def __post_init__(self) -> None:
        self.update = self.cases[0].share()
        self.shape, self.size = self.update.image_shape, self.update.batch_size
        self.obstacles: dict[tuple[str, str], str] = {}
        self.left = 0

    def kept(self, kind: str, about: Sequence[Any], compute: Callable[[], tuple]) -> tuple:
        """Tensors and JSON that a file holds, or that are computed instead, and then kept there."""
        path = self.folder / kind / f"{_key(*about)}.safetensors"
        kept = read_kept(path, read_tensors)
        return kept or read_tensors(write_tensors(path, *compute()))

    # Who attacks ----------------------------------------------------------------------

    @cached_property
    def score(self) -> AnomalyScore | None:
        """The shipped one for images of about this size."""
        score = load_prior("cifar10" if max(self.shape[-2:]) <= 48 else "imagenet64")
        return None if score.network.misfit(self.shape) else score.with_offset(0)

    def features(self) -> FeatureInversion:
        """With a decoder, in closed form. GipipError if there can be none."""
        if self.shape[0] != 3 or math.prod(self.shape) > _LARGEST:
            raise DataError(
                "A decoder of features is for images with colour, and would fill the memory for "
                "more than 96 × 96 pixels."
            )
        auxiliary = self.auxiliary[: self.plan["auxiliary"]]
        options: dict[str, Any] = {"mode": self.update.mode, "store": self.folder}
        decoder = train_decoder(self.model, auxiliary, copies=2, steps=0, **options)
        return FeatureInversion(prior=decoder, score=self.score, iterations=0)

    def matching(self, **settings) -> InvertingGradients:
        """Gradient matching, with the weights tuned for CIFAR-10 and the nearest batch size."""
        nearest = max(size for size in _TUNED_SIZES if size <= self.size)
        condition = f"cifar10/convnet/B={nearest}"
        if self.score is None:
            return InvertingGradients.tuned(condition, **settings)
        return GIPIP.tuned(condition, prior=self.score, **settings)

    def attacks(self) -> dict[str, Attack]:
        """By the names of their arms, the cheapest first."""
        iterations = self.plan["iterations"]
        found: dict[str, Attack] = {}
        try:
            features = self.features()
            found["features, decoded"] = features
            fewer = {"iterations": math.ceil(iterations / 3)}  # as its start is near
            found["features, refined"] = features.model_copy(update=fewer)
        except GipipError as error:
            self.obstacles |= {(case.condition, "features"): str(error) for case in self.cases}
        name = "GI-PIP" if self.score else "Inverting Gradients"
        attack = self.matching(iterations=iterations, restarts=self.plan["restarts"])
        smoother = {"tv_weight": 10 * attack.tv_weight}  # as trained and defended clients need
        return found | {name: attack, f"{name}, smoother": attack.model_copy(update=smoother)}

    # When -----------------------------------------------------------------------------

    @cached_property
    def plan(self) -> dict[str, int]:
        """How many auxiliary images a decoder gets, and how many iterations and
        restarts an attack, so that all fits into the time. Kept, so that the same call
        goes on with the same attacks.
        """
        about = [model_fingerprint(self.model), self.shape, self.size, self.minutes, self.seeds]
        return self.kept("plans", about, lambda: ({}, self.planned(60 * self.minutes)))[1]

    def planned(self, seconds: float) -> dict[str, int]:
        """A tenth of the time is for the decoder, half for iterations: more cannot be foreseen."""
        setup, iteration = self.measured()
        image = iteration / self.size  # and its mirror image: an iteration takes longer
        fit = 1.5e8 / self.auxiliary.pixels[0].numel()  # into the memory
        for restarts in range(self.seeds, 0, -1):
            starts = 2 * restarts  # of two attacks; the features attack takes a third of one
            free = seconds / 2 - setup * len(self.cases) * (starts + 2)
            iterations = int(free / len(self.cases) / (starts + 1 / 3) / iteration)
            if iterations >= _ENOUGH_ITERATIONS:
                break
        iterations = min(max(iterations, 10), _MOST_ITERATIONS)
        auxiliary = max(16, int(min(seconds / 10 / image, fit, len(self.auxiliary))))
        return {"auxiliary": auxiliary, "iterations": iterations, "restarts": restarts}

    def measured(self) -> tuple[float, float]:
        """Seconds until an attack on the first case begins, and of an iteration."""
        clock = [time.perf_counter()]

        def tick(*_) -> None:
            clock.append(time.perf_counter())

        with quiet():
            self.matching(iterations=3)(self.model, self.update, watch=tick, watch_every=1)
        return clock[1] - clock[0], median(later - sooner for sooner, later in pairwise(clock[1:]))

    # How ------------------------------------------------------------------------------

    def results(self) -> list[Result]:
        """Of every attack on every case, as far as the time allows. GipipError for none."""
        todo = [(case, *named) for named in self.attacks().items() for case in self.cases]
        found: list[Result] = []
        for case, arm, attack in progress(todo, description="attacks", unit="attack"):
            try:
                with quiet():
                    found.append(self.result(case, arm, attack))
            except OutOfTime:
                self.left += 1
                self.obstacles[case.condition, arm] = "The time was over. The same call goes on."
            except GipipError as error:
                self.obstacles[case.condition, arm] = str(error)
        if not found:
            reasons = "; ".join(dict.fromkeys(self.obstacles.values()))
            raise GipipError(f"No attack gave anything: {reasons}")
        return found

    def result(self, case: Case, arm: str, attack: Attack) -> Result:
        """Kept from an earlier call, or computed. OutOfTime when it is not finished."""
        settings = attack.model_dump(mode="json")
        about = [case.fingerprint, settings, code_version(type(attack))]
        checkpoint = Checkpoint(self.folder / "unfinished" / _key(*about), self.ends)

        def compute() -> tuple:
            if attack.iterations:
                require_time(self.ends)
            found = attack(self.model, case.share(), checkpoint=checkpoint)
            if found.interrupted:  # half a result must not be kept as a whole one
                raise KeyboardInterrupt
            names = ("assumptions", "seconds", "engine", "notes")
            return {"images": found.images}, {name: getattr(found, name) for name in names}

        tensors, details = self.kept("attacks", about, compute)
        checkpoint.remove()
        return Result(case, arm, tensors["images"], details | {"settings": settings})

    def accuracy(self, name: str, train: Callable[[], float]) -> float:
        about = [model_fingerprint(self.model), name]
        _, kept = self.kept("accuracies", about, lambda: ({}, {"accuracy": float(train())}))
        return kept["accuracy"]

    # What needs no iterations ---------------------------------------------------------

    def exact(self, case: Case) -> dict[str, Any]:
        """Of how many images labels and features are found, and what stands against it."""
        update = case.share()
        counts: dict[str, Any] = {"images": update.batch_size}
        try:
            inferred = infer_labels(self.model, replace(update, labels=None)).cpu()
            if case.truth:
                found, own = Counter(inferred.tolist()), Counter(case.truth.labels.tolist())
                counts["labels"] = (found & own).total()  # in whichever order
        except GipipError as error:
            counts["no labels"] = str(error)
        try:
            solved = recovered(self.model, update)
        except GipipError as error:
            return counts | {"no features": str(error)}
        counts["claimed"] = int((solved.errors < _EXACT).sum())
        if case.truth:
            counts["confirmed"] = self.confirmed(case.truth, solved.features)
        return counts

    @torch.no_grad()
    def confirmed(self, truth: LabeledImages, features: Tensor) -> int:
        """Of how many images the features are among those recovered."""
        model = in_mode(self.model, self.update.mode)
        true = last_linear(model.network, prepared(model, truth)[0])[1].cpu().double()
        right = torch.cdist(features, true) < _EXACT * true.norm(dim=1)
        return int(right.any(dim=0).sum())


def _key(*about: Any) -> str:
    return fingerprint({}, canonical_json(about))[:32]
