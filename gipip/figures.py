"""The figures of gipip in one style, and their files: picture (PNG), vector (PDF) and
the numbers drawn (CSV).
"""

import itertools
import os
import tempfile
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox, BboxBase, ScaledTranslation
from torch import Tensor

from gipip.evaluation.statistics import Interval, bootstrap_interval

COLUMN, PAGE = 3.5, 7.2
"""Widths of a figure in a column and across a page, in inches."""

LABELS = {
    "psnr": "PSNR (dB), higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS, lower is better",
    "feature_mse": "feature MSE, lower is better",
}
"""Axis labels of the metrics; any other column is labelled with its name."""


def use_style() -> None:
    """Set the one style of all figures for this session: colour-blind-safe palette, 8
    to 9 point type, light grid.
    """
    rc = {
        "font.size": 9,
        "axes.labelsize": 9,
        "axes.titlesize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "legend.title_fontsize": 8,
        "grid.linewidth": 0.5,
        "lines.linewidth": 1.2,
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,  # no label is cut off
        "pdf.fonttype": 42,  # TrueType: text stays text
    }
    seaborn.set_theme(context="paper", style="whitegrid", palette="colorblind", rc=rc)


class FigureFiles(NamedTuple):
    """Where a figure was saved."""

    png: Path
    pdf: Path
    csv: Path


def save_figure(
    name: str,
    figure: Figure | None = None,
    data: pd.DataFrame | None = None,
    folder: Path | str = "figures",
    *,
    dpi: int = 200,
) -> FigureFiles:
    """Write `name`.png, `name`.pdf and `name`.csv to `folder`, each whole or not at
    all; equal figures give equal bytes.

    `figure`: by default the current one. `data`: the numbers drawn, by default those
    that a function of this module attached to its figure; for a picture grid pass the
    metrics. Raises ValueError without numbers, OSError when the folder cannot be
    written.
    """
    figure = figure or plt.gcf()
    data = getattr(figure, "data_drawn", None) if data is None else data
    if data is None:
        raise ValueError(
            f"The figure {name!r} has no numbers: pass save_figure(…, data=…) a DataFrame of what it shows."
        )
    paths = FigureFiles(*(Path(folder) / f"{name}.{ending}" for ending in FigureFiles._fields))
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.", suffix=".tmp") as draft:
            drafts = [Path(draft) / path.name for path in paths]
            figure.savefig(drafts[0], dpi=dpi, metadata={"Software": None})
            figure.savefig(drafts[1], metadata={"CreationDate": None})
            data.to_csv(drafts[2], index=False, float_format="%.6g", lineterminator="\n")
            for source, target in zip(drafts, paths, strict=True):
                os.replace(source, target)
    except OSError as error:
        raise OSError(
            f"The figure {name!r} cannot be written to {folder} ({error}). Pass a folder that you can write."
        ) from error
    return paths


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
    columns = len(next(iter(rows.values())))
    if {len(images) for images in rows.values()} != {columns}:
        raise ValueError(
            f"The rows have {[len(images) for images in rows.values()]} images: expected equally many in each."
        )
    captions = {row: list((captions or {}).get(row, [""] * columns)) for row in rows}
    margin = 0.15 + 0.075 * max(len(line) for row in rows for line in row.split("\n"))
    side = min(1.0, (width - margin) / columns - _GAP)
    heights = [side + (_CAPTION if any(captions[row]) else _GAP) for row in rows]
    size = (margin + columns * (side + _GAP), sum(heights) + (_CAPTION if titles else _GAP))
    figure = plt.figure(figsize=size, layout="none")
    for line, (row, images) in enumerate(rows.items()):
        for column, (image, caption) in enumerate(zip(images, captions[row], strict=True)):
            corner = (margin + column * (side + _GAP), sum(heights[line:]) - side)
            axes = figure.add_axes(
                (corner[0] / size[0], corner[1] / size[1], side / size[0], side / size[1])
            )
            _show(
                axes,
                image,
                caption,
                row if column == 0 else "",
                titles[column] if titles and line == 0 else "",
            )
    figure.data_drawn = pd.DataFrame(
        {"row": row, "column": column, "caption": caption}
        for row in rows
        for column, caption in enumerate(captions[row])
    )
    return figure


_GAP, _CAPTION = 0.04, 0.2  # inches: between images, for a line of text


def _show(
    axes: Axes, image: Float[Tensor, "3 height width"], caption: str, label: str, title: str
) -> None:
    axes.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize=7, labelpad=2)
    axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=4)
    axes.set_title(title, fontsize=8, pad=3)
    seaborn.despine(ax=axes, left=True, bottom=True)


def cost_curves(
    histories: Mapping[str, Mapping[str, Tensor] | Tensor], width: float = PAGE
) -> Figure:
    """The cost, or each of its terms in a panel, over the iterations of one or more
    attacks, on a logarithmic axis.

    `histories`: for each attack its `Reconstruction.history`, or one tensor with a
    value an iteration.
    """
    histories = {
        arm: history if isinstance(history, Mapping) else {"cost": history}
        for arm, history in histories.items()
    }
    terms = list(dict.fromkeys(term for history in histories.values() for term in history))
    figure, grid = plt.subplots(
        1, len(terms), squeeze=False, figsize=(width, 2.4), layout="constrained"
    )
    colors = _colors(histories)
    for axes, term in zip(grid[0], terms, strict=True):
        for arm, history in histories.items():
            if term in history:
                values = history[term].detach().cpu().numpy()
                axes.plot(range(1, len(values) + 1), values, label=arm, color=colors[arm])
        scale = "log" if axes.dataLim.y1 > 0 else "linear"  # a term of weight 0 is all 0
        axes.set(title=term, xlabel="evaluation", xscale="log", yscale=scale)
    grid[0, 0].set_ylabel("weighted cost")
    _draw_legend(figure, columns=4)
    figure.data_drawn = pd.concat(
        pd.DataFrame({"arm": arm, "term": term, "value": values.detach().cpu().numpy()})
        .rename_axis("iteration")
        .reset_index()
        for arm, history in histories.items()
        for term, values in history.items()
    )
    return figure


def interval_bars(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    groups: str | None = "batch",
    width: float = COLUMN,
    xlabel: str | None = None,
) -> Figure:
    """Bars of the mean of column `y` for each value of `x`, one colour for each value
    of `hue`, with 95 % bootstrap intervals.

    `groups`: the column that says which images were reconstructed together (see
    `bootstrap_interval`); None treats rows as independent.
    """
    table = _intervals(frame, x, y, hue, groups)
    figure, axes = plt.subplots(figsize=(width, 2.6), layout="constrained")
    _draw_bars(axes, table, x, hue, _places(table[x]), _colors(table[hue]))
    axes.set(xlabel=x if xlabel is None else xlabel, ylabel=LABELS.get(y, y))
    axes.set_title(_explained("bars", "lines", table["count"], groups), fontsize=7)
    _draw_legend(figure, columns=3, title=hue)
    figure.data_drawn = table
    return figure


def interval_lines(
    frame: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    groups: str | None = "batch",
    width: float = COLUMN,
    xlabel: str | None = None,
    xscale: Literal["category", "linear", "log", "symlog"] = "linear",
) -> Figure:
    """The mean of column `y` over `x`, a line for each value of `hue`, with 95 %
    bootstrap intervals as error bars.

    The lines stand three points apart, so that error bars do not hide each other.
    `xscale`: "category" spaces the values of `x` equally, in the order of the table;
    "log" and "symlog" (linear up to the least positive value) have a tick at each
    value. `groups`: see `interval_bars`. Raises ValueError for x ≤ 0 on a "log" axis.
    """
    table = _intervals(frame, x, y, hue, groups)
    colors = _colors(table[hue])
    places = _places(table[x]) if xscale == "category" else {value: value for value in table[x]}
    figure, axes = plt.subplots(figsize=(width, 2.6), layout="constrained")
    _scale_x(axes, places, xscale)
    for index, ((arm, color), marker) in enumerate(
        zip(colors.items(), itertools.cycle(_MARKERS), strict=False)
    ):
        part = table[table[hue] == arm].sort_values(x, key=lambda values: values.map(places))
        errors = _reach(part["mean"], part["low"], part["high"])
        line = axes.errorbar(
            part[x].map(places),
            part["mean"],
            errors,
            color=color,
            marker=marker,
            markersize=4,
            capsize=2,
            label=arm,
        )
        aside = ScaledTranslation(
            (index - (len(colors) - 1) / 2) * 3 / 72, 0, figure.dpi_scale_trans
        )
        for artist in line.get_children():
            artist.set_transform(axes.transData + aside)
    axes.set(xlabel=x if xlabel is None else xlabel, ylabel=LABELS.get(y, y))
    axes.set_title(_explained("points", "bars", table["count"], groups), fontsize=7)
    _draw_legend(figure, columns=3, title=hue)
    figure.data_drawn = table
    return figure


def published_bars(
    frame: pd.DataFrame,
    published: pd.DataFrame,
    x: str,
    y: str,
    hue: str,
    *,
    groups: str | None = "batch",
    width: float = PAGE,
    xlabel: str | None = None,
    titles: tuple[str, str] = ("published (ImageNet 64×64, ResNet18)", "this reproduction"),
) -> Figure:
    """Published values (left) beside those of `frame` (right, as `interval_bars`), on
    one scale; `titles` name the settings.

    `published`: columns `x`, `hue` and `y`, a row for each bar (see `gipip.published`).
    Both panels have all values of `x`, ascending if they are numbers, with a gap where
    a panel has none. Equal values of `hue` have one colour.
    """
    tables = {
        titles[0]: published[[x, hue, y]].rename(columns={y: "mean"}),
        titles[1]: _intervals(frame, x, y, hue, groups),
    }
    drawn = pd.concat(tables, names=["panel"]).reset_index("panel")
    places = _places(
        drawn[x].sort_values() if pd.api.types.is_numeric_dtype(drawn[x]) else drawn[x]
    )
    notes = [
        "bars: read from the published chart\nno intervals",
        _explained("bars", "lines", tables[titles[1]]["count"], groups),
    ]
    figure, panels = plt.subplots(
        1, 2, figsize=(width, 2.8), sharex=True, sharey=True, layout="constrained"
    )
    for axes, title, note in zip(panels, titles, notes, strict=True):
        _draw_bars(axes, drawn[drawn["panel"] == title], x, hue, places, _colors(drawn[hue]))
        axes.set(xlabel=x if xlabel is None else xlabel)
        axes.set_title(f"{title}\n{note}", fontsize=8)
    panels[0].set_ylabel(LABELS.get(y, y))
    _draw_legend(figure, columns=4, title=hue)
    figure.data_drawn = drawn
    return figure


def tradeoff(
    frame: pd.DataFrame,
    x: str,
    y: str,
    label: str,
    hue: str,
    *,
    width: float = PAGE,
    xlabel: str | None = None,
    ylabel: str | None = None,
) -> Figure:
    """A point for each row of `frame` at columns `x` and `y`, such as utility and
    privacy, with the text of column `label` beside it.

    `hue`: the column that gives colour and marker. Error bars, in either direction, are
    95 % bootstrap intervals, whose ends are read from the columns "{x}_low",
    "{x}_high", "{y}_low", "{y}_high" where there are any; nan means none. Raises
    ValueError for missing values.
    """
    _require_values(frame, x, y)
    intervals = {
        name: [f"{name}_low", f"{name}_high"]
        for name in (x, y)
        if {f"{name}_low", f"{name}_high"} <= set(frame)
    }
    figure, axes = plt.subplots(figsize=(width, 3.4), layout="constrained")
    for (arm, color), marker in zip(
        _colors(frame[hue]).items(), itertools.cycle(_MARKERS), strict=False
    ):
        part = frame[frame[hue] == arm]
        reach = {
            name: _reach(part[name], *(part[end] for end in ends))
            for name, ends in intervals.items()
        }
        style = {
            "color": color,
            "marker": marker,
            "markersize": 5,
            "linestyle": "",
            "elinewidth": 0.9,
            "capsize": 2,
        }
        axes.errorbar(part[x], part[y], reach.get(y), reach.get(x), label=arm, **style)
    axes.margins(0.1)
    axes.set(
        xlabel=LABELS.get(x, x) if xlabel is None else xlabel,
        ylabel=LABELS.get(y, y) if ylabel is None else ylabel,
    )
    if intervals:
        axes.set_title(
            "points: mean; bars: 95 % bootstrap interval\nover independent batches", fontsize=7
        )
    _draw_legend(figure, columns=int(width / 1.4), title=hue)
    _label_points(axes, frame[[x, y]].to_numpy(float), frame[label])
    figure.data_drawn = frame[[label, hue, x, *intervals.get(x, []), y, *intervals.get(y, [])]]
    return figure


def heatmap(
    frame: pd.DataFrame,
    rows: str,
    columns: str,
    value: str,
    *,
    label: str,
    width: float = COLUMN,
    rows_label: str | None = None,
    columns_label: str | None = None,
    best: Literal["highest", "lowest"] = "highest",
    decimals: int = 2,
) -> Figure:
    """The mean of column `value` for each pair of values of `rows` and `columns`, as
    numbers on colours; the best mean is outlined.

    `label` names the value with its unit, beside the colour bar. Pairs without a row
    stay blank. Raises ValueError for missing values.
    """
    _require_values(frame, value)
    table = frame.groupby([rows, columns])[value].agg(["mean", "count"]).reset_index()
    grid = table.pivot(index=rows, columns=columns, values="mean")
    figure, axes = plt.subplots(figsize=(width, 0.9 + 0.3 * len(grid)), layout="constrained")
    colors = (
        "cividis" if best == "highest" else "cividis_r"
    )  # either way the best cell is bright and its outline dark
    texts = {
        "xticklabels": list(map(_text, grid.columns)),
        "yticklabels": list(map(_text, grid.index)),
        "annot_kws": {"fontsize": 7},
    }
    seaborn.heatmap(
        grid,
        ax=axes,
        cmap=colors,
        annot=True,
        fmt=f".{decimals}f",
        linewidths=0.5,
        cbar_kws={"label": label},
        **texts,
    )
    row, column = np.argwhere(grid == (np.nanmax(grid) if best == "highest" else np.nanmin(grid)))[
        0
    ]
    axes.add_patch(
        Rectangle((column, row), 1, 1, fill=False, edgecolor="black", linewidth=2, clip_on=False)
    )
    axes.set(
        xlabel=columns if columns_label is None else columns_label,
        ylabel=rows if rows_label is None else rows_label,
    )
    axes.tick_params(axis="y", rotation=0)
    axes.grid(visible=False)
    axes.set_title(f"cells: mean; outlined: the {best}", fontsize=7)
    figure.data_drawn = table
    return figure


def paired_effect(
    effects: Mapping[str, Interval], label: str, *, width: float = PAGE, decimals: int = 2
) -> Figure:
    """A forest plot of paired differences (see `paired_difference`): mean, 95 %
    bootstrap interval, and a line at no difference.

    `label` says what the difference is, with its unit, such as "PSNR gain by the
    anomaly score (dB)".
    """
    figure, axes = plt.subplots(figsize=(width, 0.75 + 0.32 * len(effects)), layout="constrained")
    axes.axvline(0, color="0.3", linewidth=0.8, linestyle="--")
    for row, effect in enumerate(effects.values()):
        axes.plot([effect.low, effect.high], [row, row], color="C0", linewidth=1.5)
        axes.plot(effect.mean, row, "o", color="C0", markersize=4)
        axes.text(
            1.02,
            row,
            f"{effect:+.{decimals}f}  n={effect.count}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(effects)), list(effects))
    axes.set(ylim=(len(effects) - 0.5, -0.5), xlabel=f"{label}\nmean and 95 % bootstrap interval")
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="y", visible=False)
    figure.data_drawn = pd.DataFrame(
        {"effect": name, **effect._asdict()} for name, effect in effects.items()
    )
    return figure


_MARKERS = "osD^vPX"


def _intervals(frame: pd.DataFrame, x: str, y: str, hue: str, groups: str | None) -> pd.DataFrame:
    """The Interval of `y` for each pair of values of `x` and `hue`, a row each, in the
    order of the frame.
    """
    return pd.DataFrame(
        {x: key[0], hue: key[1]}
        | bootstrap_interval(part[y], groups=part[groups] if groups else None)._asdict()
        for key, part in frame.groupby([x, hue], sort=False)
    )


def _draw_bars(
    axes: Axes,
    table: pd.DataFrame,
    x: str,
    hue: str,
    places: Mapping[Hashable, int],
    colors: Mapping[Hashable, tuple],
) -> None:
    """Bars of a table of intervals, those of a value of `x` side by side in the order
    of `colors`; without an interval no error bar.
    """
    arms = [arm for arm in colors if arm in set(table[hue])]
    width = 0.8 / len(arms)
    for index, arm in enumerate(arms):
        part = table[table[hue] == arm]
        center = part[x].map(places) + (index - (len(arms) - 1) / 2) * width
        errors = _reach(part["mean"], part["low"], part["high"])
        axes.bar(
            center,
            part["mean"],
            width,
            color=colors[arm],
            label=arm,
            yerr=errors,
            error_kw={"capsize": 2, "linewidth": 0.9},
        )
    _scale_x(axes, places, "category")
    axes.grid(axis="x", visible=False)


def _scale_x(axes: Axes, places: Mapping[Hashable, float], xscale: str) -> None:
    """Set the scale of the x axis and, unless it is linear, a tick for each of `places`
    (value: place on the axis).
    """
    if xscale == "log" and min(places) <= 0:
        raise ValueError(
            f"A logarithmic axis cannot show the value {min(places)}: pass xscale='symlog' or 'category'."
        )
    if xscale == "symlog":
        axes.set_xscale(
            "symlog", linthresh=min((abs(value) for value in places if value), default=1.0)
        )
    elif xscale != "category":
        axes.set_xscale(xscale)
    if xscale != "linear":
        axes.set_xticks(list(places.values()), [_text(value) for value in places])
        axes.minorticks_off()


def _places(values: Iterable[Hashable]) -> dict[Hashable, int]:
    """Places 0, 1, 2, … of categories, which may be repeated, in the order in which
    they first occur.
    """
    return {value: place for place, value in enumerate(dict.fromkeys(values))}


def _colors(arms: Iterable[Hashable]) -> dict[Hashable, tuple]:
    """Colours of the arms, which may be repeated, in the order in which they first occur."""
    arms = list(dict.fromkeys(arms))
    return dict(zip(arms, seaborn.color_palette(n_colors=len(arms)), strict=True))


def _text(value: Hashable) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reach(center: pd.Series, low: pd.Series, high: pd.Series) -> list[pd.Series]:
    """Lengths of error bars below and above `center`: nan (not drawn) without an
    interval; within rounding error of 0 they are 0.
    """
    return [length.mask(length.abs() < 1e-9, 0.0) for length in (center - low, high - center)]


def _draw_legend(figure: Figure, columns: int, title: str = "arm") -> None:
    """One legend for all panels, above them; arms need no `title`."""
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    named = {} if title == "arm" else {"title": title}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(columns, len(handles)),
        frameon=False,
        **named,
    )


def _label_points(axes: Axes, points: Float[np.ndarray, "points 2"], labels: Iterable[str]) -> None:
    """Write a label beside each point, where it least covers points and earlier labels
    and least leaves the axes.
    """
    axes.figure.draw_without_rendering()  # settles where the axes are
    taken = [Bbox.from_bounds(*(pixel - 5), 10, 10) for pixel in axes.transData.transform(points)]
    for point, label in zip(points, labels, strict=True):
        note = axes.annotate(
            str(label),
            tuple(point),
            (0, 0),
            textcoords="offset points",
            fontsize=7,
            path_effects=_HALO,
        )
        hidden = {side: _hidden(_moved(note, side), taken, axes.bbox) for side in _SIDES}
        taken.append(_moved(note, min(hidden, key=hidden.get)))


_HALO = [
    withStroke(linewidth=2, foreground="white")
]  # keeps a label legible where it crosses an error bar
_SIDES = [(1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0)]
"""Where a label can stand: right or left, above or below; diagonals, which avoid error
bars, first.
"""


def _moved(note: Annotation, side: tuple[int, int]) -> Bbox:
    """Move a label to a side of its point; where it then is, in pixels."""
    note.set(
        position=(5 * side[0], 4 * side[1]),
        ha=["center", "left", "right"][side[0]],
        va=["center", "bottom", "top"][side[1]],
    )
    return note.get_window_extent()


def _hidden(box: BboxBase, taken: Iterable[BboxBase], frame: BboxBase) -> float:
    """Area in square pixels of what a label covers and of what of it lies outside the frame."""
    return (
        sum(_common(box, other) for other in taken) + box.width * box.height - _common(box, frame)
    )


def _common(first: BboxBase, second: BboxBase) -> float:
    common = Bbox.intersection(first, second)
    return common.width * common.height if common else 0.0


def _require_values(frame: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if not np.isfinite(frame[column]).all()]
    if missing:
        raise ValueError(
            f"The columns {missing} have missing or infinite values, which a figure would leave out without a word."
        )


def _explained(means: str, intervals: str, counts: pd.Series, groups: str | None) -> str:
    """What shows the means and what the intervals of `counts` batches or images each; a
    single one has no interval.
    """
    one, many = ("batch", "batches") if groups else ("image", "images")
    if counts.max() == 1:
        return f"{means}: mean\none {one} each, no intervals"
    number = "–".join(str(count) for count in dict.fromkeys([counts.min(), counts.max()]))
    return f"{means}: mean; {intervals}: 95 % bootstrap interval\n{number} independent {many} each"
