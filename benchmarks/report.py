"""Writes what the benchmarks measured into docs/engines.md, and draws figures/benchmark_quality:
python benchmarks/report.py
"""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn
from reports import RESULTS, read_rows

from gipip.figures import LABELS, PAGE, save_figure, use_style

ROOT = Path(__file__).parent.parent
PAGE_OF_ENGINES = ROOT / "docs" / "engines.md"
SECTION = re.compile(
    r"(?<=^<!-- benchmarks: written by benchmarks/report.py -->\n)"
    r".*?(?=^<!-- end of benchmarks -->$)",
    re.DOTALL | re.MULTILINE,
)
ENGINES = ("eager", "traced", "cudagraph")


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    lines = [columns, ["---"] * len(columns), *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def iterations() -> list[str]:
    about = ["machine", "model", "batch size", "attack"]
    rows = []
    for (machine, model, size, attack), part in pd.DataFrame(read_rows("iteration")).groupby(
        about, sort=False
    ):
        by_engine = {row["engine"]: passes(row) for _, row in part.iterrows()}
        measured = [by_engine.get(engine, "") for engine in ENGINES]
        a_pass = f"{part['pass ms'].median():.0f} ms"
        rows.append([machine, model, str(size), a_pass, attack, *measured, part["date"].max()])
    columns = ["machine", "network", "B", "a pass", "attack", *ENGINES, "date"]
    text = (
        "**An iteration** in forward and backward passes of the client, timed in turn (medians and "
        "quartiles; the arithmetic needs 2.33 where all gradients are formed):"
    )
    return [text, "", *table(columns, rows)]


def passes(row: pd.Series) -> str:
    return f"{row['passes']:.2f} [{row['passes low']:.2f}, {row['passes high']:.2f}]"


def memory() -> list[str]:
    columns = ["machine", "attack", "engine", "at a time", "peak", "an iteration", "date"]
    rows = []
    for row in read_rows("memory"):
        size = f"{row['image size']}×{row['image size']}"
        attack = f"{row['model']}, B = {row['batch size']}, {size}"
        peak, time = f"{row['peak GiB']:.1f} GiB", f"{row['seconds an iteration']:.0f} s"
        at_once = str(row["chunk size"])
        rows.append([row["machine"], attack, row["engine"], at_once, peak, time, row["date"]])
    text = (
        "**Memory** of an attack at its peak, beyond that of the process before, for the gradient "
        "taken from so many images at a time:"
    )
    return [text, "", *table(columns, rows)]


def scale_out() -> list[str]:
    path = RESULTS / "scale_out.json"
    if not path.exists():
        return []
    measured = json.loads(path.read_text())
    low, middle, high = (measured["efficiency"][name] for name in ("minimum", "median", "maximum"))
    return [
        f"**Two workers** on two cores do {middle:.0%} [{low:.0%}, {high:.0%}] of twice one "
        f"worker's work (median and range of {len(measured['repetitions'])} repetitions; "
        f"{measured['machine']}, {measured['date']}).",
        "",
    ]


def quality() -> list[str]:
    """A table of where each attack ends."""
    frame = pd.DataFrame(read_rows("quality"))
    mean = courses(frame)
    last = mean.loc[mean.groupby("arm", sort=False)["iteration"].idxmax()]
    released = last[last["arm"].str.endswith("as released")]
    ends = pd.concat([released, mean[mean["arm"].str.endswith("gipip")]])
    rows = [
        [row.arm, f"{row.iteration:,}", f"{row.seconds:.1f} s", f"{row.psnr:.2f} dB"]
        for row in ends.itertuples()
    ]
    text = (
        f"**Quality in time**: single CIFAR-10 images, untrained {frame['model'].iloc[0]}, mean of "
        f"{frame['seed'].nunique()} private images, one thread ({frame['machine'].iloc[0]}, "
        f"{frame['date'].max()}). The released attacks run with the public implementations' double "
        "backward."
    )
    picture = "![PSNR against seconds](../figures/benchmark_quality.png)"
    return [text, "", picture, "", *table(["attack", "iterations", "time", "PSNR"], rows)]


def courses(frame: pd.DataFrame) -> pd.DataFrame:
    """The mean course of PSNR over time, a row for each arm and iteration."""
    return frame.groupby(["arm", "iteration"], sort=False)[["seconds", "psnr"]].mean().reset_index()


def draw_quality(folder: Path) -> None:
    """The course of PSNR over time, as figures/benchmark_quality."""
    frame = pd.DataFrame(read_rows("quality"))
    mean = courses(frame)
    use_style()
    figure, axes = plt.subplots(figsize=(PAGE, 3.2), layout="constrained")
    colors = seaborn.color_palette()
    for color, (arm, part) in zip(colors, mean.groupby("arm", sort=False), strict=False):
        marker = "o" if arm.endswith("gipip") else ""
        style = {"color": color, "marker": marker, "markersize": 4}
        axes.plot(part["seconds"], part["psnr"], label=arm, **style)
    axes.set(xlabel="seconds on one CPU thread", ylabel=LABELS["psnr"], xscale="log")
    images, model = frame["seed"].nunique(), frame["model"].iloc[0]
    title = f"mean of {images} private images, B = 1, untrained {model}; points: whole attacks"
    axes.set_title(title, fontsize=7)
    axes.legend(fontsize=7)
    save_figure("benchmark_quality", figure, mean, folder)


def section() -> str:
    """What stands between the markers."""
    return "\n".join(["", *iterations(), *quality(), *memory(), *scale_out()])


def main() -> None:
    draw_quality(ROOT / "figures")
    text = PAGE_OF_ENGINES.read_text()
    PAGE_OF_ENGINES.write_text(SECTION.sub(lambda _: section(), text, count=1))


if __name__ == "__main__":
    main()
