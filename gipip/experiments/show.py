"""How notebooks show what they find: tables, pictures, charts, claims and checks.

sweep, save = start(store, figures, workers, from_scratch)
frame = with_references(results)
quality(frame)
save("02_images", pictures({arm: results.select(arm=arm) for arm in ("IG", "GIPIP")}))
save("02_quality", dots(frame, "batch size", "psnr"))
save("02_effect", forest(comparisons, "psnr"))
findings("02_inversion", [endpoint], comparisons, figures)
found("02_inversion_comparisons")
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas
import seaborn
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from gipip.evaluation.anomalies import auroc
from gipip.evaluation.metrics import evaluate
from gipip.evaluation.published import published
from gipip.evaluation.references import REFERENCES, at_psnr, mean_image, references
from gipip.evaluation.statistics import Interval
from gipip.experiments.claims import Comparison, save_findings
from gipip.experiments.endpoints import Endpoint
from gipip.experiments.results import ASSUMPTIONS, Results, quality_table
from gipip.experiments.scenario import Scenario
from gipip.experiments.shipped import ShippedResults
from gipip.experiments.sweep import sweep
from gipip.federation.models import Images
from gipip.figures import PAGE, image_grid, interval_dots, paired_effect, save_figure, use_style
from gipip.priors.autoencoder import AnomalyScore
from gipip.priors.gan import GenerativePrior

NOTHING = "–"
"""In tables, where a column does not apply."""

NAMES = {
    "psnr": "PSNR (dB)",
    "ssim": "SSIM",
    "ssim_padded": "SSIM, padded",
    "lpips": "LPIPS",
    "compared": "comparison",
    "count": "batches",
}
"""What tables call the columns of frames and files."""

FIGURES = Path(__file__).parents[2] / "figures"
"""Figures and tables of the full run, in a checkout; a wheel has none."""

AXES = {
    "noise": "additive noise σ",
    "sparsity": "sparsity (share of entries set to 0)",
    "epochs": "epochs of training of the client's model",
}
"""Labels of the paper's charts whose names alone do not say enough."""


def start(
    store: Path | str, figures: Path | str, workers: int, from_scratch: bool = False
) -> tuple[Callable, Callable]:
    """`sweep` and `save_figure` with a notebook's settings; makes the folder of
    figures, sets their style, and lets tables show long texts whole. Results that ship
    are loaded, unless `from_scratch`.
    """
    Path(figures).mkdir(parents=True, exist_ok=True)
    use_style()
    pandas.options.display.max_colwidth = None
    shipped = None if from_scratch else ShippedResults()
    swept = partial(sweep, store=store, workers=workers, shipped=shipped)
    return swept, partial(save_figure, folder=figures)


class Frames:
    """Keeps the candidates of an attack under way, as `images`: {iteration: images}.
    Pass it as `watch`.
    """

    def __init__(self) -> None:
        self.images: dict[int, Images] = {}

    def __call__(self, iteration: int, images: Images, cost: float) -> None:
        self.images[iteration] = images


def labelled(column: str, named: Mapping[Any, Results]) -> pandas.DataFrame:
    """The frames of named results with references, one below the other, with the name
    in a `column`.
    """
    frames = []
    for name, results in named.items():
        frames.append(with_references(results))
        frames[-1][column] = name
    return pandas.concat(frames, ignore_index=True)


def with_references(results: Results) -> pandas.DataFrame:
    """The frame of results and, as further arms, what pictures reach on the same
    private images that need no attack: see `gipip.evaluation.references`, which names
    them.
    """
    frames = [results.frame()]
    for result in {result.run.scenario: result for result in results}.values():
        drawn = Scenario(**result.run.scenario.model_dump(include=_DRAWN))
        frame = result.frame().assign(**dict.fromkeys(ASSUMPTIONS, NOTHING))
        for _, measured in _quality_of_references(drawn).groupby("arm", sort=False):
            frames.append(frame.assign(**measured))
    return pandas.concat(frames, ignore_index=True)


_DRAWN = {"dataset", "pool", "classes", "batch_size", "seed", "distinct_labels"}
"""The fields of a scenario that say which images it draws."""


@cache
def _quality_of_references(drawn: Scenario) -> pandas.DataFrame:
    """A row for each reference (its name as `arm`) and image that a scenario draws."""
    truth, pool, frames = drawn.batch().images, drawn.candidates(), []
    for name, images in references(truth, mean_image(drawn.dataset)).items():
        frames.append(evaluate(images, truth, pool=pool).assign(arm=name))
    return pandas.concat(frames)


def quality(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The `quality_table` of a frame; what is the same in all rows is printed above it."""
    return captioned(quality_table(frame))


def captioned(frame: pandas.DataFrame) -> pandas.DataFrame:
    """The table for readers, with `NAMES`. What its columns say in every row that says
    anything is printed above it instead, and once that single batches have no interval.
    A table of one row keeps its columns.
    """
    frame = frame.where(frame.notna(), NOTHING)
    plain = frame.replace(r" \(no interval\)$", "", regex=True)
    if not plain.equals(frame):
        print("without an interval: means over a single batch")
    said = plain.where(plain != NOTHING)
    names = map(str, plain)
    same = [name for name in names if len(plain) > 1 and said[name].nunique() == 1]
    for name in same:
        print(f"{NAMES.get(name, name)}: {said[name].dropna().iloc[0]}")
    return plain.drop(columns=same).rename(columns=NAMES)


def dots(frame: pandas.DataFrame, x: str, metric: str, arm: str = "arm", **options) -> Figure:
    """`interval_dots` of the arms of a frame, over column `x`; what the references
    among them reach becomes lines. `options`: further ones of `interval_dots`.
    """
    is_reference = frame[arm].isin(REFERENCES)
    levels = frame[is_reference].groupby(arm, sort=False)[metric].mean().to_dict()
    return interval_dots(frame[~is_reference], x, metric, arm, references=levels, **options)


def pictures(named: Mapping[str, Results], columns: int = 8, **options) -> Figure:
    """The private images beside what was recovered of them, with its PSNR: the first
    `columns` images that all have. A row each; where images are fewer than rows, and
    these at most eight, a column each. `options`: of `image_grid`.
    """
    columns = min(columns, *(len(results.truth) for results in named.values()))
    shown = {"private": next(iter(named.values())).truth[:columns]}
    captions = {"private": [""] * columns}
    for name, results in named.items():
        shown[name] = results.images[:columns]
        captions[name] = [f"{psnr:.1f} dB" for psnr in results.frame()["psnr"][:columns]]
    if not columns < len(shown) <= 8:
        return image_grid(shown, captions, **options)
    numbers = [f"image {number}" for number in range(1, columns + 1)]
    rows = dict(zip(numbers, torch.stack([*shown.values()], dim=1), strict=True))
    across = dict(zip(numbers, zip(*captions.values(), strict=True), strict=True))
    return image_grid(rows, across, [*shown], **options)


def pulls(shares: pandas.DataFrame) -> Figure:
    """How hard each term pulls over the course of an attack: a panel for each batch
    size of `arms.released_shares`.
    """
    style = {"kind": "line", "height": 2.2, "facet_kws": {"sharex": False}}
    grid = seaborn.relplot(shares, x="iteration", y="share", hue="term", col="batch", **style)
    grid.set(yscale="log").set_titles("{col_name}").set_ylabels(
        "pull, relative to\ngradient matching"
    )
    return grid.figure


def samples(generators: Mapping[str, GenerativePrior]) -> Figure:
    """Random images of each generator, and the kernel distance that it was chosen by."""
    rows = {}
    for name, generator in generators.items():
        distance = min(generator.provenance["history"]["kernel distance"])
        rows[f"{name}\ndistance {distance:.2f}"] = generator.sample(8)
    return image_grid(rows)


def decibels(image: Float[Tensor, "1 3 height width"]) -> Figure:
    """What a PSNR looks like: the image made worse in three ways until it has 10 to 25 dB."""
    levels, rows = (10, 13, 16, 19, 22, 25), {}
    for kind in ("blurred", "noisy", "blocky"):
        rows[kind] = torch.cat([at_psnr(image, level, kind) for level in levels])
    return image_grid(rows, titles=[f"{level} dB" for level in levels], width=5)


def beside_published(chart: str, named: Mapping[Any, Results], here: str) -> Figure:
    """One of the paper's charts of SSIM (see `published`) beside that of the arms
    "without" and "with" here, of results named by their places on its axis.
    """
    measured = labelled(chart, named).rename(columns={"arm": "anomaly score"})
    wanted = ["without", "with", *REFERENCES]
    measured = measured[measured["anomaly score"].isin(wanted)]
    known = "" if chart == "batch size" else ", B not stated"
    panels = {
        f"published: ImageNet 64×64,\nResNet18{known}": published(chart),
        f"here, equal λTV:\n{here}": measured,
    }
    frame = pandas.concat(panels, names=["setting"]).reset_index("setting")
    options = {"panel": "setting", "xlabel": AXES.get(chart), "width": PAGE}
    return dots(frame, chart, "ssim", "anomaly score", **options)


def forest(comparisons: Iterable[Comparison], metric: str) -> Figure:
    """A forest plot of the comparisons by one metric. The words with which all of them
    begin are in the axis label.
    """
    drawn = {each.compared: each.difference for each in comparisons if each.metric == metric}
    shared = os.path.commonprefix(list(drawn)).rpartition(", ")[0]
    named = {compared.removeprefix(f"{shared}, "): effect for compared, effect in drawn.items()}
    unit, decimals = {"psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3)}[metric]
    return paired_effect(named, ": ".join(filter(None, [unit, shared])), decimals=decimals)


def findings(
    notebook: str,
    endpoints: Sequence[Endpoint],
    comparisons: Sequence[Comparison],
    figures: Path | str,
) -> pandas.DataFrame:
    """What the notebook found, written to `figures` (see `save_findings`): the comparisons."""
    return _differences(save_findings(notebook, endpoints, comparisons, figures)["comparisons"])


def found(name: str) -> pandas.DataFrame | None:
    """What the full run found: the table figures/`name`.csv that ships with the
    notebooks, such as "02_inversion_comparisons".

    Where there is no such file, as in an installed package, it says so and gives None.
    """
    path = FIGURES / f"{name}.csv"
    if not path.is_file():
        print(f"The full run's figures/{name}.csv is in the repository, not in a package.")
        return None
    table = pandas.read_csv(path)
    return _differences(table) if "compared" in table else captioned(table.round(3))


def _differences(comparisons: pandas.DataFrame) -> pandas.DataFrame:
    """A row for each comparison, with a column for each metric."""
    ends = zip(comparisons["mean"], comparisons["low"], comparisons["high"], strict=True)
    table = comparisons.assign(difference=[f"{Interval(*each, count=0):+.3f}" for each in ends])
    keys = ["claim", "compared", "images", "count"]
    table = table.pivot_table("difference", keys, "metric", aggfunc="first", sort=False)
    return captioned(table.rename_axis(columns=None).reset_index())


def aurocs(
    priors: Mapping[str, AnomalyScore], natural: Images, spoiled: Mapping[str, Images]
) -> pandas.DataFrame:
    """How well each prior tells each kind of spoiled images from natural ones, as
    AUROC: a row for each `anomaly`, with the number of its `images`, and a column for
    each prior.
    """
    rows = []
    for kind, images in spoiled.items():
        areas = {name: auroc(prior(natural), prior(images)) for name, prior in priors.items()}
        rows.append({"anomaly": kind, "images": len(images)} | areas)
    return pandas.DataFrame(rows)


def check(claim: str, holds: bool) -> None:
    """Print a claim that holds; AssertionError, with the claim, for one that does not."""
    if not holds:
        raise AssertionError(f"Not so: {claim}.")
    print(claim)
