"""How notebooks show what they find: tables, pictures, charts, verdicts and checks.

sweep, save = start(store, figures, workers)
captioned(results.table())
save("02_images", pictures({arm: results.select(arm=arm) for arm in ("IG", "GIPIP")}))
save("02_effect", forest(claims, "psnr"))
verdicts("02_inversion", claims, figures)
found("02_inversion_claims")
"""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from gipip.evaluation.anomalies import auroc
from gipip.evaluation.metrics import evaluate
from gipip.evaluation.published import published
from gipip.evaluation.statistics import Interval
from gipip.experiments.claims import Claim, save_claims
from gipip.experiments.results import Results
from gipip.experiments.sweep import sweep
from gipip.figures import image_grid, paired_effect, published_bars, save_figure, use_style
from gipip.priors.autoencoder import AnomalyScore

Images = Float[Tensor, "batch 3 height width"]

FIGURES = Path(__file__).parents[2] / "figures"
"""Figures and tables of the full run, in a checkout; a wheel has none."""

AXES = {
    "noise": "additive noise σ",
    "sparsity": "sparsity (share of entries set to 0)",
    "epochs": "epochs of training of the client's model",
}
"""Labels of the paper's charts whose names alone do not say enough."""


def start(store: Path | str, figures: Path | str, workers: int) -> tuple[Callable, Callable]:
    """`sweep` and `save_figure` with a notebook's settings; sets the style of figures, and
    lets tables show long texts whole.
    """
    use_style()
    pandas.options.display.max_colwidth = None
    return partial(sweep, store=store, workers=workers), partial(save_figure, folder=figures)


class Frames:
    """Keeps the candidates of an attack under way, as `images`: {iteration: images}. Pass
    it as `watch`.
    """

    def __init__(self) -> None:
        self.images: dict[int, Images] = {}

    def __call__(self, iteration: int, images: Images, cost: float) -> None:
        self.images[iteration] = images


def labelled(column: str, named: Mapping[Any, Results]) -> pandas.DataFrame:
    """The frames of named results, one below the other, with the name in a `column`."""
    frames = []
    for name, results in named.items():
        frames.append(results.frame())
        frames[-1][column] = name
    return pandas.concat(frames, ignore_index=True)


def captioned(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table without those of its columns that say the same in every row: these are
    printed above it. One of a single row stays whole.
    """
    same = [name for name in frame if len(frame) > 1 and frame[name].nunique(dropna=False) == 1]
    for name in same:
        print(f"{name}: {frame[name].iloc[0]}")
    return frame.drop(columns=same)


def pictures(named: Mapping[str, Results], columns: int = 8, **options) -> Figure:
    """The private images and, in a row each, what was recovered of them, with its PSNR:
    the first `columns` images that all rows have. `options`: of `image_grid`.
    """
    columns = min(columns, *(len(results.truth) for results in named.values()))
    rows = {"private": next(iter(named.values())).truth[:columns]}
    captions = {}
    for name, results in named.items():
        rows[name] = results.images[:columns]
        captions[name] = [f"{psnr:.1f} dB" for psnr in results.frame()["psnr"][:columns]]
    return image_grid(rows, captions, **options)


def beside_published(chart: str, named: Mapping[Any, Results], here: str) -> Figure:
    """One of the paper's charts of SSIM (see `published`) beside that of the arms
    "without" and "with" here, of results named by their places on its axis.
    """
    frame = labelled(chart, named).rename(columns={"arm": "anomaly score"})
    frame = frame[frame["anomaly score"].isin(["without", "with"])]
    titles = ("published: ImageNet 64×64, ResNet18", f"here: {here}, equal λTV")
    drawn = (chart, "ssim", "anomaly score")
    label = AXES.get(chart)
    return published_bars(frame, published(chart), *drawn, titles=titles, xlabel=label)


def forest(claims: Iterable[Claim], metric: str) -> Figure:
    """A forest plot of the differences that judge the claims by one metric. The words
    with which all of them begin are in the axis label.
    """
    drawn = {claim.compared: claim.difference for claim in claims if claim.metric == metric}
    shared = os.path.commonprefix(list(drawn)).rpartition(", ")[0]
    named = {compared.removeprefix(f"{shared}, "): effect for compared, effect in drawn.items()}
    unit, decimals = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3)}[metric]
    return paired_effect(named, ": ".join(filter(None, [unit, shared])), decimals=decimals)


def verdicts(notebook: str, claims: Sequence[Claim], figures: Path | str) -> pandas.DataFrame:
    """The claims' table, written to `figures` (see `save_claims`)."""
    return _rounded(save_claims(notebook, claims, figures))


def found(name: str) -> pandas.DataFrame | None:
    """What the full run found: the table figures/`name`.csv that ships with the
    notebooks, such as "02_inversion_claims"; of claims the differences and verdicts.

    Where there is no such file, as in an installed package, it says so and gives None.
    """
    path = FIGURES / f"{name}.csv"
    if path.is_file():
        return _rounded(pandas.read_csv(path))
    print(f"The full run's figures/{name}.csv is in the repository, not in a package.")
    return None


def _rounded(table: pandas.DataFrame) -> pandas.DataFrame:
    if "verdict" in table:
        ends = table[["mean", "low", "high", "batches"]].to_numpy().tolist()
        table = table.assign(mean=[f"{Interval(*row):+.3f}" for row in ends])
        table = table.drop(columns=["low", "high"]).rename(columns={"mean": "difference"})
    return captioned(table.round(3))


def aurocs(
    priors: Mapping[str, AnomalyScore], natural: Images, spoiled: Mapping[str, Images]
) -> pandas.DataFrame:
    """How well each prior tells each kind of spoiled images from natural ones: a row
    for each pair, with the columns prior, anomaly, images and AUROC.
    """
    rows = []
    for (name, prior), (kind, images) in itertools.product(priors.items(), spoiled.items()):
        area = auroc(prior(natural), prior(images))
        rows.append({"prior": name, "anomaly": kind, "images": len(images), "AUROC": area})
    return pandas.DataFrame(rows)


def flat_psnr(images: Images) -> float:
    """Mean PSNR of the best constant picture of each image: what knows only its mean colour."""
    flat = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    return float(evaluate(flat, images)["psnr"].mean())


def check(claim: str, holds: bool) -> None:
    """Print a claim that holds; AssertionError, with the claim, for one that does not."""
    if not holds:
        raise AssertionError(f"Not so: {claim}.")
    print(claim)
