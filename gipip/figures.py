"""The figures of gipip in one style, and their files: picture (PNG), vector (PDF) and the numbers drawn (CSV)."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import seaborn
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from gipip.metrics import Interval, bootstrap_interval

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
    """Set the one style of all figures for this session: colour-blind-safe palette, 8 to 9 point type, light grid."""
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
    name: str, figure: Figure | None = None, data: pd.DataFrame | None = None, folder: Path | str = "figures", *, dpi: int = 200
) -> FigureFiles:
    """Write `name`.png, `name`.pdf and `name`.csv to `folder`, each whole or not at all; equal figures give equal bytes.

    `figure`: by default the current one. `data`: the numbers drawn, by default those that a function of this module attached to its figure;
    for a picture grid pass the metrics. Raises ValueError without numbers, OSError when the folder cannot be written.
    """
    figure = figure or plt.gcf()
    data = getattr(figure, "data_drawn", None) if data is None else data
    if data is None:
        raise ValueError(f"The figure {name!r} has no numbers: pass save_figure(…, data=…) a DataFrame of what it shows.")
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
        raise OSError(f"The figure {name!r} cannot be written to {folder} ({error}). Pass a folder that you can write.") from error
    return paths


def image_grid(
    rows: Mapping[str, Float[Tensor, "columns 3 height width"]],
    captions: Mapping[str, Sequence[str]] | None = None,
    titles: Sequence[str] = (),
    width: float = PAGE,
) -> Figure:
    """Images in [0, 1] in labelled rows of equally many, every pixel shown as it is.

    `captions`: for any of the rows a text under each of its images, such as "18.9 dB". `titles`: a text over each column.
    `width` in inches; an image is at most an inch wide. Raises ValueError for rows of different length.
    """
    columns = len(next(iter(rows.values())))
    if {len(images) for images in rows.values()} != {columns}:
        raise ValueError(f"The rows have {[len(images) for images in rows.values()]} images: expected equally many in each.")
    captions = {row: list((captions or {}).get(row, [""] * columns)) for row in rows}
    margin = 0.15 + 0.075 * max(len(line) for row in rows for line in row.split("\n"))
    side = min(1.0, (width - margin) / columns - _GAP)
    heights = [side + (_CAPTION if any(captions[row]) else _GAP) for row in rows]
    size = (margin + columns * (side + _GAP), sum(heights) + (_CAPTION if titles else _GAP))
    figure = plt.figure(figsize=size, layout="none")
    for line, (row, images) in enumerate(rows.items()):
        for column, (image, caption) in enumerate(zip(images, captions[row], strict=True)):
            corner = (margin + column * (side + _GAP), sum(heights[line:]) - side)
            axes = figure.add_axes((corner[0] / size[0], corner[1] / size[1], side / size[0], side / size[1]))
            _show(axes, image, caption, row if column == 0 else "", titles[column] if titles and line == 0 else "")
    figure.data_drawn = pd.DataFrame(
        {"row": row, "column": column, "caption": caption} for row in rows for column, caption in enumerate(captions[row])
    )
    return figure


_GAP, _CAPTION = 0.04, 0.2  # inches: between images, for a line of text


def _show(axes: Axes, image: Float[Tensor, "3 height width"], caption: str, label: str, title: str) -> None:
    axes.imshow(image.detach().cpu().clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(caption, fontsize=7, labelpad=2)
    axes.set_ylabel(label, rotation=0, ha="right", va="center", labelpad=4)
    axes.set_title(title, fontsize=8, pad=3)
    seaborn.despine(ax=axes, left=True, bottom=True)


def cost_curves(histories: Mapping[str, Mapping[str, Tensor] | Tensor], width: float = PAGE) -> Figure:
    """The cost, or each of its terms in a panel, over the iterations of one or more attacks, on a logarithmic axis.

    `histories`: for each attack its `Reconstruction.history`, or one tensor with a value an iteration.
    """
    histories = {arm: history if isinstance(history, Mapping) else {"cost": history} for arm, history in histories.items()}
    terms = list(dict.fromkeys(term for history in histories.values() for term in history))
    figure, grid = plt.subplots(1, len(terms), squeeze=False, figsize=(width, 2.4), layout="constrained")
    colors = dict(zip(histories, seaborn.color_palette(n_colors=len(histories)), strict=True))
    for axes, term in zip(grid[0], terms, strict=True):
        for arm, history in histories.items():
            if term in history:
                values = history[term].detach().cpu().numpy()
                axes.plot(range(1, len(values) + 1), values, label=arm, color=colors[arm])
        scale = "log" if axes.dataLim.y1 > 0 else "linear"  # a term of weight 0 is all 0
        axes.set(title=term, xlabel="evaluation", xscale="log", yscale=scale)
    grid[0, 0].set_ylabel("weighted cost")
    handles = {label: line for axes in grid[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(4, len(handles)), frameon=False)
    figure.data_drawn = pd.concat(
        pd.DataFrame({"arm": arm, "term": term, "value": values.detach().cpu().numpy()}).rename_axis("iteration").reset_index()
        for arm, history in histories.items()
        for term, values in history.items()
    )
    return figure


def interval_bars(
    frame: pd.DataFrame, x: str, y: str, hue: str, *, groups: str | None = "batch", width: float = COLUMN, xlabel: str | None = None
) -> Figure:
    """Bars of the mean of column `y` for each value of `x`, one colour for each value of `hue`, with 95 % bootstrap intervals.

    `groups`: the column that says which images were reconstructed together (see `bootstrap_interval`); None treats rows as independent.
    """
    table = pd.DataFrame(
        {x: key[0], hue: key[1]} | bootstrap_interval(part[y], groups=part[groups] if groups else None)._asdict()
        for key, part in frame.groupby([x, hue], sort=False)
    )
    positions = {value: position for position, value in enumerate(table[x].unique())}
    arms = list(table[hue].unique())
    figure, axes = plt.subplots(figsize=(width, 2.6), layout="constrained")
    for index, (arm, color) in enumerate(zip(arms, seaborn.color_palette(n_colors=len(arms)), strict=True)):
        part = table[table[hue] == arm]
        center = part[x].map(positions) + (index - (len(arms) - 1) / 2) * 0.8 / len(arms)
        errors = [(part["mean"] - part["low"]).fillna(0), (part["high"] - part["mean"]).fillna(0)]
        axes.bar(center, part["mean"], 0.8 / len(arms), color=color, label=arm, yerr=errors, error_kw={"capsize": 2, "linewidth": 0.9})
    axes.set_xticks(list(positions.values()), [str(value) for value in positions])
    axes.set(xlabel=x if xlabel is None else xlabel, ylabel=LABELS.get(y, y))
    axes.set_title(f"bars: mean; lines: 95 % bootstrap interval\n{_counted(table['count'], groups)} each", fontsize=7)
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside upper center", ncols=min(3, len(arms)), frameon=False)
    figure.data_drawn = table
    return figure


def _counted(counts: pd.Series, groups: str | None) -> str:
    number = "–".join(str(count) for count in dict.fromkeys([counts.min(), counts.max()]))
    return f"{number} independent {'batches' if groups else 'images'}"


def paired_effect(effects: Mapping[str, Interval], label: str, *, width: float = PAGE, decimals: int = 2) -> Figure:
    """A forest plot of paired differences (see `paired_difference`): mean, 95 % bootstrap interval, and a line at no difference.

    `label` says what the difference is, with its unit, such as "PSNR gain by the anomaly score (dB)".
    """
    figure, axes = plt.subplots(figsize=(width, 0.75 + 0.32 * len(effects)), layout="constrained")
    axes.axvline(0, color="0.3", linewidth=0.8, linestyle="--")
    for row, effect in enumerate(effects.values()):
        axes.plot([effect.low, effect.high], [row, row], color="C0", linewidth=1.5)
        axes.plot(effect.mean, row, "o", color="C0", markersize=4)
        axes.text(1.02, row, f"{effect:+.{decimals}f}  n={effect.count}", transform=axes.get_yaxis_transform(), va="center", fontsize=7)
    axes.set_yticks(range(len(effects)), list(effects))
    axes.set(ylim=(len(effects) - 0.5, -0.5), xlabel=f"{label}\nmean and 95 % bootstrap interval")
    axes.grid(axis="y", visible=False)
    figure.data_drawn = pd.DataFrame({"effect": name, **effect._asdict()} for name, effect in effects.items())
    return figure
