"""The figures of gipip in one style, and their files: picture (PNG), vector (PDF) and
the numbers drawn (CSV).
"""

import os
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import ScaledTranslation
from scipy.optimize import isotonic_regression
from torch import Tensor

from gipip.evaluation.statistics import Interval, bootstrap_interval

COLUMN, PAGE = 3.5, 7.2
"""Widths of a figure in a column and across a page, in inches."""

LABELS = {
    "psnr": "PSNR (dB), higher is better",
    "ssim": "SSIM, higher is better",
    "ssim_padded": "SSIM with zero-padded border, higher is better",
    "lpips": "LPIPS, lower is better",
    "batch_size": "batch size",
    "identified": "identified (share),\nhigher is better",
}
"""Axis labels of columns; any other column is labelled with its name."""

_LETTER = 0.6  # width, in units of the font size
_MARKERS = "osD^vPX"
_GREY = "0.4"


# Style and files ------------------------------------------------------------------


def use_style() -> None:
    """Set the one style of all figures for this session: colour-blind-safe palette, 8 to
    9 point type, light grid, no frame.
    """
    rc = {
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "figure.dpi": 80,
        "savefig.dpi": 200,
        "savefig.bbox": "tight",  # no label is cut off
        "savefig.pad_inches": 0.04,
        "pdf.fonttype": 42,  # TrueType: text stays text
    }
    seaborn.set_theme("paper", "whitegrid", "colorblind", font_scale=0.92, rc=rc)


def save_figure(
    name: str,
    figure: Figure | None = None,
    data: pd.DataFrame | None = None,
    folder: Path | str = "figures",
) -> Path:
    """Write `name`.png, `name`.pdf and `name`.csv to `folder`, each whole or not at all;
    equal figures give equal bytes. The path of the PNG.

    `figure`: by default the current one. `data`: the numbers drawn, by default those
    that a function of this module attached to its figure; for a picture grid pass the
    metrics. Raises ValueError without numbers, OSError when the folder cannot be
    written.
    """
    figure, folder = figure or plt.gcf(), Path(folder)
    data = getattr(figure, "data_drawn", None) if data is None else data
    if data is None:
        raise ValueError(f"The figure {name!r} has no numbers: pass a DataFrame of them as `data`.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.", suffix=".tmp") as drafts:
            draft = f"{drafts}/{name}"
            figure.savefig(f"{draft}.png", metadata={"Software": None})
            figure.savefig(f"{draft}.pdf", metadata={"CreationDate": None})
            data.to_csv(f"{draft}.csv", index=False, float_format="%.6g", lineterminator="\n")
            for file in Path(drafts).iterdir():
                os.replace(file, folder / file.name)
    except OSError as error:
        place = f"{folder} ({error}). Pass a folder that you can write"
        raise OSError(f"The figure {name!r} cannot be written to {place}.") from error
    return folder / f"{name}.png"


# Pictures -------------------------------------------------------------------------


def image_grid(
    rows: Mapping[str, Float[Tensor, "columns 3 height width"]],
    captions: Mapping[str, Sequence[str]] | None = None,
    titles: Sequence[str] = (),
    width: float = PAGE,
) -> Figure:
    """Images in [0, 1] in labelled rows of equally many, at most eight, every pixel
    shown as it is.

    `captions`: for any of the rows a text under each of its images, such as "18.9 dB".
    `titles`: a text over each column. `width` in inches; an image is at most an inch
    wide, and smaller where the rows would not fit on a page. Raises ValueError for rows
    of different length, or of more than eight images.
    """
    lengths = [len(images) for images in rows.values()]
    if len({*lengths}) != 1 or not 1 <= lengths[0] <= 8:
        expected = "expected equally many in each, one to eight"
        raise ValueError(f"The rows have {lengths} images: {expected}.")
    captions = {row: (captions or {}).get(row, [""] * lengths[0]) for row in rows}
    height = min(1.2 * len(rows) + 0.5 * bool(titles), 9.5)
    options: dict[str, Any] = {"figsize": (width, height), "layout": "compressed"}
    figure, grid = plt.subplots(len(rows), lengths[0], squeeze=False, **options)
    for line, (row, images) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(row, rotation=0, ha="right", va="center", fontsize=8)
        for axes, image, caption in zip(line, images, captions[row], strict=True):
            pixels = image.detach().cpu().clamp(0, 1).permute(1, 2, 0)
            axes.imshow(pixels.numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(caption, fontsize=7, labelpad=1)
    letters = max(8, int(9 * (width - 0.8) / lengths[0] / _LETTER))  # of 8 points
    for axes, title in zip(grid[0], titles, strict=False):
        axes.set_title(textwrap.fill(title, letters, break_long_words=False), fontsize=8)
    seaborn.despine(figure, left=True, bottom=True)
    return _with_numbers(figure, pd.DataFrame(captions))


# Charts ---------------------------------------------------------------------------


def cost_curves(histories: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Each term of the cost in a panel, over the iterations of one or more attacks, on
    logarithmic axes.

    `histories`: for each attack its `Reconstruction.history`.
    """
    curves = [
        pd.DataFrame({"attack": attack, "term": term, "value": values.detach().cpu().numpy()})
        for attack, history in histories.items()
        for term, values in history.items()
    ]
    if not curves:
        raise ValueError("There are no costs to draw: pass the history of at least one attack.")
    table = pd.concat(curves).rename_axis("iteration").reset_index()
    drawn = table.assign(evaluation=table["iteration"] + 1)
    style: dict[str, Any] = {"kind": "line", "estimator": None, "facet_kws": {"sharey": False}}
    style |= {"height": 2.2, "aspect": 2.9 / table["term"].nunique()}
    grid = seaborn.relplot(drawn, x="evaluation", y="value", hue="attack", col="term", **style)
    grid.set(xscale="log").set_titles("{col_name}").set_ylabels("weighted cost")
    for panel in grid.axes.flat:
        if panel.dataLim.y1 > 0:  # a term of weight 0 is all 0
            panel.set_yscale("log")
    return _with_numbers(grid.figure, table)


def interval_dots(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    panel: str | None = None,
    references: Mapping[Any, float] | None = None,
    joined: bool = False,
    xscale: Literal["category", "log"] = "category",
    width: float = COLUMN,
    xlabel: str | None = None,
) -> Figure:
    """A dot at the mean of column `y` for each value of `x` and `hue`, with 95 %
    bootstrap intervals over independent batches (column `batch`); the values of `hue`
    stand side by side, in a colour and marker each.

    Rows without a batch (nan) are published values and have no interval. Numbers on the
    `x` axis ascend; texts keep their order in the frame. `panel`: a column, each value
    of which titles a panel; a panel has only the places that it has rows of.
    `references`: named values of `y`, which dashed lines mark in the panels of measured
    rows. `joined` draws a line through the dots of each value of `hue`. `xscale`:
    "category" spaces the values of `x` equally; "log" is a logarithmic axis, with a tick
    at each value and a place for 0. `width` in inches. Raises ValueError for missing
    values in any column but `batch`.
    """
    keys = [x, hue] if panel is None else [panel, x, hue]
    _require_values(frame, y, *keys, "batch")
    table = frame.groupby(keys, sort=False).apply(_interval, y).reset_index()
    places, arms = pd.Index(frame[x].unique()), list(frame[hue].unique())
    order = places.sort_values() if pd.api.types.is_numeric_dtype(places) else places
    parts = table.groupby(panel or (lambda row: ""), sort=False)
    figure, panels = _panels(width, 3, len(parts), sharey=True)
    room = 72 * (width - 1.5) / len(parts) / len(order)  # of a place, in points
    step = 3 if joined else min(9, 0.7 * room / len(arms))
    for axes, (title, part) in zip(panels, parts, strict=True):
        part = part.sort_values(x, key=order.get_indexer)
        positions = _positions(axes, part[x], xscale, room)
        _draw_dots(axes, part.set_index([positions, hue]), arms, step, "-" if joined else "")
        for value in (references or {}).values() if part["count"].any() else ():
            axes.axhline(value, color=_GREY, linewidth=0.8, linestyle="--", zorder=1)
        axes.set_title(f"{title!s}\n{_what_is_drawn(part)}".strip(), fontsize=8)
        axes.set_xlabel(LABELS.get(x, x) if xlabel is None else xlabel)
    panels[0].set_ylabel(LABELS.get(y, y))
    handles = panels[0].get_legend_handles_labels()
    title, columns = None if hue == "arm" else hue, int(width / 1.7)
    figure.legend(*handles, title=title, loc="outside upper center", ncols=columns)
    if references:
        lines = pd.Series(references).sort_values()
        _name_lines(figure, lines)
        table = pd.concat([table, pd.DataFrame({hue: lines.index, "mean": lines.to_numpy()})])
    return _with_numbers(figure, table)


def tradeoff(frame: pd.DataFrame, x: str, y: str, label: str, hue: str) -> Figure:
    """A numbered point for each row of `frame` at columns `x` and `y`, such as privacy
    and utility; the legend has the text of column `label` beside each number.

    `hue`: the column that gives the colour. Error bars, in either direction, are 95 %
    bootstrap intervals, whose ends are read from the columns "{x}_low", "{x}_high",
    "{y}_low", "{y}_high" where there are any; nan means none. The columns "images" and
    "count" (of independent batches) say n, if there are. Raises ValueError for missing
    values.
    """
    _require_values(frame, x, y, label, hue)
    figure, (axes,) = _panels(PAGE, 3.4)
    on_dot: dict[str, Any] = {"ha": "center", "va": "center_baseline", "fontsize": 6}
    kinds = list(frame[hue].unique())
    for number, row in enumerate(frame.to_dict("records"), start=1):
        color = f"C{kinds.index(row[hue])}"
        axes.hlines(row[y], row.get(f"{x}_low", np.nan), row.get(f"{x}_high", np.nan), color)
        axes.vlines(row[x], row.get(f"{y}_low", np.nan), row.get(f"{y}_high", np.nan), color)
        axes.plot(row[x], row[y], "o", color=color, markersize=9, label=f"{number}  {row[label]}")
        axes.text(row[x], row[y], str(number), color="white", **on_dot)
    axes.margins(0.1)
    axes.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
    if "count" in frame:
        axes.set_title(_what_is_drawn(frame), fontsize=8)
    figure.legend(loc="outside right upper")
    return _with_numbers(figure, frame)


def heatmap(frame: pd.DataFrame, rows: str, columns: str, value: str, *, label: str) -> Figure:
    """The mean of column `value` for each pair of values of `rows` and `columns`, as
    numbers on colours; the highest mean is outlined.

    `label` names the value, its unit and n, beside the colour bar. Pairs without a row
    stay blank. Raises ValueError for missing values.
    """
    _require_values(frame, rows, columns, value)
    table = frame.groupby([rows, columns])[value].agg(["mean", "count"]).reset_index()
    grid = table.pivot(index=rows, columns=columns, values="mean")
    figure, (axes,) = _panels(COLUMN, 0.9 + 0.3 * len(grid))
    style = {"cmap": "cividis", "linewidths": 0.5, "fmt": ".2f", "annot_kws": {"fontsize": 8}}
    drawn = grid.rename(index=_text, columns=_text)
    seaborn.heatmap(drawn, ax=axes, annot=True, cbar_kws={"label": label}, **style)
    row, column = np.argwhere(grid == np.nanmax(grid))[0]
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, ec="black", lw=2, clip_on=False))
    axes.tick_params(axis="y", rotation=0)
    axes.grid(visible=False)
    axes.set_title("cells: mean; outlined: the highest", fontsize=8)
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
    axes.hlines(table.index, table["low"], table["high"])
    axes.plot(table["mean"], table.index, "o")
    for row, effect in enumerate(effects.values()):
        text = f"{effect:+.{decimals}f}  n={effect.count}"
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(table.index, table["effect"])
    note = "mean and 95 % bootstrap interval, n: independent batches"
    axes.set(ylim=(len(effects) - 0.5, -0.5), xlabel=f"{label}\n{note}")
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


def _interval(part: pd.DataFrame, y: str) -> pd.Series:
    """The Interval of `y` and the number of images measured: none for published values."""
    values, batches = part[y], part["batch"]
    published = Interval(values.mean(), np.nan, np.nan, 0)
    interval = published if batches.hasnans else bootstrap_interval(values, groups=batches)
    return pd.Series(interval._asdict() | {"images": batches.count()})


def _positions(axes: Axes, values: pd.Series, xscale: str, room: float) -> np.ndarray:
    """Where each value is on the horizontal axis, which gets a tick there. Its label is
    broken between words, and as small as its longest word needs, to be no wider than
    `room` points.
    """
    positions, places = pd.factorize(values)
    if xscale == "log":
        positions = values.to_numpy()
        least = min((place for place in places if place > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=least)  # linear next to 0
    else:
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.grid(axis="x", visible=False)
    texts = [_text(place) for place in places]
    letters = max(len(word) for text in texts for word in text.split())
    size = min(8, room / letters / _LETTER)
    lines = textwrap.TextWrapper(max(1, int(room / size / _LETTER)), break_long_words=False)
    axes.set_xticks(np.unique(positions), map(lines.fill, texts), fontsize=size)
    axes.minorticks_off()
    return positions


def _draw_dots(axes: Axes, table: pd.DataFrame, arms: list, step: float, line: str) -> None:
    """Dots of a table of intervals that is indexed by position and arm; arms stand
    `step` points apart.
    """
    for index, arm in enumerate(arms):
        part = table[table.index.get_level_values(1) == arm]
        at, color = part.index.get_level_values(0), f"C{index}"
        marker = _MARKERS[index % len(_MARKERS)]
        (dots,) = axes.plot(at, part["mean"], marker, ls=line, color=color, label=arm)
        bars = axes.vlines(at, part["low"], part["high"], color)
        points = step * (index - (len(arms) - 1) / 2)
        aside = ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)
        for artist in (dots, bars):
            artist.set_transform(axes.transData + aside)


def _name_lines(figure: Figure, lines: pd.Series) -> None:
    """The names of ascending horizontal lines, at the right of the last panel; those
    that would touch are moved apart, by as little as possible.
    """
    figure.draw_without_rendering()  # settles the height of the panel
    axes = figure.axes[-1]
    low, high = axes.get_ylim()
    ends = (lines - low) / (high - low)
    steps = 9 / 72 * figure.dpi / axes.bbox.height * np.arange(len(lines))
    places = isotonic_regression(ends - steps).x + steps
    line = {"arrowstyle": "-", "color": _GREY, "lw": 0.5, "shrinkA": 0, "shrinkB": 0}
    style: dict[str, Any] = {"color": _GREY, "va": "center", "arrowprops": line}
    for name, end, place in zip(lines.index, ends, places, strict=True):
        axes.annotate(name, (1, end), (1.04, place), "axes fraction", fontsize=7, **style)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _require_values(frame: pd.DataFrame, *columns: str) -> None:
    present = {"batch"} & {*frame}  # a value without a batch is a published one
    values = frame.reindex(columns=list(columns)).drop(columns=present, errors="ignore")
    missing = values.columns[(values.isna() | values.isin([np.inf, -np.inf])).any()]
    if frame.empty or len(missing):
        found = f"{len(frame)} rows, with missing or infinite values in {list(missing)}"
        raise ValueError(f"A figure of the columns {list(columns)} cannot be drawn from {found}.")


def _what_is_drawn(table: pd.DataFrame) -> str:
    """What the marks of a chart are, and of how many images and batches each."""
    measured = table[table["count"] > 0]
    if measured.empty:
        return "as published, no intervals"
    images, batches = measured["images"], measured["count"]
    marks = "mean and 95 % bootstrap interval" if batches.max() > 1 else "mean, no intervals"
    number = _number(batches, "independent batch", "independent batches")
    return f"{marks}\nn = {_number(images, 'image', 'images')} in {number}"


def _number(counts: pd.Series, one: str, many: str) -> str:
    """Such as "8 images", or "1–8 images" where it varies."""
    least, most = int(counts.min()), int(counts.max())
    number = f"{most}" if least == most else f"{least}–{most}"
    return f"{number} {one if most == 1 else many}"
