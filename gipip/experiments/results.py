"""The results of a sweep: selected, compared, and as tables."""

from collections.abc import Iterable, Mapping, Sequence

import pandas
import torch
from jaxtyping import Float
from torch import Tensor

from gipip.errors import DataError
from gipip.evaluation.statistics import Interval, bootstrap_interval, paired_difference
from gipip.experiments.store import Result

METRICS = ("psnr", "ssim", "ssim_padded", "lpips", "identified")
ASSUMPTIONS = (
    *("iterations", "labels", "BatchNorm", "local training", "defence", "auxiliary data"),
    "machine",
)
"""Columns of a frame that say how an arm was run, and what it assumes."""


class Results(Sequence):
    """The results of a sweep, in the order of its runs."""

    def __init__(self, results: Iterable[Result]):
        self._results = list(results)

    def __len__(self) -> int:
        return len(self._results)

    def __getitem__(self, index):
        return Results(self._results[index]) if isinstance(index, slice) else self._results[index]

    def select(self, **wanted) -> "Results":
        """Those whose arm or scenario has the given values, as `select(arm="GIPIP", batch_size=4)`.

        Of a scenario any field, and its `condition`.
        """
        return Results(result for result in self if _fits(result, wanted))

    @property
    def images(self) -> Float[Tensor, "batch 3 height width"]:
        """All reconstructions, in [0, 1]."""
        return torch.cat([result.images for result in self])

    @property
    def truth(self) -> Float[Tensor, "batch 3 height width"]:
        """The private images, in the same order."""
        return torch.cat([result.truth for result in self])

    def frame(self) -> pandas.DataFrame:
        """One row an image: arm, scenario, metrics and assumptions. Raises DataError
        when there are no results.
        """
        if not self:
            advice = "Look at what was selected, or at the list of runs."
            raise DataError(f"There are no results to make a table of. {advice}")
        return pandas.concat([result.frame() for result in self], ignore_index=True)

    def effect(self, arm: str, baseline: str, metric: str = "psnr", **where) -> Interval:
        """Mean of one arm − another in `metric` over the private images that both
        attacked, with its 95 % bootstrap interval over batches.

        `where`: as for `select`, such as batch_size=4. Raises DataError when the arms
        share no image, or one of them attacked an image twice.
        """
        image = ["model_seed", "batch", "image"]
        a, b = ({"arm": name, **where} for name in (arm, baseline))
        parts = [self.select(**wanted) for wanted in (a, b)]
        if not all(parts):
            raise DataError(f"There is nothing to compare: no results of {a} or of {b}.")
        frames = [results.frame()[[*image, metric]] for results in parts]
        if any(frame.duplicated(image).any() for frame in frames):
            advice = "Name a scenario's field too, e.g. mode='eval'."
            raise DataError(f"{a} or {b} has several results for one image. {advice}")
        pairs = frames[0].merge(frames[1], on=image, suffixes=("", "_baseline"))
        if pairs.empty:
            raise DataError(f"{a} and {b} share no image. Give both the same batches.")
        return paired_difference(pairs[metric], pairs[f"{metric}_baseline"], groups=pairs["batch"])


def _fits(result: Result, wanted: Mapping) -> bool:
    for name, value in wanted.items():
        found = result.run.arm if name == "arm" else getattr(result.run.scenario, name)
        if found != value:
            return False
    return True


def quality_table(frame: pandas.DataFrame, metrics: Sequence[str] = METRICS) -> pandas.DataFrame:
    """A row for each model, batch size, arm and set of assumptions of a frame of
    results: means with 95 % bootstrap intervals over batches.

    Without those of the metrics that were not measured on every image of the row. Beside
    `identified`, a share, stand the `candidates`: by chance it is 1 in so many.
    """
    rows = []
    keys = ["model", "epochs", "batch_size", "arm", *ASSUMPTIONS]
    for (model, epochs, size, arm, *about), part in frame.groupby(keys, sort=False):
        row = {"model": f"{model}@{epochs}" if epochs else model, "batch size": size}
        row |= {"attack": str(arm).replace("\n", " "), "images": len(part)}
        for name in metrics:
            if name in part and part[name].notna().all():
                row[name] = f"{bootstrap_interval(part[name], groups=part['batch']):.3f}"
        if "identified" in row:
            row["candidates"] = int(part["candidates"].max())
        rows.append(row | dict(zip(ASSUMPTIONS, about, strict=True)))
    return pandas.DataFrame(rows)
