"""The figures of gipip in one style, and their files: picture (PNG), vector (PDF) and
the numbers drawn (CSV).
"""

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation
from torch import Tensor
from torchvision.utils import make_grid

from gipip.evaluation.statistics import Interval, bootstrap_interval

COLUMN, PAGE = 3.5, 7.2
"""Widths of a figure in a column and across a page, in inches."""

LABELS = {
    "psnr": "PSNR (dB), higher is better",
    "ssim": "SSIM, higher is better",
    "ssim_padded": "SSIM with zeros around the image, higher is better",
    "lpips": "LPIPS, lower is better",
    "identified": "share identified",
    "feature_mse": "feature MSE, lower is better",
}
"""Axis labels of the metrics; any other column is labelled with its name."""

Scale = Literal["category", "log"]

_GAP = 2  # pixels between images
_MARKERS = "osD^vPX"


# Style and files ------------------------------------------------------------------


def use_style() -> None:
    """Set the one style of all figures for this session: colour-blind-safe palette, 8 to
    9 point type, light grid.
    """
    rc = {
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.2,
        "lines.markersize": 4,
        "errorbar.capsize": 2,
        "legend.frameon": False,
        "figure.dpi": 110,
        "savefig.dpi": 200,
        "savefig.bbox": "tight",  # no label is cut off
        "savefig.pad_inches": 0.04,
        "pdf.fonttype": 42,  # TrueType: text stays text
    }
    seaborn.set_theme("paper", "whitegrid", "colorblind", font_scale=0.92, rc=rc)


class FigureFiles(NamedTuple):
    """Where a figure was saved."""

    png: Path
    pdf: Path
    csv: Path

    def __repr__(self) -> str:
        return f"{self.png}, .pdf and .csv"


def save_figure(
    name: str,
    figure: Figure | None = None,
    data: pd.DataFrame | None = None,
    folder: Path | str = "figures",
) -> FigureFiles:
    """Write `name`.png, `name`.pdf and `name`.csv to `folder`, each whole or not at all;
    equal figures give equal bytes.

    `figure`: by default the current one. `data`: the numbers drawn, by default those
    that a function of this module attached to its figure; for a picture grid pass the
    metrics. Raises ValueError without numbers, OSError when the folder cannot be
    written.
    """
    figure = figure or plt.gcf()
    data = getattr(figure, "data_drawn", None) if data is None else data
    if data is None:
        raise ValueError(f"The figure {name!r} has no numbers: pass a DataFrame of them as `data`.")
    files = FigureFiles(*(Path(folder) / f"{name}.{ending}" for ending in FigureFiles._fields))
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.", suffix=".tmp") as drafts:
            png, pdf, csv = (Path(drafts) / file.name for file in files)
            figure.savefig(png, metadata={"Software": None})
            figure.savefig(pdf, metadata={"CreationDate": None})
            data.to_csv(csv, index=False, float_format="%.6g", lineterminator="\n")
            for draft, file in zip((png, pdf, csv), files, strict=True):
                os.replace(draft, file)
    except OSError as error:
        place = f"{folder} ({error}). Pass a folder that you can write"
        raise OSError(f"The figure {name!r} cannot be written to {place}.") from error
    return files


# Pictures -------------------------------------------------------------------------


def image_grid(
    rows: Mapping[str, Float[Tensor, "columns 3 height width"]],
    captions: Mapping[str, Sequence[str]] | None = None,
    titles: Sequence[str] = (),
    width: float = PAGE,
) -> Figure:
    """Images in [0, 1] in labelled rows of equally many, every pixel shown as it is.

    `captions`: for any of the rows a text under each of its images, such as "18.9 dB".
    `titles`: a text over each column. `width` in inches; an image is at most an inch
    wide. Raises ValueError for rows of different length.
    """
    lengths = [len(images) for images in rows.values()]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(f"The rows have {lengths} images: expected equally many in each.")
    captions = {row: (captions or {}).get(row, [""] * lengths[0]) for row in rows}
    margin = 0.15 + 0.075 * max(len(line) for row in rows for line in row.split("\n"))
    side = min(1.0, (width - margin) / lengths[0])
    texts = bool(titles) + sum(any(captions[row]) for row in rows)
    size = (margin + side * lengths[0], side * len(rows) + 0.2 * texts)
    figure, panels = plt.subplots(len(rows), squeeze=False, figsize=size, layout="compressed")
    for axes, (row, images) in zip(panels[:, 0], rows.items(), strict=True):
        _show(axes, row, images, captions[row])
    titles = titles or [""] * lengths[0]
    for place, title in zip(panels[0, 0].get_xticks(), titles, strict=True):
        panels[0, 0].text(place, -1, title, ha="center", va="bottom", fontsize=8)
    table = pd.DataFrame(captions).melt(var_name="row", value_name="caption", ignore_index=False)
    table.insert(1, "column", table.index)
    return _with_numbers(figure, table)


def _show(
    axes: Axes, row: str, images: Float[Tensor, "columns 3 height width"], captions: Sequence[str]
) -> None:
    """One row of images, its name at the left and a caption under each."""
    joined = make_grid(images.detach().cpu(), len(images), padding=_GAP, pad_value=1)
    axes.imshow(joined.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    middle_y, middle_x = ((pixels - 1) / 2 for pixels in joined.shape[1:])
    columns = np.arange(len(images)) - (len(images) - 1) / 2
    axes.set_xticks(middle_x + columns * (images.shape[-1] + _GAP), captions)
    axes.set_yticks([middle_y], [row])
    axes.tick_params(length=0, pad=1)
    axes.tick_params(axis="x", labelsize=7, labelbottom=any(captions))
    axes.grid(visible=False)
    seaborn.despine(ax=axes, left=True, bottom=True)


# Charts ---------------------------------------------------------------------------


def cost_curves(histories: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Each term of the cost in a panel, over the iterations of one or more attacks, on
    logarithmic axes.

    `histories`: for each attack its `Reconstruction.history`.
    """
    curves = [
        pd.DataFrame({"arm": arm, "term": term, "value": values.detach().cpu().numpy()})
        for arm, history in histories.items()
        for term, values in history.items()
    ]
    if not curves:
        raise ValueError("There are no costs to draw: pass the history of at least one attack.")
    table = pd.concat(part.rename_axis("iteration").reset_index() for part in curves)
    colors = _colors(table["arm"])
    figure, panels = _panels(PAGE, 2.4, table["term"].nunique())
    for axes, (term, part) in zip(panels, table.groupby("term", sort=False), strict=True):
        for arm, curve in part.groupby("arm", sort=False):
            axes.plot(curve["iteration"] + 1, curve["value"], label=arm, color=colors[arm])
        scale = "log" if axes.dataLim.y1 > 0 else "linear"  # a term of weight 0 is all 0
        axes.set(title=term, xlabel="evaluation", xscale="log", yscale=scale)
    panels[0].set_ylabel("weighted cost")
    _draw_legend(figure)
    return _with_numbers(figure, table)


def interval_bars(
    frame: pd.DataFrame, x: str, y: str, hue: str, width: float = COLUMN, xlabel: str | None = None
) -> Figure:
    """Bars of the mean of column `y` for each value of `x`, in one colour for each value
    of `hue`, with 95 % bootstrap intervals over independent batches (column `batch`).

    Raises ValueError for missing values.
    """
    table = _intervals(frame, x, y, hue)
    figure, (axes,) = _panels(width, 2.6)
    _draw_bars(axes, table.set_index([x, hue]))
    axes.set_xlabel(x if xlabel is None else xlabel)
    return _explained(figure, table, y)


def interval_lines(
    frame: pd.DataFrame, x: str, y: str, hue: str, width: float = COLUMN, xscale: Scale = "category"
) -> Figure:
    """As `interval_bars`, with a line for each value of `hue`; the lines stand three
    points apart, so that error bars do not hide each other.

    `xscale`: "category" spaces the values of `x` equally; "log" is a logarithmic axis,
    with a tick at each value and a place for 0. Raises ValueError for missing values.
    """
    table = _intervals(frame, x, y, hue)
    figure, (axes,) = _panels(width, 2.6)
    _draw_lines(axes, table.set_index([x, hue]), xscale)
    axes.set_xlabel(x)
    return _explained(figure, table, y)


def published_bars(
    frame: pd.DataFrame,
    published: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    titles: tuple[str, str],
    xlabel: str | None = None,
) -> Figure:
    """A chart of the paper (left) beside that of `frame` (right, as `interval_bars`), on
    one scale; `titles` name the settings.

    `published`: columns `x`, `hue` and `y`, a row for each bar (see
    `gipip.evaluation.published`). Both panels have all values of `x`, ascending if they
    are numbers, with a gap where a panel has no bar.
    """
    here = _intervals(frame, x, y, hue)
    tables = {titles[0]: published[[x, hue, y]].rename(columns={y: "mean"}), titles[1]: here}
    drawn = pd.concat(tables, names=["panel"]).reset_index("panel")
    places = drawn[x].sort_values() if pd.api.types.is_numeric_dtype(drawn[x]) else drawn[x]
    bars = pd.MultiIndex.from_product([places.unique(), drawn[hue].unique()], names=[x, hue])
    notes = ["read from the published chart\nno intervals", _what_is_drawn(here)]
    figure, panels = _panels(PAGE, 2.8, 2, sharey=True)
    for axes, title, note in zip(panels, titles, notes, strict=True):
        part = drawn[drawn["panel"] == title].set_index([x, hue])
        _draw_bars(axes, part.reindex(bars))
        axes.set(xlabel=x if xlabel is None else xlabel, ylabel=LABELS.get(y, y))
        axes.set_title(f"{title}\n{note}", fontsize=8)
    _draw_legend(figure, hue)
    return _with_numbers(figure, drawn)


def tradeoff(frame: pd.DataFrame, x: str, y: str, label: str, hue: str) -> Figure:
    """A numbered point for each row of `frame` at columns `x` and `y`, such as privacy
    and utility; the legend has the text of column `label` beside each number.

    `hue`: the column that gives the colour. Error bars, in either direction, are 95 %
    bootstrap intervals, whose ends are read from the columns "{x}_low", "{x}_high",
    "{y}_low", "{y}_high" where there are any; nan means none. Raises ValueError for
    missing values.
    """
    _require_values(frame, x, y, label, hue)
    colors = _colors(frame[hue])
    figure, (axes,) = _panels(PAGE, 3.4)
    number_style: dict[str, Any] = {"ha": "center", "va": "center_baseline", "zorder": 3}
    for number, row in enumerate(frame.to_dict("records"), start=1):
        style = {"fmt": "o", "markersize": 9, "color": colors[row[hue]]}
        name = f"{number}  {row[label]}"
        axes.errorbar(row[x], row[y], _ends(row, y), _ends(row, x), label=name, **style)
        axes.text(row[x], row[y], str(number), fontsize=6, color="white", **number_style)
    axes.margins(0.1)
    axes.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    columns = [label, hue, x, f"{x}_low", f"{x}_high", y, f"{y}_low", f"{y}_high"]
    table = frame[[name for name in columns if name in frame]]
    if len(table.columns) > 4:
        note = "points: mean; bars: 95 % bootstrap interval over independent batches"
        axes.set_title(note, fontsize=7)
    figure.legend(loc="outside right upper")
    return _with_numbers(figure, table)


def heatmap(frame: pd.DataFrame, rows: str, columns: str, value: str, *, label: str) -> Figure:
    """The mean of column `value` for each pair of values of `rows` and `columns`, as
    numbers on colours; the highest mean is outlined.

    `label` names the value with its unit, beside the colour bar. Pairs without a row
    stay blank. Raises ValueError for missing values.
    """
    _require_values(frame, rows, columns, value)
    table = frame.groupby([rows, columns])[value].agg(["mean", "count"]).reset_index()
    grid = table.pivot(index=rows, columns=columns, values="mean")
    figure, (axes,) = _panels(COLUMN, 0.9 + 0.3 * len(grid))
    style = {"cmap": "cividis", "linewidths": 0.5, "fmt": ".2f", "annot_kws": {"fontsize": 7}}
    texts = grid.rename(index=_text, columns=_text)
    seaborn.heatmap(texts, ax=axes, annot=True, cbar_kws={"label": label}, **style)
    row, column = np.argwhere(grid == np.nanmax(grid))[0]
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, ec="black", lw=2, clip_on=False))
    axes.tick_params(axis="y", rotation=0)
    axes.grid(visible=False)
    axes.set_title("cells: mean; outlined: the highest", fontsize=7)
    return _with_numbers(figure, table)


def paired_effect(effects: Mapping[str, Interval], label: str, decimals: int = 2) -> Figure:
    """A forest plot of paired differences (see `paired_difference`): mean, 95 %
    bootstrap interval, and a line at no difference.

    `label` says what the difference is, with its unit, such as "PSNR gain by the anomaly
    score (dB)". Raises ValueError without effects, or for one that is nan.
    """
    table = pd.DataFrame([{"effect": name} | effects[name]._asdict() for name in effects])
    _require_values(table, "effect", "mean")
    figure, (axes,) = _panels(PAGE, 0.75 + 0.32 * len(effects))
    axes.axvline(0, color="0.3", linewidth=0.8, linestyle="--")
    axes.errorbar(table["mean"], table.index, xerr=_reach(table), fmt="o")
    for row, effect in enumerate(effects.values()):
        text = f"{effect:+.{decimals}f}  n={effect.count}"
        beside = axes.get_yaxis_transform()
        axes.text(1.02, row, text, transform=beside, va="center", fontsize=7)
    axes.set_yticks(table.index, table["effect"])
    axes.set(ylim=(len(effects) - 0.5, -0.5), xlabel=f"{label}\nmean and 95 % bootstrap interval")
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", visible=False)
    return _with_numbers(figure, table)


# What charts share ----------------------------------------------------------------


def _panels(width: float, height: float, count: int = 1, **shared) -> tuple[Figure, list[Axes]]:
    figure = plt.figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **shared)[0])


def _with_numbers(figure: Figure, table: pd.DataFrame) -> Figure:
    figure.data_drawn = table  # type: ignore[attr-defined]  # for save_figure
    return figure


def _intervals(frame: pd.DataFrame, x: str, y: str, hue: str) -> pd.DataFrame:
    """The Interval of `y` for each pair of values of `x` and `hue`, a row each, in the
    order of the frame.
    """
    _require_values(frame, x, y, hue, "batch")
    return pd.DataFrame(
        {x: place, hue: arm} | bootstrap_interval(part[y], groups=part["batch"])._asdict()
        for (place, arm), part in frame.groupby([x, hue], sort=False)
    )


def _draw_bars(axes: Axes, table: pd.DataFrame) -> None:
    """Bars of a table of intervals that is indexed by place and arm, in its order."""
    wide = pd.DataFrame(table.unstack(sort=False))
    errors = np.stack(_reach(wide)).transpose(2, 0, 1)  # arms, 2 ends, places
    wide["mean"].rename(_text).plot.bar(ax=axes, yerr=errors, width=0.8, rot=0, legend=False)
    axes.grid(axis="x", visible=False)


def _draw_lines(axes: Axes, table: pd.DataFrame, xscale: Scale) -> None:
    """A line for each arm of such a table."""
    arms = table.groupby(level=1, sort=False)
    for index, (arm, part) in enumerate(arms):
        part = part.droplevel(1).sort_index()
        places = part.index.map(_text) if xscale == "category" else part.index
        marker = _MARKERS[index % len(_MARKERS)]
        line = axes.errorbar(places, part["mean"], _reach(part), marker=marker, label=arm)
        points = 3 * (index - (len(arms) - 1) / 2)
        aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
        for artist in line.get_children():
            artist.set_transform(axes.transData + aside)
    if xscale != "category":
        places = sorted(table.index.unique(level=0))
        least = min((place for place in places if place > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=least)  # linear next to 0
        axes.set_xticks(places, map(_text, places))
        axes.minorticks_off()


def _colors(arms: pd.Series) -> dict:
    """A colour for each arm, in the order in which they first occur."""
    return dict(zip(arms.unique(), itertools.cycle(seaborn.color_palette()), strict=False))


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reach(table: pd.DataFrame) -> tuple:
    """Lengths of error bars below and above the mean: nan (not drawn) without an
    interval; clipped because rounding can make them negative.
    """
    mean = table["mean"]
    return (mean - table["low"]).clip(lower=0), (table["high"] - mean).clip(lower=0)


def _ends(row: dict, name: str) -> list[list[float]]:
    """Lengths of the error bars of one point: nan (not drawn) without columns of its ends."""
    low, high = (row.get(f"{name}_{end}", np.nan) for end in ("low", "high"))
    return [[row[name] - low], [high - row[name]]]


def _draw_legend(figure: Figure, title: str = "arm") -> None:
    """One legend for all panels, above them; arms need no `title`."""
    handles: dict[str, Artist] = {}
    for axes in figure.axes:
        found, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    shown, columns = None if title == "arm" else title, int(figure.get_figwidth() / 1.7)
    figure.legend(
        handles.values(), handles.keys(), title=shown, loc="outside upper center", ncols=columns
    )


def _require_values(frame: pd.DataFrame, *columns: str) -> None:
    if frame.empty or not {*columns} <= {*frame}:
        given = f"{len(frame)} rows with the columns {list(frame)}"
        raise ValueError(f"A figure of the columns {list(columns)} cannot be drawn from {given}.")
    values = frame[list(columns)]
    missing = values.columns[(values.isna() | values.isin([np.inf, -np.inf])).any()]
    if len(missing):
        raise ValueError(f"The columns {list(missing)} have missing or infinite values.")


def _what_is_drawn(intervals: pd.DataFrame) -> str:
    """What the marks of a chart are and of how many batches each; a single one has no interval."""
    counts = intervals["count"]
    if counts.max() == 1:
        return "mean\none batch each, no intervals"
    number = "–".join(str(count) for count in dict.fromkeys([counts.min(), counts.max()]))
    return f"mean and 95 % bootstrap interval\n{number} independent batches each"


def _explained(figure: Figure, intervals: pd.DataFrame, y: str) -> Figure:
    """The chart of a table of intervals of `y`, with the texts that it needs."""
    axes = figure.axes[0]
    axes.set_ylabel(LABELS.get(y, y))
    axes.set_title(_what_is_drawn(intervals), fontsize=7)
    _draw_legend(figure, intervals.columns[1])
    return _with_numbers(figure, intervals)
